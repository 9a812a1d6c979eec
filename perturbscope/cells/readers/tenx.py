"""Files of 10x Genomics: Cell Ranger's .h5, and directories with matrix.mtx."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.readers.matrices import CsrRows, Rows
from perturbscope.cells.readers.source import CHUNK_CELLS, CellSource, check_limit, missing_column, name_genes
from perturbscope.cells.readers.store import StoredArray, child, children, has, is_group, reading, values
from perturbscope.errors import MalformedMatrixError, UnreadableFileError

if TYPE_CHECKING:
    import pandas as pd

_EXPRESSION = "Gene Expression"
_GENE_COLUMNS = {"gene_ids": "gene_ids", "id": "gene_ids", "gene_symbols": "gene_symbols", "name": "gene_symbols"}
"""Values of `gene_key`: scanpy's and Cell Ranger's names of the two columns."""


class TenxSource(CellSource):
    """The cells of a 10x file, which have barcodes and no labels.

    Antibodies, guides and other features that are not gene expression are left out.

    Attributes
    ----------
    gene_symbols
        Symbol of each gene, beside `gene_ids`.
    """

    def __init__(
        self,
        matrix: Rows,
        barcodes: NDArray[np.str_],
        ids: NDArray[Any],
        symbols: NDArray[Any],
        *,
        path: Path,
        gene_key: str | None,
        total_counts_key: str | None,
        chunk_cells: int = CHUNK_CELLS,
        root: Any = None,
    ) -> None:
        if total_counts_key is not None:
            raise missing_column("column of obs", total_counts_key, [], field="total_counts_key")
        if gene_key is not None and gene_key not in _GENE_COLUMNS:
            raise missing_column("column of genes", gene_key, list(_GENE_COLUMNS), field="gene_key")
        if len(barcodes) != matrix.shape[0]:
            raise MalformedMatrixError(
                f"{path}: the matrix has {matrix.shape[0]} cells, but there are {len(barcodes)} barcodes.",
                field="counts",
            )
        identifiers = symbols if _GENE_COLUMNS.get(gene_key or "id") == "gene_symbols" else ids
        super().__init__(matrix, name_genes(identifiers), path=path, chunk_cells=chunk_cells, root=root)
        self.gene_symbols = name_genes(symbols)
        self._barcodes = barcodes

    @property
    def cell_ids(self) -> NDArray[np.str_]:
        """Barcode of each cell, [n_cells]."""
        return self._barcodes

    @property
    def columns(self) -> list[str]:
        """An empty list: 10x files carry no labels."""
        return []

    @property
    def representations(self) -> list[str]:
        """An empty list: 10x files carry no matrices beside the counts."""
        return []

    def _column(self, name: str) -> pd.Series[Any]:
        raise missing_column("column of obs", name, [], field="obs")

    def _representation(self, name: str) -> NDArray[Any]:
        raise missing_column("matrix in obsm", name, [], field="use_rep")

    def rows(self, start: int, stop: int) -> Any:
        """See :meth:`CellSource.rows`."""
        with reading(str(self.path)):
            return super().rows(start, stop)


def matrix_group(root: Any) -> Any | None:
    """Return Cell Ranger's group in an HDF5 file, or None: ``matrix`` since version 3, one group a genome before.

    Raises
    ------
    UnreadableFileError
        The file holds several genomes.
    """
    needed = {"barcodes", "data", "indices", "indptr", "shape"}
    groups = [name for name in children(root) if has(root, name) and is_group(child(root, name))]
    found = [name for name in groups if needed <= set(children(child(root, name)))]
    if len(found) > 1:
        raise UnreadableFileError(
            f"The file holds several genomes ({', '.join(sorted(found))}); one is needed. "
            "Save the human one on its own.",
            field="file",
        )
    return child(root, found[0]) if found else None


def from_h5(
    root: Any,
    group: Any,
    path: Path,
    *,
    gene_key: str | None,
    total_counts_key: str | None,
    chunk_cells: int,
    max_cells: int | None,
) -> TenxSource:
    """Open Cell Ranger's .h5; the counts stay on disk, since genes x cells in CSC is cells x genes in CSR."""
    n_genes, n_cells = (int(size) for size in values(child(group, "shape")))
    check_limit(n_cells, max_cells, path)
    if has(group, "features"):
        features = child(group, "features")
        ids, symbols = values(child(features, "id")), values(child(features, "name"))
        kinds = values(child(features, "feature_type")) if has(features, "feature_type") else None
    else:
        ids, symbols, kinds = values(child(group, "genes")), values(child(group, "gene_names")), None
    keep = _expression(kinds, n_genes, path)
    if not len(ids) == len(symbols) == n_genes:
        raise MalformedMatrixError(
            f"{path}: the matrix has {n_genes} genes, but {len(ids)} identifiers and {len(symbols)} symbols.",
            field="gene_ids",
        )
    data, indices, indptr = (StoredArray(child(group, name)) for name in ("data", "indices", "indptr"))
    return TenxSource(
        CsrRows(data, indices, indptr, (n_cells, n_genes), keep=keep),
        values(child(group, "barcodes")).astype(np.str_),
        ids if keep is None else ids[keep],
        symbols if keep is None else symbols[keep],
        path=path,
        gene_key=gene_key,
        total_counts_key=total_counts_key,
        chunk_cells=chunk_cells,
        root=root,
    )


