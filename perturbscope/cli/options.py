"""Options that several commands take, in one place so that they read and mean the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perturbscope.errors import InvalidParameterError

if TYPE_CHECKING:
    from perturbscope.scoring.results import ScoreOptions

BUNDLE_VARIABLE = "PERTURBSCOPE_BUNDLE"
"""Environment variable that names the default bundle."""
KEY_VARIABLE, KEY_FILE_VARIABLE = "PERTURBSCOPE_API_KEY", "PERTURBSCOPE_API_KEY_FILE"
CA_VARIABLE = "PERTURBSCOPE_CA"
"""Those that the clients read, see :mod:`perturbscope.client.access`; named here because that would load them."""
_INPUT, _MODEL, _SCORING = "Input", "Model", "Scoring"
In = Annotated[
    Path, typer.Argument(metavar="IN", help="Raw counts: .h5ad, 10x .h5, 10x directory with matrix.mtx, or zarr.")
]
Layer = Annotated[
    str | None, typer.Option(help="Where the raw counts are: X (default), a layer, or raw.", rich_help_panel=_INPUT)
]
GeneKey = Annotated[
    str | None, typer.Option(help="Column of var with gene ids; default: the index.", rich_help_panel=_INPUT)
]
TotalCountsKey = Annotated[
    str | None,
    typer.Option(
        help="Column of obs with each cell's total counts, where the file holds only some genes.",
        rich_help_panel=_INPUT,
    ),
]
BundleDir = Annotated[
    Path | None,
    typer.Option("--bundle", metavar="DIR", help=f"Model bundle; default: ${BUNDLE_VARIABLE}.", rich_help_panel=_MODEL),
]
Server = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Use a server over HTTP, e.g. http://localhost:3000.", rich_help_panel=_MODEL),
]
Grpc = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Use a server over gRPC, e.g. localhost:3001; grpcs://HOST:PORT for TLS.",
        rich_help_panel=_MODEL,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Which of a server's models; its default otherwise.", rich_help_panel=_MODEL),
]
DeviceName = Annotated[
    Literal["cpu", "cuda", "tensorrt"], typer.Option("--device", help="Where a bundle runs.", rich_help_panel=_MODEL)
]
VariantName = Annotated[
    str,
    typer.Option("--variant", help="Which graph of a bundle: fp32, fp16, fp16-flash, int8.", rich_help_panel=_MODEL),
]
Seed = Annotated[int, typer.Option(min=0, help="Of all random draws.")]
PerturbationKey = Annotated[str, typer.Option(metavar="COL", help="Column of obs with each cell's perturbation.")]
UseRep = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Score this matrix of obsm (X_pca, X_perturbscope, ...); no model is needed."),
]
BatchKey = Annotated[
    str | None, typer.Option(metavar="COL", help="Column of obs; labels are permuted within its batches.")
]
Metrics = Annotated[
    list[str],
    typer.Option(
        "--metric", help="e_distance, cosine_e_distance or wasserstein; repeatable.", rich_help_panel=_SCORING
    ),
]
MinCells = Annotated[int, typer.Option(help="Fewest cells of a scored group.", rich_help_panel=_SCORING)]
Permutations = Annotated[int, typer.Option(help="Exchanges of labels behind p.", rich_help_panel=_SCORING)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other option of perturbscope.ScoreOptions, e.g. estimator=V, null=fixed, repeats=1; repeatable.",
        rich_help_panel=_SCORING,
    ),
]
Top = Annotated[int, typer.Option(min=0, help="Rows of the table on stdout, a metric; 0 for none.")]


def score_options(
    metrics: list[str], seed: int, min_cells: int, permutations: int, settings: list[str] | None
) -> ScoreOptions:
    """Options of scoring, from the command's own and ``--set NAME=VALUE``.

    Raises
    ------
    InvalidParameterError
        An unknown name, or a value outside its range.
    """
    from perturbscope.scoring.results import ScoreOptions

    values: dict[str, Any] = {}
    for item in settings or []:
        name, equals, text = item.partition("=")
        if not equals:
            raise InvalidParameterError(f"--set {item} is not of the form NAME=VALUE.", field="set")
        try:
            values[name.strip()] = json.loads(text)
        except ValueError:
            values[name.strip()] = text
    named = {"metrics": metrics, "seed": seed, "min_cells": min_cells, "permutations": permutations}
    return ScoreOptions.from_dict({**named, **values})
