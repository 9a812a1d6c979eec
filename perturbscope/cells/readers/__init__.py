"""Readers turn any common single-cell file into chunks of validated raw counts; they import :mod:`perturbscope.cells`.

================================  ==============================================================
file                              how it is read
================================  ==============================================================
``.h5ad``                         streamed from disk; X, a layer or raw; dense, CSR or CSC
10x Cell Ranger ``.h5``           streamed from disk; versions 2 and later
10x directory with matrix.mtx     into memory; plain or gzipped, features.tsv or genes.tsv
zarr directory of an AnnData      streamed from disk, if the zarr package is installed
AnnData in memory                 read and never changed
================================  ==============================================================
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import tenx
from perturbscope.cells.readers.annotated import AnnotatedSource
from perturbscope.cells.readers.memory import AnnDataSource
from perturbscope.cells.readers.source import CHUNK_CELLS, CellSource
from perturbscope.cells.readers.store import has, is_zarr, open_zarr, reading
from perturbscope.errors import UnreadableFileError

__all__ = ["CHUNK_CELLS", "CellSource", "cells_from_anndata", "open_cells"]

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def open_cells(
    path: str | Path,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    total_counts_key: str | None = None,
    chunk_cells: int = CHUNK_CELLS,
    max_cells: int | None = None,
) -> CellSource:
    """Open a file of raw counts; nothing of its matrix is read yet.

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
        "chunk_cells": chunk_cells,
        "max_cells": max_cells,
    }
    start = b""
    if not path.is_dir():
        with reading(path), path.open("rb") as file:
            start = file.read(len(_HDF5_MAGIC))
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
        what = "is a directory without matrix.mtx[.gz] and is not a zarr store"
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
) -> CountMatrix:
    """Return the raw counts of an AnnData object, which is not changed. Parameters and errors as :func:`open_cells`."""
    return AnnDataSource(adata, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key).read()


def _open_hdf5(path: Path, layer: str | None, options: dict[str, Any]) -> CellSource:
    import h5py

    with ExitStack() as on_error, reading(path):
        root = on_error.enter_context(h5py.File(path, "r"))
        source = _recognise(root, path, layer, options)
        on_error.pop_all()
        return source


def _recognise(root: Any, path: Path, layer: str | None, options: dict[str, Any]) -> CellSource:
    if has(root, "obs") and has(root, "var"):
        return AnnotatedSource(root, path, layer=layer, **options)
    group = tenx.matrix_group(root)
    if group is not None:
        _no_layer(layer, path)
        return tenx.from_h5(root, group, path, **options)
    inside = ", ".join(sorted(root)[:8]) or "nothing"
    hint = " It looks like a MuData file: save its RNA modality as .h5ad." if has(root, "mod") else ""
    raise UnreadableFileError(
        f"{path} is an HDF5 file, but neither .h5ad (obs, var and X) nor 10x (matrix); it has {inside}.{hint}",
        field="file",
    )


def _no_layer(layer: str | None, path: Path) -> None:
    if layer not in (None, "X"):
        raise UnreadableFileError(f"{path} is a 10x file and has no layers; leave layer out.", field="layer")
