"""Readers turn any common single-cell file into chunks of validated raw counts; they import :mod:`perturbscope.cells`.

================================  ==============================================================
file                              how it is read
================================  ==============================================================
``.h5ad``                         streamed from disk; X, a layer or raw; dense, CSR or CSC
10x Cell Ranger ``.h5``           streamed from disk; versions 2 and later
10x directory with matrix.mtx     into memory; plain or gzipped, features.tsv or genes.tsv
zarr directory of an AnnData      streamed from disk, if the zarr package is installed
MuData, .h5mu or zarr             the modality of genes, streamed as an .h5ad
AnnData or MuData in memory       read and never changed
================================  ==============================================================
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import tenx
from perturbscope.cells.readers.annotated import AnnotatedSource
from perturbscope.cells.readers.memory import AnnDataSource
from perturbscope.cells.readers.source import CHUNK_CELLS, CellSource
from perturbscope.cells.readers.store import has, is_zarr, open_zarr, reading
from perturbscope.errors import InvalidParameterError, UnreadableFileError

__all__ = ["CHUNK_CELLS", "CellSource", "as_counts", "cells_from_anndata", "open_cells"]

_log = logging.getLogger("perturbscope")
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def open_cells(
    path: str | Path,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    total_counts_key: str | None = None,
    round_counts: bool = False,
    chunk_cells: int = CHUNK_CELLS,
    max_cells: int | None = None,
) -> CellSource:
    """Open a file of raw counts; nothing of its matrix is read yet.

    Features that are no genes by their type (a column of var such as ``feature_types``) are left out; the source's
    ``features`` and ``warnings`` say which.

    Parameters
    ----------
    path
        File or directory; its format is found by looking inside.
    layer
        Place of the raw counts: ``X`` (default), the name of a layer, or ``raw``.
    gene_key
        Column of var with the gene identifiers; the index by default. For 10x files ``gene_ids`` (default) or
        ``gene_symbols``.
    total_counts_key
        Column of obs with each cell's total counts over all measured genes, if the file holds only some of them.
    round_counts
        Round estimated counts (alevin, RSEM, STARsolo with EM, CellBender) to whole numbers; normalised values are
        refused all the same.
    chunk_cells
        Cells that are in memory at a time.
    max_cells
        Refuse a larger file before reading it.

    Raises
    ------
    UnreadableFileError
        The file is missing, empty, truncated or damaged, or no reader knows its format.
    MissingColumnError
        There is no such layer or column; the message names those that exist, and the closest.
    MalformedMatrixError
        The parts of the file contradict each other.
    LimitExceededError
        The file has more than `max_cells` cells.
    """
    path = Path(path)
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist.", field="file")
    options: dict[str, Any] = {
        "gene_key": gene_key,
        "total_counts_key": total_counts_key,
        "round_counts": round_counts,
        "chunk_cells": chunk_cells,
        "max_cells": max_cells,
    }
    start = b""
    if not path.is_dir():
        with reading(path), path.open("rb") as file:
            start = file.read(len(_HDF5_MAGIC))
        if start not in (b"", _HDF5_MAGIC) and _is_hdf5(path):
            start = _HDF5_MAGIC
    elif is_zarr(path):
        with reading(path):
            return AnnotatedSource(open_zarr(path), path, layer=layer, **options)
    if start == _HDF5_MAGIC:
        return _open_hdf5(path, layer, options)
    matrix = tenx.mtx_file(path)
    if matrix is not None:
        _no_layer(layer, path)
        return tenx.from_mtx(matrix, **options)
    if path.is_dir():
        what = f"is a directory without matrix.mtx[.gz] and is not a zarr store{tenx.below(path)}"
    else:
        what = "is not an HDF5 file" if start else "is empty"
    raise UnreadableFileError(
        f"{path} {what}. Give an .h5ad file, a 10x .h5 file, a 10x directory or a zarr store.", field="file"
    )


def cells_from_anndata(
    adata: Any,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    total_counts_key: str | None = None,
    round_counts: bool = False,
) -> CountMatrix:
    """Return the raw counts of an AnnData or MuData object, which is not changed.

    Parameters and errors are those of :func:`open_cells`. What was left out or rounded is logged.
    """
    source = AnnDataSource(
        adata, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key, round_counts=round_counts
    )
    for warning in source.warnings:
        _log.warning(warning)
    return source.read()


def as_counts(cells: Any) -> CountMatrix:
    """Return a CountMatrix as it is, and the raw counts of an AnnData or MuData object.

    Raises
    ------
    InvalidParameterError
        It is neither.
    InvalidInputError
        As :func:`cells_from_anndata`.
    """
    if isinstance(cells, CountMatrix):
        return cells
    if hasattr(cells, "obs") and hasattr(cells, "var") and not isinstance(cells, CellSource):
        return cells_from_anndata(cells)
    raise InvalidParameterError(
        f"cells is a {type(cells).__name__}; a CountMatrix or an AnnData object is needed. A file is read by "
        "perturbscope.open_cells(path).read(), or embedded by perturbscope.load(URL).embed(path).",
        field="cells",
    )


def _is_hdf5(path: Path) -> bool:
    """Return whether a file is HDF5, also behind a user block, which MuData begins with."""
    import h5py

    with reading(path):
        return bool(h5py.is_hdf5(path))


def _open_hdf5(path: Path, layer: str | None, options: dict[str, Any]) -> CellSource:
    import h5py

    with ExitStack() as on_error, reading(path):
        root = on_error.enter_context(h5py.File(path, "r"))
        source = _recognise(root, path, layer, options)
        on_error.pop_all()
        return source


def _recognise(root: Any, path: Path, layer: str | None, options: dict[str, Any]) -> CellSource:
    if has(root, "mod") or (has(root, "obs") and has(root, "var")):
        return AnnotatedSource(root, path, layer=layer, **options)
    group = tenx.matrix_group(root)
    if group is not None:
        _no_layer(layer, path)
        return tenx.from_h5(root, group, path, **options)
    inside = ", ".join(sorted(root)[:8]) or "nothing"
    raise UnreadableFileError(
        f"{path} is an HDF5 file, but neither .h5ad (obs, var and X) nor 10x (matrix); it has {inside}.",
        field="file",
    )


def _no_layer(layer: str | None, path: Path) -> None:
    if layer not in (None, "X"):
        raise UnreadableFileError(f"{path} is a 10x file and has no layers; leave layer out.", field="layer")