def mtx_file(path: Path) -> Path | None:
    """Return the matrix of a 10x directory, or `path` if it is such a matrix; otherwise None."""
    if path.is_dir():
        return next((path / name for name in ("matrix.mtx", "matrix.mtx.gz") if (path / name).is_file()), None)
    return path if path.name.endswith(("matrix.mtx", "matrix.mtx.gz")) else None


def from_mtx(
    matrix: Path,
    *,
    gene_key: str | None,
    total_counts_key: str | None,
    chunk_cells: int,
    max_cells: int | None,
) -> TenxSource:
    """Read matrix.mtx with barcodes.tsv and features.tsv or genes.tsv beside it, each plain or gzipped.

    The rows of a text matrix cannot be read one by one, so it is read into memory. If its name has a prefix
    (``GSM1_matrix.mtx.gz``), the other files must have it too.
    """
    from scipy import io, sparse

    prefix = matrix.name.split("matrix.mtx")[0]
    barcodes = _table(matrix.parent, prefix, ["barcodes.tsv"])
    genes = _table(matrix.parent, prefix, ["features.tsv", "genes.tsv"])
    with reading(matrix):
        n_genes, n_cells = (int(size) for size in io.mminfo(matrix)[:2])
        check_limit(n_cells, max_cells, matrix)
        if n_genes != len(genes):
            raise MalformedMatrixError(
                f"{matrix} has {n_genes} rows, but there are {len(genes)} genes beside it.", field="gene_ids"
            )
        csr = sparse.csr_matrix(io.mmread(matrix).T)
    kinds = [row[2] for row in genes] if all(len(row) > 2 for row in genes) else None
    keep = _expression(None if kinds is None else np.array(kinds, dtype=object), n_genes, matrix)
    ids = np.array([row[0] for row in genes], dtype=object)
    symbols = np.array([row[1] if len(row) > 1 else row[0] for row in genes], dtype=object)
    return TenxSource(
        CsrRows(csr.data, csr.indices, csr.indptr, (n_cells, n_genes), keep=keep),
        np.array([row[0] for row in barcodes], dtype=np.str_),
        ids if keep is None else ids[keep],
        symbols if keep is None else symbols[keep],
        path=matrix,
        gene_key=gene_key,
        total_counts_key=total_counts_key,
        chunk_cells=chunk_cells,
    )


def _expression(kinds: NDArray[Any] | None, n_genes: int, path: Path) -> NDArray[np.bool_] | None:
    """Return which features are genes, bool [n_genes]; None if all are."""
    if kinds is None:
        return None
    if len(kinds) != n_genes:
        raise MalformedMatrixError(f"{path}: {n_genes} features, but {len(kinds)} feature types.", field="gene_ids")
    keep = np.asarray(kinds == _EXPRESSION, dtype=bool)
    if not keep.any():
        raise MalformedMatrixError(
            f"{path} has no features of type {_EXPRESSION!r} (first: {kinds[0] if len(kinds) else 'none'}).",
            field="gene_ids",
        )
    return None if keep.all() else keep


def _table(folder: Path, prefix: str, names: list[str]) -> list[list[str]]:
    """Read the rows of the first of these files that exists."""
    found = [folder / f"{prefix}{name}{end}" for name in names for end in ("", ".gz")]
    path = next((item for item in found if item.is_file()), None)
    if path is None:
        raise UnreadableFileError(
            f"{folder} has no {' or '.join(f'{prefix}{name}[.gz]' for name in names)} beside the matrix.", field="file"
        )
    opener = gzip.open if path.suffix == ".gz" else open
    with reading(path), opener(path, "rt", encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file, delimiter="\t") if row]
