"""The request that an uploaded .h5ad file and its parameters make.

An upload lies in a temporary directory of its own while it is read, and is always deleted. The file is checked first
(:mod:`serving.uploads.hdf5_checks`); then only the parts that a request asks for are read: the counts, the gene
identifiers, and the columns of obs and the embedding that it names. uns is not read, and nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
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
from perturbscope.operations import OPERATIONS
from perturbscope.protocol.operations import SCORE
from perturbscope.report import Absent
from perturbscope.tasks.requests import REPRESENTATION, parameters_of, request_of, where_of
from perturbscope.tasks.trained_on import Fingerprint
from serving.access.limits import check_shape, check_vectors
from serving.engine.columns import read_columns
from serving.engine.reports import TITLE, ReportRequest
from serving.settings import Settings
from serving.uploads.hdf5_checks import check_file

FILE_NAME = "upload.h5ad"
_CHUNK_VALUES = 2**25


@dataclass(frozen=True)
class Upload:
    """The request that a file makes, and warnings for its sender."""

    request: Any
    """Request of an operation of the table, a :class:`ReportRequest`, or :class:`serving.engine.columns.Columns`."""
    warnings: list[str] = field(default_factory=list)
    file: Fingerprint | None = None
    """Fingerprint of a file whose cells are embedded to be scored."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of features of the file that are no genes, by their type."""
    round_counts: bool = False
    """Whether the counts were rounded."""


def parameters_for(route: str) -> dict[str, str]:
    """Return the query parameters (or form fields) that a route takes beside an uploaded file, with descriptions."""
    if route == "columns":
        return {}
    if route == "report":
        return {**parameters_of(SCORE), "title": "Heading of the page."}
    return parameters_of(OPERATIONS[route])


def read_upload(
    route: str,
    path: Path,
    parameters: Mapping[str, str],
    settings: Settings,
    checked: Callable[[int], None] = lambda n_bytes: None,
    *,
    name: str = "",
) -> Upload:
    """Return the request that an uploaded file and its parameters make. Blocks; for a reading process.

    Parameters
    ----------
    route
        The last part of the path, such as ``embed``.
    path
        Place of the file.
    parameters
        Query parameters, or fields of the form.
    settings
        Limits.
    checked
        Called with the bytes of the file's parts, unpacked, once the file is checked and before its data is read.
    name
        Name of the file, by which messages call it; empty: "The file".

    Raises
    ------
    InvalidParameterError
        A parameter is unknown to the route, missing, or wrong.
    InvalidInputError
        The file cannot be read; see :func:`perturbscope.open_cells`.
    LimitExceededError
        The file has more cells, genes or counts than the server takes.
    """
    known = parameters_for(route)
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise InvalidParameterError(
            f"Unknown parameter {unknown[0]!r}; there are {', '.join(known) or 'none'}.", field=unknown[0]
        )
    try:
        checked(check_file(path, settings))
        with open_cells(path, **where_of(parameters)) as source:
            if route == "columns":
                return Upload(read_columns(source))
            upload = _asked(route, source, parameters, settings)
            asked = upload.request
            if isinstance(asked, ReportRequest) and isinstance(asked.counts, Absent):
                reason = Absent(_called(asked.counts.reason, path, name))
                upload = replace(upload, request=replace(asked, counts=reason))
            return replace(upload, warnings=[_called(warning, path, name) for warning in upload.warnings])
    except PerturbScopeError as error:
        # The caller knows its file, not where it lies here.
        error.message = _called(error.message, path, name)
        error.args = (error.message,)
        raise


def _called(text: str, path: Path, name: str) -> str:
    """Call the file by the name that its sender knows, in place of where it lies here."""
    return text.replace(str(path), name or path.name).replace(path.name, name or path.name)


def _asked(route: str, source: CellSource, parameters: Mapping[str, str], settings: Settings) -> Upload:
    operation = SCORE if route == "report" else OPERATIONS[route]
    if parameters.get(REPRESENTATION):
        check_vectors(settings, source.n_cells)
    read = partial(_read_cells, settings=settings)
    request, rows, warnings = request_of(operation, source, parameters, read=read)
    if route == "report":
        title = parameters.get("title") or TITLE
        request = ReportRequest(score=request, title=title)
        if parameters.get(REPRESENTATION):
            request = ReportRequest(score=request.score, title=title, counts=_counts(source, rows, settings))
    embedded = operation.takes.of("labels") and not parameters.get(REPRESENTATION)
    file = Fingerprint.of(source) if embedded else None
    if parameters.get(REPRESENTATION) and route != "report":
        return Upload(request, warnings, file)  # no counts were read
    return Upload(request, [*source.warnings, *warnings], file, source.features.left_out, source.round_counts)


def _counts(source: CellSource, rows: NDArray[np.intp], settings: Settings) -> CountMatrix | Absent:
    """Read the raw counts beside an embedding of the file; if there are none, the page gives the reason."""
    try:
        return _read_cells(source, settings)[rows]
    except (InvalidInputError, LimitExceededError) as error:
        return Absent(f"The file has no raw counts that could be tested gene by gene: {error.message}")


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
