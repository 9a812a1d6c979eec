"""Files of 10x Genomics: Cell Ranger's .h5, and directories with matrix.mtx."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.readers.features import Features, features_of_types
from perturbscope.cells.readers.matrices import CsrRows, Rows
from perturbscope.cells.readers.source import CHUNK_CELLS, CellSource, check_limit, missing_column, name_genes
from perturbscope.cells.readers.store import StoredArray, child, children, has, is_group, reading, values
from perturbscope.errors import MalformedMatrixError, UnreadableFileError

if TYPE_CHECKING:
    import pandas as pd

_MATRIX = ("matrix.mtx", "matrix.mtx.gz")
_ANY_MATRIX = (".mtx", ".mtx.gz")
"""Endings of matrices that other programs call otherwise (``UniqueAndMult-EM.mtx``, ``cells_x_genes.mtx``)."""
_BARCODES = ("barcodes.tsv", "barcodes.txt", "quants_mat_rows.txt")
_FEATURES = ("features.tsv", "genes.tsv", "features.txt", "genes.txt", "quants_mat_cols.txt")
"""Endings of the tables beside a matrix: of Cell Ranger and STARsolo, kallisto, and alevin-fry."""
_SAMPLE = re.compile(r"GSM\d+")
_HEADERS = {"barcode", "barcodes", "x", "cell", "cell_id", "v1", "gene_id", "gene_ids", "gene", "geneid", "id"}
"""First words of tables that begin with a header, which Cell Ranger does not write."""
_SHOWN = 8
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
        kinds: NDArray[Any] | None = None,
        round_counts: bool = False,
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
        if kinds is not None and len(kinds) != matrix.shape[1]:
            raise MalformedMatrixError(
                f"{path}: {matrix.shape[1]} features, but {len(kinds)} feature types.", field="gene_ids"
            )
        features = Features() if kinds is None else features_of_types(kinds, where=str(path))
        super().__init__(
            matrix,
            name_genes(identifiers),
            path=path,
            chunk_cells=chunk_cells,
            root=root,
            features=features,
            round_counts=round_counts,
        )
        named = name_genes(symbols)
        self.gene_symbols = named if features.keep is None else named[features.keep]
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
    round_counts: bool,
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
    if not len(ids) == len(symbols) == n_genes:
        raise MalformedMatrixError(
            f"{path}: the matrix has {n_genes} genes, but {len(ids)} identifiers and {len(symbols)} symbols.",
            field="gene_ids",
        )
    data, indices, indptr = (StoredArray(child(group, name)) for name in ("data", "indices", "indptr"))
    return TenxSource(
        CsrRows(data, indices, indptr, (n_cells, n_genes)),
        values(child(group, "barcodes")).astype(np.str_),
        ids,
        symbols,
        path=path,
        gene_key=gene_key,
        total_counts_key=total_counts_key,
        kinds=kinds,
        round_counts=round_counts,
        chunk_cells=chunk_cells,
        root=root,
    )


def mtx_file(path: Path) -> Path | None:
    """Return the matrix of a 10x directory, or `path` if it is such a matrix; otherwise None.

    Raises
    ------
    UnreadableFileError
        The directory holds the matrices of several samples.
    """
    if not path.is_dir():
        return path if path.name.endswith(_ANY_MATRIX) else None
    plain = next((path / name for name in _MATRIX if (path / name).is_file()), None)
    if plain is not None:
        return plain
    found = _matrices(path)
    if len({item.name.removesuffix(".gz") for item in found}) > 1:
        raise UnreadableFileError(
            f"{path} holds the matrices of several samples: {', '.join(item.name for item in found[:_SHOWN])}"
            f"{', ...' if len(found) > _SHOWN else ''}. Give the path of one of them; the tables with the same prefix "
            "are read with it.",
            field="file",
        )
    return found[0] if found else None


def below(path: Path) -> str:
    """Return a hint to the 10x directories in a directory that is none; empty if there are none."""
    try:
        found = sorted(item.name for item in path.iterdir() if item.is_dir() and _matrices(item))
    except OSError:
        return ""
    return f", but its folders {', '.join(found[:_SHOWN])} are 10x directories: give one of these" if found else ""


def from_mtx(
    matrix: Path,
    *,
    gene_key: str | None,
    total_counts_key: str | None,
    round_counts: bool,
    chunk_cells: int,
    max_cells: int | None,
) -> TenxSource:
    """Read matrix.mtx with barcodes.tsv and features.tsv or genes.tsv beside it, each plain or gzipped.

    The rows of a text matrix cannot be read one by one, so it is read into memory. Names may have a prefix
    (``GSM1_matrix.mtx.gz``); a table with the matrix's own prefix comes before one that samples share. A matrix of
    cells x genes, as kallisto writes it, is known by the lengths of the tables.
    """
    from scipy import io as scipy_io
    from scipy import sparse

    barcodes, genes = _Table(matrix, _BARCODES), _Table(matrix, _FEATURES)
    with reading(matrix):
        n_genes, n_cells = (int(size) for size in scipy_io.mminfo(matrix)[:2])
        is_turned = not genes.has(n_genes) and genes.has(n_cells) and barcodes.has(n_genes)
        if is_turned:
            n_genes, n_cells = n_cells, n_genes
        check_limit(n_cells, max_cells, matrix)
        if not genes.has(n_genes):
            raise MalformedMatrixError(
                f"{matrix} has {n_genes} rows, but there are {len(genes)} genes in {genes.path.name} beside it.",
                field="gene_ids",
            )
        counts = scipy_io.mmread(matrix)
        csr = sparse.csr_matrix(counts if is_turned else counts.T)
    rows = genes.rows(n_genes)
    kinds = np.array([row[2] for row in rows], dtype=object) if all(len(row) > 2 for row in rows) else None
    return TenxSource(
        CsrRows(csr.data, csr.indices, csr.indptr, (n_cells, n_genes)),
        np.array([row[0] for row in barcodes.rows(n_cells)], dtype=np.str_),
        np.array([row[0] for row in rows], dtype=object),
        np.array([row[1] if len(row) > 1 else row[0] for row in rows], dtype=object),
        path=matrix,
        gene_key=gene_key,
        total_counts_key=total_counts_key,
        kinds=kinds,
        round_counts=round_counts,
        chunk_cells=chunk_cells,
    )


def _matrices(folder: Path) -> list[Path]:
    """Return the matrices in a folder, those with the usual name if there are any, in the order of their names."""
    found = sorted(item for item in folder.iterdir() if item.name.endswith(_ANY_MATRIX) and item.is_file())
    return [item for item in found if item.name.endswith(_MATRIX)] or found


class _Table:
    """A table beside a matrix, as the rows that its lines can be read as.

    R and spreadsheets put texts in quotes; Cell Ranger does not, and the name of an antibody may hold a quote, which
    then swallows the lines up to the next. Of the two readings, the one with as many rows as the matrix is meant.

    Parameters
    ----------
    matrix
        The matrix. A table with the beginning of its name comes before the only one in the folder.
    names
        Endings of the table's name, the likeliest first.

    Raises
    ------
    UnreadableFileError
        There is no such table, or it is not text.
    """

    def __init__(self, matrix: Path, names: Sequence[str]) -> None:
        folder = matrix.parent
        prefix = next((matrix.name.removesuffix(name) for name in _MATRIX[::-1] if matrix.name.endswith(name)), "")
        endings = [f"{name}{end}" for name in names for end in ("", ".gz")]
        own = [folder / f"{prefix}{ending}" for ending in endings]
        # The only table is that of all samples, unless it is by its accession that of another.
        sample = _SAMPLE.match(matrix.name)
        shared = [
            item
            for item in sorted(folder.iterdir())
            if item.name.endswith(tuple(endings))
            and ((other := _SAMPLE.match(item.name)) is None or (sample and sample.group() == other.group()))
        ]
        path = next((item for item in own if item.is_file()), shared[0] if len(shared) == 1 else None)
        if path is None:
            raise UnreadableFileError(
                f"{folder} has no {' or '.join(f'{prefix}{name}[.gz]' for name in names[:2])} beside {matrix.name}.",
                field="file",
            )
        self.path = path
        opener = gzip.open if path.suffix == ".gz" else open
        with reading(path), opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            text = file.read()
        with reading(path):
            literal = [line.split("\t") for line in text.splitlines() if line]
            self._readings = [literal]
            if '"' in text:
                # Whole lines in quotes leave the tabs inside of one field.
                quoted = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t") if row]
                quoted = [row[0].split("\t") if len(row) == 1 else row for row in quoted]
                self._readings.insert(0, quoted)

    def __len__(self) -> int:
        return len(self._readings[0])

    def has(self, n: int) -> bool:
        """Return whether the table can be read as `n` rows."""
        return any(len(rows) == n for rows in self._all())

    def rows(self, n: int) -> list[list[str]]:
        """Return the `n` rows; the likeliest reading if it cannot be read as so many."""
        return next((rows for rows in self._all() if len(rows) == n), self._readings[0])

    def _all(self) -> list[list[list[str]]]:
        """Return all readings, also without a header."""
        headless = [rows[1:] for rows in self._readings if rows and rows[0][0].strip('"').casefold() in _HEADERS]
        return [*self._readings, *headless]
