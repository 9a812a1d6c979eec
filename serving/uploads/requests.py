"""The request that an uploaded .h5ad file and its parameters make.

An upload lies in a temporary directory of its own while it is read, and is always deleted. The file is checked first
(:mod:`serving.uploads.hdf5_checks`); then only the parts that a request asks for are read: the counts, the gene
identifiers, and the columns of obs and the embedding that it names. uns is not read, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import CellSource, open_cells
from perturbscope.errors import (
    InvalidInputError,
    InvalidParameterError,
    LimitExceededError,
    PerturbScopeError,
)
from perturbscope.protocol import CompareRequest, EmbedRequest, ScoreRequest
from perturbscope.report import Absent
from perturbscope.scoring.results import ScoreOptions
from perturbscope.tasks.trained_on import Fingerprint
from serving.access.limits import check_shape, check_vectors
from serving.engine.columns import Columns, read_columns
from serving.engine.reports import TITLE, ReportRequest
from serving.settings import Settings
from serving.uploads.hdf5_checks import check_file

FILE_NAME = "upload.h5ad"
CELLS_PARAMETERS = {
    "model": "Name of a model; the server's first one by default.",
    "layer": "Where the raw counts are: X (default), a layer, or raw.",
    "gene_key": "Column of var with the gene identifiers; the index by default.",
    "total_counts_key": "Column of obs with each cell's total counts over all measured genes.",
}
LABEL_PARAMETERS = {
    "perturbation_key": "Column of obs with the perturbation of each cell. Required.",
    "batch_key": "Column of obs with the batch of each cell.",
    "use_rep": "Matrix of obsm to score in place of the model's embedding.",
    "options": "Options of scoring, a JSON object.",
    "control": "Label of control cells.",
}
PARAMETERS: dict[str, dict[str, str]] = {
    "embed": CELLS_PARAMETERS,
    "score": CELLS_PARAMETERS | LABEL_PARAMETERS,
    "report": CELLS_PARAMETERS | LABEL_PARAMETERS | {"title": "Heading of the page."},
    "columns": {},
    "compare": CELLS_PARAMETERS | LABEL_PARAMETERS | {"pairs": "Pairs to compare, a JSON list of lists of two."},
}
"""Query parameters (or form fields) that each route takes beside an uploaded file, with their descriptions."""
_CHUNK_VALUES = 2**25


@dataclass(frozen=True)
class Upload:
    """The request that a file makes, and warnings for its sender."""

    request: EmbedRequest | ScoreRequest | CompareRequest | ReportRequest | Columns
    warnings: list[str] = field(default_factory=list)
    file: Fingerprint | None = None
    """Fingerprint of a file whose cells are embedded to be scored."""


def read_upload(route: str, path: Path, parameters: Mapping[str, str], settings: Settings) -> Upload:
    """Return the request that an uploaded file and its parameters make. Blocks; for a reading process.

    Raises
    ------
    InvalidParameterError
        A parameter is unknown to the route, missing, or wrong.
    InvalidInputError
        The file cannot be read; see :func:`perturbscope.open_cells`.
    LimitExceededError
        The file has more cells, genes or counts than the server takes.
    """
    unknown = sorted(set(parameters) - set(PARAMETERS[route]))
    if unknown:
        raise InvalidParameterError(
            f"Unknown parameter {unknown[0]!r}; there are {', '.join(PARAMETERS[route]) or 'none'}.", field=unknown[0]
        )
    try:
        check_file(path, settings)
        with open_cells(
            path,
            layer=parameters.get("layer"),
            gene_key=parameters.get("gene_key"),
            total_counts_key=parameters.get("total_counts_key"),
        ) as source:
            if route == "columns":
                return Upload(read_columns(source))
            if route == "embed":
                return Upload(EmbedRequest(cells=_read_cells(source, settings), model=parameters.get("model")))
            upload = _labelled(route, source, parameters, settings)
            return upload if parameters.get("use_rep") else replace(upload, file=Fingerprint.of(source))
    except PerturbScopeError as error:
        # The caller knows its file, not where it lies here.
        error.message = error.message.replace(f"{path.parent}/", "")
        error.args = (error.message,)
        raise


def _labelled(route: str, source: CellSource, parameters: Mapping[str, str], settings: Settings) -> Upload:
    """Return a request to score or compare the cells that have a label; the others are left out, with a warning."""
    for name in ["perturbation_key"] if route == "compare" else ["perturbation_key", "control"]:
        if not parameters.get(name):
            raise InvalidParameterError(
                f"{name} is missing: {PARAMETERS[route][name]} Give it as a query parameter or form field.", field=name
            )
    keys = [name for name in ("perturbation_key", "batch_key") if parameters.get(name)]
    columns = [source.labels(parameters[name], field=name) for name in keys]
    labelled = np.all([[bool(label and label.strip()) for label in column] for column in columns], axis=0)
    rows = np.flatnonzero(labelled)
    where = " and ".join(f"obs[{parameters[name]!r}]" for name in keys)
    if not len(rows):
        raise InvalidParameterError(f"No cell has a value in {where}.", field="perturbation_key")
    common: dict[str, Any] = {
        "perturbations": tuple(columns[0][rows].tolist()),
        "batches": tuple(columns[1][rows].tolist()) if len(columns) > 1 else None,
        "options": ScoreOptions.from_dict(_json(parameters, "options", dict) or {}),
        "model": parameters.get("model"),
        "control": parameters.get("control") or None,
    }
    if parameters.get("use_rep"):
        check_vectors(settings, source.n_cells)
        common["embeddings"] = source.representation(parameters["use_rep"])[rows]
    else:
        cells = _read_cells(source, settings)
        common["cells"] = cells if len(rows) == len(cells) else cells[rows]
    n_left_out = source.n_cells - len(rows)
    warnings = [f"{n_left_out} of {source.n_cells} cells have no value in {where} and were left out."]
    warnings = warnings if n_left_out else []
    if route == "compare":
        return Upload(CompareRequest(**common, pairs=_pairs(_json(parameters, "pairs", list))), warnings)
    score = ScoreRequest(**common)
    if route == "score":
        return Upload(score, warnings)
    title = parameters.get("title") or TITLE
    if not parameters.get("use_rep"):
        return Upload(ReportRequest(score=score, title=title), warnings)
    return Upload(ReportRequest(score=score, title=title, counts=_counts(source, rows, settings)), warnings)


def _counts(source: CellSource, rows: NDArray[np.intp], settings: Settings) -> CountMatrix | Absent:
    """Read the raw counts beside an embedding of the file; if there are none, the page gives the reason."""
    try:
        return _read_cells(source, settings)[rows]
    except (InvalidInputError, LimitExceededError) as error:
        message = error.message.replace(f"{source.path.parent}/" if source.path else "\0", "")
        return Absent(f"The file has no raw counts that could be tested gene by gene: {message}")


def _read_cells(source: CellSource, settings: Settings) -> CountMatrix:
    """Read all cells, in pieces of bounded size so that a compressed bomb is noticed while it is small."""
    n_genes = len(source.gene_ids)
    check_shape(settings, source.n_cells, n_genes, 0)
    parts: list[CountMatrix] = []
    n_values = 0
    step = max(1, _CHUNK_VALUES // n_genes)
    for start in range(0, source.n_cells, step):
        part = source.rows(start, start + step)
        n_values += int(part.counts.nnz)
        check_shape(settings, source.n_cells, n_genes, n_values)
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return CountMatrix(
        sparse.vstack([part.counts for part in parts], format="csr"),
        parts[0].gene_ids,
        np.concatenate([part.totals for part in parts]),
    )


def _json(parameters: Mapping[str, str], name: str, kind: type[Any]) -> Any:
    if not parameters.get(name):
        return None
    expected = "an object" if kind is dict else "a list"
    try:
        value = json.loads(parameters[name])
    except ValueError as error:
        raise InvalidParameterError(f"{name} is not JSON ({error}); give {expected}.", field=name) from error
    if not isinstance(value, kind):
        raise InvalidParameterError(f"{name} is JSON, but not {expected}.", field=name)
    return value


def _pairs(value: list[Any] | None) -> tuple[tuple[str, str], ...] | None:
    if value is None:
        return None
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(label, str) for label in pair)):
            raise InvalidParameterError("pairs must be a JSON list of lists of two labels.", field="pairs")
    return tuple((a, b) for a, b in value)
