"""Options that several commands take: one definition each, in groups that a command names as one parameter."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

import typer

from perturbscope.cli import console
from perturbscope.errors import InvalidParameterError

if TYPE_CHECKING:
    from perturbscope.cells.readers import CellSource
    from perturbscope.scoring.results import ScoreOptions
    from perturbscope.tasks.backends import Backend, StageProgress
    from perturbscope.tasks.screen import Screen

BUNDLE_VARIABLE = "PERTURBSCOPE_BUNDLE"
"""Environment variable that names the default bundle."""
KEY_VARIABLE, KEY_FILE_VARIABLE = "PERTURBSCOPE_API_KEY", "PERTURBSCOPE_API_KEY_FILE"
CA_VARIABLE = "PERTURBSCOPE_CA"
"""Variables that the clients read, see :mod:`perturbscope.client.access`; importing their names would load it."""
_INPUT, _MODEL, _SCORING = "Input", "Model", "Scoring"

In = Annotated[
    Path, typer.Argument(metavar="IN", help="Raw counts: .h5ad, 10x .h5, 10x directory with matrix.mtx, or zarr.")
]
OutTable = Annotated[Path, typer.Argument(metavar="OUT", help="The .parquet or .csv file to write.")]
PerturbationKey = Annotated[str, typer.Option(metavar="COL", help="Column of obs with each cell's perturbation.")]
Control = Annotated[list[str], typer.Option(metavar="LABEL", help="A label of control cells; repeatable.")]
BatchKey = Annotated[
    str | None, typer.Option(metavar="COL", help="Column of obs; labels are permuted within its batches.")
]
UnitKey = Annotated[
    str | None,
    typer.Option(
        metavar="COL", help="Column of obs with each cell's well, guide or donor; whole ones are exchanged for p_unit."
    ),
]
Top = Annotated[int, typer.Option(min=0, help="Rows of the table on stdout for each metric; 0 for none.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random draws.")]


@dataclass(frozen=True, kw_only=True)
class CountsIn:
    """Location of the raw counts in a file."""

    layer: Annotated[
        str | None,
        typer.Option(help="Location of the raw counts: X (default), a layer, or raw.", rich_help_panel=_INPUT),
    ] = None
    gene_key: Annotated[
        str | None, typer.Option(help="Column of var with gene ids; default: the index.", rich_help_panel=_INPUT)
    ] = None
    total_counts_key: Annotated[
        str | None,
        typer.Option(
            help="Column of obs with each cell's total counts, where the file holds only some genes.",
            rich_help_panel=_INPUT,
        ),
    ] = None
    round_counts: Annotated[
        bool,
        typer.Option(
            "--round-counts",
            help="Round estimated counts (alevin, RSEM, STARsolo EM, CellBender) to whole numbers.",
            rich_help_panel=_INPUT,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class LabelsIn:
    """Labels that are no perturbations, or have several spellings."""

    missing_label: Annotated[
        list[str],
        typer.Option(
            metavar="LABEL",
            help="A label that stands for a missing one (nan, NA ...): leave its cells out. Repeatable.",
            rich_help_panel=_INPUT,
        ),
    ] = field(default_factory=list)
    normalize_combinations: Annotated[
        bool,
        typer.Option(
            "--normalize-combinations",
            help="Write combinations in one way: A+B for B,A too, and A for A+ctrl.",
            rich_help_panel=_INPUT,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ModelFrom:
    """Source of the model: a bundle for this process, or a server.

    The first of these that there is: the option, the environment variable PERTURBSCOPE_BUNDLE (of several directories
    in it, as a server takes them, the first), ``bundles/default`` in the working directory, the only bundle in
    ``bundles/`` there.
    """

    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="DIR",
            help=f"Model bundle; default: ${BUNDLE_VARIABLE}, or bundles/default, or the only one in bundles/.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Use a server over HTTP, e.g. http://localhost:3000.", rich_help_panel=_MODEL),
    ] = None
    grpc: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Use a server over gRPC, e.g. localhost:3001; grpcs://HOST:PORT for TLS.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option("--model", help="Name of one of a server's models; default: its first.", rich_help_panel=_MODEL),
    ] = None
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Wait so long for a server that is busy, away or starting; default: about half a minute.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    device: Annotated[
        Literal["cpu", "cuda", "tensorrt"],
        typer.Option("--device", help="Device that runs a bundle.", rich_help_panel=_MODEL),
    ] = "cpu"
    variant: Annotated[
        str,
        typer.Option("--variant", help="Graph of a bundle: fp32, fp16, fp16-flash, int8.", rich_help_panel=_MODEL),
    ] = "fp32"

    @contextmanager
    def open(self) -> Iterator[Backend]:
        """Open the one source of a model that was chosen."""
        from perturbscope.tasks.backends import default_bundle, open_backend

        sources = [("--bundle", self.bundle), ("--server", self.server), ("--grpc", self.grpc)]
        chosen = [name for name, value in sources if value]
        if len(chosen) > 1:
            raise InvalidParameterError(
                f"{' and '.join(chosen)} exclude each other; give one.", field=chosen[1].strip("-")
            )
        grpc = self.grpc
        if grpc and "://" not in grpc:
            # Users who name authorities to trust do not want to go without them.
            grpc = f"{'grpcs' if os.environ.get(CA_VARIABLE) else 'grpc'}://{grpc}"
        named = self.bundle or os.environ.get(BUNDLE_VARIABLE, "").split(os.pathsep)[0]
        address = self.server or grpc or named or default_bundle()
        if self.server and "://" not in self.server:
            from perturbscope.client.access import without_userinfo

            shown = without_userinfo(self.server)
            raise InvalidParameterError(f"--server {shown} is not a URL; did you mean http://{shown}?", field="server")
        opened = open_backend(
            str(address),
            device=self.device,
            variant=self.variant,
            model=self.model,
            wait=self.wait if self.server or grpc else None,
        )
        with closing(opened) as backend:
            if isinstance(address, Path) and address != self.bundle:
                console.note(f"Using {address} ({backend.model_id}).")
            yield backend


@dataclass(frozen=True, kw_only=True)
class ScreenIn:
    """A screen in a file of cells: its labels, and its vectors or the model that embeds it."""

    perturbation_key: PerturbationKey
    use_rep: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Score this matrix of obsm (X_pca, X_perturbscope, ...); no model is needed."),
    ] = None
    min_cells: Annotated[int, typer.Option(help="Fewest cells of a scored group.", rich_help_panel=_SCORING)] = 20
    setting: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other option of perturbscope.ScoreOptions, e.g. estimator=V, null=fixed, repeats=1; repeatable.",
            rich_help_panel=_SCORING,
        ),
    ] = field(default_factory=list)
    seed: Seed = 0
    labels: LabelsIn
    counts: CountsIn
    model: ModelFrom

    def options(self, testing: Testing | None = None, **named: Any) -> ScoreOptions:
        """Return the options of scoring: those of ``--set NAME=VALUE`` first, then those `named`, then `testing`'s.

        Raises
        ------
        InvalidParameterError
            An unknown name, or a value outside its range.
        """
        from perturbscope.scoring.results import ScoreOptions

        values: dict[str, Any] = {}
        for item in self.setting:
            name, equals, text = item.partition("=")
            if not equals:
                raise InvalidParameterError(f"--set {item} is not of the form NAME=VALUE.", field="set")
            try:
                values[name.strip()] = json.loads(text)
            except ValueError:
                values[name.strip()] = text
        # What is not asked for can still be set by name.
        if self.labels.missing_label:
            values.setdefault("missing_labels", self.labels.missing_label)
        if self.labels.normalize_combinations:
            values.setdefault("normalize_combinations", True)
        tested = testing.options() if testing else {}
        return ScoreOptions.from_dict({"seed": self.seed, "min_cells": self.min_cells, **tested, **named, **values})

    @contextmanager
    def open(
        self,
        cells: Path,
        options: ScoreOptions,
        *,
        control: Sequence[str] | None = None,
        batch_key: str | None = None,
        unit_key: str | None = None,
    ) -> Iterator[tuple[Screen, CellSource, StageProgress]]:
        """Read the screen, embed it if need be, and keep file, model and progress bars open for the work with it."""
        from perturbscope.cells.readers import open_cells
        from perturbscope.tasks.screen import Screen

        # Vectors that are in the file are scored in this process unless a server is named.
        is_model_needed = self.use_rep is None or self.model.server or self.model.grpc
        with (
            open_cells(cells, **vars(self.counts)) as source,
            console.progress_bars() as progress,
            self.model.open() if is_model_needed else nullcontext() as backend,
        ):
            screen = Screen.of(
                source,
                backend,
                perturbation_key=self.perturbation_key,
                control=control or None,
                use_rep=self.use_rep,
                batch_key=batch_key,
                unit_key=unit_key,
                options=options,
                progress=progress,
            )
            yield screen, source, progress


@dataclass(frozen=True, kw_only=True)
class Testing:
    """Metrics of a score, and the exchanges of labels that test it."""

    batch_key: BatchKey = None
    metric: Annotated[
        list[str],
        typer.Option(
            "--metric", help="e_distance, cosine_e_distance or wasserstein; repeatable.", rich_help_panel=_SCORING
        ),
    ] = field(default_factory=lambda: ["e_distance"])
    permutations: Annotated[
        int | None,
        typer.Option(
            help="Most permutations of the labels behind p of an energy distance; default 1,000, and for small p as "
            "many as tell it from chance among all perturbations, at most 200,000.",
            rich_help_panel=_SCORING,
        ),
    ] = None
    adjust: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="q from p: bh (Benjamini-Hochberg, the share of false hits), holm or bonferroni (the risk of one).",
            rich_help_panel=_SCORING,
        ),
    ] = "bh"

    centre: Annotated[
        bool,
        typer.Option(
            "--centre",
            help="Take the mean of all cells from every vector before it is scaled to unit length.",
            rich_help_panel=_SCORING,
        ),
    ] = False
    omnibus: Annotated[
        bool,
        typer.Option(
            "--omnibus",
            help="Also test for changes of variance, states and narrow axes; one p of all (p_omnibus) and who fired.",
            rich_help_panel=_SCORING,
        ),
    ] = False

    def options(self) -> dict[str, Any]:
        """Return the names and values of these options of scoring."""
        named = {"metrics": self.metric, "permutations": self.permutations, "correction": self.adjust}
        return {**named, "centre": self.centre, "omnibus": self.omnibus}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the groups among its parameters, and call it with the groups."""
    types = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    flat = [option for item in parameters.values() for option in _flat(item.replace(annotation=types[item.name]))]

    def run(**values: Any) -> None:
        command(**{name: _taken(types[name], name, values) for name in parameters})

    described: Any = wraps(command)(run)
    described.__signature__ = inspect.Signature(flat)
    described.__annotations__ = {option.name: option.annotation for option in flat}
    return cast("Callable[..., None]", described)


def _flat(item: inspect.Parameter) -> list[inspect.Parameter]:
    """The parameter itself, or those of its group, and of the groups in that."""
    if not is_dataclass(item.annotation):
        return [item.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    types = get_type_hints(item.annotation, include_extras=True)
    members = []
    for member in fields(item.annotation):
        default = member.default if member.default_factory is MISSING else member.default_factory()
        members += _flat(
            inspect.Parameter(
                member.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=types[member.name],
            )
        )
    return members


def _taken(kind: Any, name: str, values: Mapping[str, Any]) -> Any:
    """The value of a parameter, or the group that is made of several."""
    if not is_dataclass(kind):
        return values[name]
    types = get_type_hints(kind, include_extras=True)
    members = {member.name: _taken(types[member.name], member.name, values) for member in fields(kind)}
    return cast("Any", kind)(**members)
