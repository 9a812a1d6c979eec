"""Reading of a YAML file that names screens and models, so that one command evaluates them all.

``screens``: a list of mappings with ``path`` and any of the other parameters of :func:`evaluation.screens.open_screen`,
and ``title`` and ``note`` (for the page), ``relations`` (a .gmt file), ``scvi_epochs``. ``models``: see
:class:`ModelsConfig`. ``options``: ``seed``, those of :class:`evaluation.separation.SeparationOptions` under
``separation``, those of :class:`evaluation.replication.ReplicationOptions` under ``replication`` (or false), and
``umap_cells``. Paths are relative to the folder in which the command runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

from evaluation.models import Model, baselines
from evaluation.replication import ReplicationOptions
from evaluation.run import RunOptions
from evaluation.screens import EvaluationScreen, open_screen
from evaluation.scvi import ScviOptions
from evaluation.separation import SeparationOptions
from perturbscope.errors import InvalidParameterError, UnreadableFileError


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Models that are compared.

    Parameters
    ----------
    hvg
        Number of highly variable genes; 0 for none.
    pca
        Numbers of principal components.
    scvi
        Options of scVI; None leaves it out.
    bundles
        Name -> directory of a bundle.
    obsm
        Name -> matrix of obsm, which every screen must have.
    """

    hvg: int = 300
    pca: tuple[int, ...] = (200, 50)
    scvi: ScviOptions | None = None
    bundles: dict[str, str] = field(default_factory=dict)
    obsm: dict[str, str] = field(default_factory=dict)

    def models(self, *, scvi_epochs: int | None = None) -> list[Model]:
        """Return baselines first, in a fixed order, then matrices of obsm, then bundles.

        Raises
        ------
        InvalidParameterError
            Two models have the same name.
        """
        scvi = self.scvi
        if scvi is not None and scvi_epochs is not None:
            scvi = replace(scvi, max_epochs=min(scvi.max_epochs, scvi_epochs))
        models = baselines(pca_components=self.pca, hvg_genes=self.hvg or 1, scvi=scvi)
        models = [model for model in models if self.hvg or model.kind != "hvg"]
        models += [Model(name, "obsm", {"key": key}) for name, key in self.obsm.items()]
        models += [Model(name, "bundle", {"path": path}) for name, path in self.bundles.items()]
        names = [model.name for model in models]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InvalidParameterError(f"Two models are called {twice[0]!r}; give another name.", field="models")
        return models


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """File of a screen, and how to read it.

    Parameters
    ----------
    path
        File of the screen.
    title, note
        Heading and paragraph of its page.
    relations
        File of gene sets (.gmt).
    scvi_epochs
        Most epochs of scVI on this screen, if fewer than for all screens.
    arguments
        Other arguments of :func:`evaluation.screens.open_screen`.
    """

    path: Path
    title: str | None = None
    note: str = ""
    relations: Path | None = None
    scvi_epochs: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the screen; default that of the file."""
        return str(self.arguments.get("name") or self.path.name.removesuffix(".h5ad"))

    def open(self, *, obsm: Sequence[str] = ()) -> EvaluationScreen:
        """Read the screen; raises the errors of :func:`evaluation.screens.open_screen`."""
        return open_screen(self.path, **{"obsm": obsm, **self.arguments, "name": self.name})


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Screens, models and options of one evaluation."""

    screens: list[ScreenConfig]
    models: ModelsConfig = field(default_factory=ModelsConfig)
    options: RunOptions = field(default_factory=RunOptions)


def read_config(path: Path) -> EvaluationConfig:
    """Read a YAML file.

    Raises
    ------
    UnreadableFileError
        The file does not exist, or is not YAML.
    InvalidParameterError
        A key is unknown, or a value has the wrong type.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UnreadableFileError(f"{path} cannot be read as YAML: {error}", field="config") from error
    top = _mapping(values, str(path), {"screens", "models", "options"})
    screens = top.get("screens")
    if not isinstance(screens, list) or not screens:
        raise InvalidParameterError(f"{path}: screens must be a list with at least one screen.", field="screens")
    return EvaluationConfig(
        screens=[_screen(item, f"{path}, screens[{i}]") for i, item in enumerate(screens)],
        models=_models(top.get("models") or {}, f"{path}: models"),
        options=_options(top.get("options") or {}, f"{path}: options"),
    )


def _screen(item: object, where: str) -> ScreenConfig:
    of_screen = {"path", "title", "note", "relations", "scvi_epochs"}
    known = of_screen | set(signature(open_screen).parameters)
    values = _mapping(item, where, known)
    if "path" not in values:
        raise InvalidParameterError(f"{where} has no path.", field="path")
    relations = values.get("relations")
    return ScreenConfig(
        path=Path(values["path"]),
        title=values.get("title"),
        note=str(values.get("note", "")),
        relations=None if relations is None else Path(relations),
        scvi_epochs=values.get("scvi_epochs"),
        arguments={key: value for key, value in values.items() if key not in of_screen},
    )


def _models(item: object, where: str) -> ModelsConfig:
    values = _mapping(item, where, {spec.name for spec in fields(ModelsConfig)})
    values["pca"] = tuple(values.get("pca", ModelsConfig.pca))
    if values.get("scvi") is not None:
        options = _mapping(values["scvi"], f"{where}: scvi", {spec.name for spec in fields(ScviOptions)})
        values["scvi"] = ScviOptions(**options)
    return ModelsConfig(**values)


def _options(item: object, where: str) -> RunOptions:
    values = _mapping(item, where, {"seed", "separation", "replication", "umap_cells"})
    seed = values.get("seed", 0)
    separation = _mapping(
        values.get("separation") or {}, f"{where}: separation", {spec.name for spec in fields(SeparationOptions)}
    )
    section = values.get("replication", {})
    replication = None
    if section is not False:
        rest = _mapping(section or {}, f"{where}: replication", {spec.name for spec in fields(ReplicationOptions)})
        if "power_grid" in rest:
            rest["power_grid"] = tuple(rest["power_grid"])
        replication = ReplicationOptions(**{"seed": seed, **rest})
    return RunOptions(
        separation=SeparationOptions(**{"seed": seed, **separation}),
        replication=replication,
        umap_cells=values.get("umap_cells", RunOptions.umap_cells),
        seed=seed,
    )


def _mapping(item: object, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InvalidParameterError(f"{where} must be a mapping, not {item!r}.", field="config")
    unknown = sorted(str(key) for key in item if key not in known)
    if unknown:
        raise InvalidParameterError(
            f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}.", field=unknown[0]
        )
    return {str(key): value for key, value in item.items()}
