"""Warnings about models that were trained on the cells that they score, as far as their bundles can tell.

Fine-tuning pulls the cells of a perturbation together. A model that was fine-tuned on a part of a screen embeds that
part differently from the rest, whatever was done to the cells: then whole perturbations differ from controls that were
trained on, with small p and large z, and nothing else in the numbers shows it.

A bundle lists the SHA-256 of every file that its model, or the model that it was made from, was trained on. A copy
under another name has the same digest. The same cells in another encoding (saved again, cut to some genes, as AnnData
in memory, in a JSON or Arrow body, as an embedding made before) have another digest and cannot be recognised for
certain: a bundle knows only the number of cells of each file. A screen with as many cells as a file of fine-tuning gets
a warning, a part of it does not. The absence of a warning is no proof that cells are new to a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from perturbscope.inference.bundle import sha256

if TYPE_CHECKING:
    from perturbscope.cells.readers import CellSource
    from perturbscope.scoring.results import CompareResult, ScoreResult
    from perturbscope.tasks.backends import Backend

    Result = TypeVar("Result", ScoreResult, CompareResult)

How = Literal["fine_tuned_on_this_file", "perhaps_fine_tuned_on_these_cells", "pretrained_on_this_file"]
"""Names of the warnings."""
KEY = "seen_in_training"
"""Key of the provenance of a result that holds the facts of the warning."""
_GRAVEST: tuple[How, ...] = ("fine_tuned_on_this_file", "perhaps_fine_tuned_on_these_cells", "pretrained_on_this_file")
_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Facts by which the file of a source is recognised.

    Attributes
    ----------
    sha256
        SHA-256 of its bytes; None for an object in memory and for a directory.
    n_cells
        Number of its cells, those without a label included.
    """

    sha256: str | None
    n_cells: int

    @classmethod
    def of(cls, source: CellSource) -> Fingerprint:
        """Return the fingerprint of an open source; reads the whole file."""
        is_file = source.path is not None and source.path.is_file()
        return cls(sha256=sha256(source.path) if source.path and is_file else None, n_cells=source.n_cells)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One way in which a model has seen the cells that are scored.

    Attributes
    ----------
    how
        Name of the warning.
    source
        Name of the file in the configuration of training.
    n_cells
        Number of cells of that file.
    targets
        Perturbations that fine-tuning used, if the bundle lists them.
    n_controls
        Number of control cells that fine-tuning used.
    selected
        Columns of obs by which pre-training chose cells.
    """

    how: How
    source: str
    n_cells: int = 0
    targets: tuple[str, ...] = ()
    n_controls: int = 0
    selected: tuple[str, ...] = field(default=())

    @property
    def undoes(self) -> bool:
        """Whether the scores of the whole file must not be trusted."""
        return self.how == "fine_tuned_on_this_file"

    def warning(self) -> str:
        """Return the warning as text."""
        if self.how == "pretrained_on_this_file":
            text = (
                f"The model was trained on the expression of cells of this file ({self.source}), without their labels. "
                "That favours no perturbation, but other data may be embedded less well than these."
            )
            if self.selected:
                text += (
                    f" Its cells were chosen by {', '.join(self.selected)}; where that goes with the perturbation, "
                    "cells differ by having been seen."
                )
            return f"{self.how}: {text}"
        what = ", ".join(self.targets[:_SHOWN])
        what += f" and {len(self.targets) - _SHOWN} more" if len(self.targets) > _SHOWN else ""
        parts = [what] if what else []
        parts += [f"{self.n_controls:,} controls"] if self.n_controls else []
        used = f"{self.source}: {' and '.join(parts)}" if parts else self.source
        why = "cells that it was trained on lie closer together than cells that it never saw"
        what_to_do = (
            "Score the cells that were held out (the files heldout*.h5ad that fine-tuning writes), or use a model that "
            "was not fine-tuned on them."
        )
        if self.undoes:
            return (
                f"{self.how}: The model was fine-tuned on cells of this file ({used}): {why}, so p, q and z of the "
                f"whole file are not to be believed. {what_to_do}"
            )
        return (
            f"{self.how}: There are {self.n_cells:,} cells here, as many as in a file on which the model was "
            f"fine-tuned ({used}). If they are the same cells, {why}, and p, q and z are not to be believed. "
            f"{what_to_do}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON, for provenance."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def add_to(self, result: Result) -> Result:
        """Return the result with the warning, as the first of its warnings, and the facts in its provenance."""
        return replace(
            result,
            warnings=[self.warning(), *result.warnings],
            provenance={**result.provenance, KEY: self.to_dict()},
        )


def find_seen(training: Mapping[str, Any], found: Fingerprint) -> Seen | None:
    """Return the gravest way in which a model has seen a file; None if its bundle lists no such file.

    Parameters
    ----------
    training
        ``training`` of a bundle's manifest; bundles of other makers may hold anything there.
    found
        Fingerprint of the file.
    """
    ways = list(_ways(training, found))
    return min(ways, key=lambda seen: _GRAVEST.index(seen.how)) if ways else None


def seen_by(backend: Backend | None, source: CellSource) -> Seen | None:
    """Return :func:`find_seen` of a model in this process; a server does not say what its model was trained on."""
    from perturbscope.tasks.backends import LocalBackend

    if not isinstance(backend, LocalBackend) or not any(_sources(backend.embedder.training)):
        return None
    return find_seen(backend.embedder.training, Fingerprint.of(source))


def _ways(training: Mapping[str, Any], found: Fingerprint) -> Iterator[Seen]:
    for stage, source in _sources(training):
        same = found.sha256 is not None and source.get("sha256") == found.sha256
        name, options = str(source.get("name", "")), _options(stage, source)
        # What is not known to have been done without labels is taken to have been done with them.
        blind = str(stage.get("objective", "")).startswith("masked") or options.get("unlabelled") is True
        if blind and same:
            yield Seen(how="pretrained_on_this_file", source=name, selected=tuple(_mapping(options.get("select"))))
        elif not blind and (same or source.get("cells") == found.n_cells):
            part = _mapping(_mapping(stage.get("split")).get(name))
            targets = _mapping(part.get("targets")).get("train")
            n_controls = _mapping(part.get("controls")).get("train")
            yield Seen(
                how="fine_tuned_on_this_file" if same else "perhaps_fine_tuned_on_these_cells",
                source=name,
                n_cells=found.n_cells,
                targets=tuple(map(str, targets)) if isinstance(targets, list) else (),
                n_controls=n_controls if isinstance(n_controls, int) else 0,
            )


def _sources(training: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield stages of training with the sources of their data, of the model and of those that it was made from."""
    stage = training
    while stage:
        sources = _mapping(stage.get("data")).get("sources")
        yield from ((stage, source) for source in _mappings(sources))
        stage = _mapping(stage.get("parent"))


def _options(stage: Mapping[str, Any], source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Entry of a source in the configuration, in which the name of the file stands for a missing name."""
    corpus = _mapping(_mapping(stage.get("hyper_parameters")).get("corpus"))
    for options in _mappings(corpus.get("sources")):
        if (options.get("name") or Path(str(options.get("path", ""))).stem) == source.get("name"):
            return options
    return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []
