"""Raw counts of cells: the only form in which expression enters the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.genes import CHECKED
from perturbscope.errors import (
    DuplicateGenesError,
    EmptyCellError,
    MalformedMatrixError,
    NotRawCountsError,
)
from perturbscope.threads import checkpoint

INTEGRAL_TOLERANCE = 1e-6
"""A float count this close to an integer is read as that integer."""
MAX_COUNT = 2**31 - 1
RAW_REMEDY = "Give the raw counts: a layer (e.g. layer='counts'), adata.raw, or the matrix before normalisation."
"""End of the message about values that are no raw counts; a reader that knows of a layer with counts names that."""
ROUND_REMEDY = (
    "round_counts rounds them: round_counts=True, --round-counts on the command line, round_counts=true beside an "
    "uploaded file."
)


@dataclass(frozen=True)
class CountMatrix:
    """Raw counts of cells x genes, validated.

    Build it with :meth:`from_csr` or :meth:`from_matrix`, or with a reader of
    :mod:`perturbscope.cells.readers`; they make the checks that the constructor skips.

    Attributes
    ----------
    counts
        CSR matrix, int32, [n_cells, n_genes]; no stored zeros, indices sorted.
    gene_ids
        Identifier of each column as the caller gave it, Ensembl id or symbol; read-only.
    totals
        Total counts of each cell over ALL measured genes, before any gene is dropped, float64 [n_cells]; the size
        factor of count normalisation.
    first_row
        Number of the first row in the caller's file; used in messages only.
    """

    counts: sparse.csr_matrix
    gene_ids: NDArray[np.str_]
    totals: NDArray[np.float64]
    first_row: int = 0

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def __getitem__(self, rows: slice | NDArray[Any] | Sequence[int]) -> CountMatrix:
        """Return some cells in the given order; a run of rows keeps its numbers, any other selection starts at 0."""
        first_row = 0
        if isinstance(rows, slice) and rows.step in (None, 1):
            first_row = self.first_row + rows.indices(len(self))[0]
        return replace(self, counts=self.counts[rows], totals=self.totals[rows], first_row=first_row)

    @property
    def n_genes(self) -> int:
        """Number of columns."""
        return int(self.counts.shape[1])

    @classmethod
    def from_matrix(
        cls,
        matrix: Any,
        gene_ids: Sequence[str] | NDArray[Any],
        *,
        totals: Sequence[float] | NDArray[Any] | None = None,
        first_row: int = 0,
        round_counts: bool = False,
    ) -> CountMatrix:
        """Build counts from a dense array or any scipy sparse matrix, after checking them.

        Parameters
        ----------
        matrix
            Array of cells x genes, which is not changed.
        gene_ids
            Identifier of each column.
        totals
            Total counts of each cell over all measured genes, if `matrix` has only some of them.
        first_row
            Number of the first row in the caller's file; used in messages only.
        round_counts
            Round estimated counts, as alevin, RSEM, STARsolo with EM and CellBender give them, to whole numbers (a half
            to the nearest even one).

        Raises
        ------
        MalformedMatrixError
            The matrix is not two-dimensional or not numeric, or sizes disagree.
        NotRawCountsError
            A value is negative, fractional, NaN or infinite; the message names cell and gene. With `round_counts`: a
            value is fractional and the matrix looks normalised or log-transformed.
        DuplicateGenesError
            One identifier names two columns.
        EmptyCellError
            A cell has no counts.
        """
        if not sparse.issparse(matrix):
            array = np.asarray(matrix)
            if array.ndim != 2:
                raise MalformedMatrixError(
                    f"Counts have {array.ndim} dimension(s); two are needed, cells x genes.",
                    field="counts",
                )
            _require_numeric(array.dtype)
            matrix = sparse.csr_matrix(native(array))
        _require_numeric(matrix.dtype)
        csr = native(matrix).tocsr(copy=False)
        if not isinstance(csr, sparse.csr_matrix):
            csr = sparse.csr_matrix(csr)
        if csr.shape[1] != len(gene_ids):
            raise MalformedMatrixError(
                f"The matrix has {csr.shape[1]} columns, but there are {len(gene_ids)} gene identifiers; "
                "one a column is needed.",
                field="gene_ids",
            )
        return cls.from_csr(
            csr.data,
            csr.indices,
            csr.indptr,
            gene_ids,
            totals=totals,
            first_row=first_row,
            round_counts=round_counts,
        )

    @classmethod
    def from_csr(
        cls,
        data: NDArray[Any],
        indices: NDArray[Any],
        indptr: NDArray[Any],
        gene_ids: Sequence[str] | NDArray[Any],
        *,
        totals: Sequence[float] | NDArray[Any] | None = None,
        first_row: int = 0,
        round_counts: bool = False,
    ) -> CountMatrix:
        """Build counts from the arrays of a CSR matrix, after checking them. See :meth:`from_matrix`."""
        data, indices, indptr = np.asarray(data), np.asarray(indices), np.asarray(indptr)
        genes = _check_gene_ids(gene_ids)
        checkpoint()
        _check_structure(data, indices, indptr, n_genes=len(genes))
        values = _integral(data, indices, indptr, genes, first_row, round_counts)
        n_cells = len(indptr) - 1
        if n_cells == 0:
            raise MalformedMatrixError("The matrix has no cells.", field="counts")
        csr = sparse.csr_matrix(
            (values, indices.astype(np.int32, copy=False), indptr.astype(np.int64, copy=False)),
            shape=(n_cells, len(genes)),
        )
        if values is data:
            csr.data = values.copy()
        checkpoint()
        csr = _canonical(csr, first_row)
        row_sums = np.asarray(csr.sum(axis=1, dtype=np.float64)).ravel()
        empty = np.flatnonzero(row_sums == 0)
        if len(empty):
            raise EmptyCellError(
                f"{len(empty)} of {n_cells} cells have no counts (first: row {first_row + int(empty[0])}). "
                "Remove empty cells, e.g. scanpy.pp.filter_cells(adata, min_counts=1).",
                field="counts",
            )
        return cls(csr, genes, _check_totals(totals, row_sums, first_row), first_row)


def native(values: Any) -> Any:
    """Return an array or sparse matrix of numbers in a type that scipy computes with: no half floats, no swapped bytes.

    Every half float is a float32, so no value changes.
    """
    if values.dtype.kind == "f" and values.dtype.itemsize == 2:
        return values.astype(np.float32)
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _require_numeric(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "iufb":
        raise MalformedMatrixError(f"Counts have dtype {dtype}; integers or floats are needed.", field="counts")


def _check_gene_ids(gene_ids: Sequence[str] | NDArray[Any]) -> NDArray[np.str_]:
    if isinstance(gene_ids, np.ndarray) and CHECKED.get(gene_ids):
        return gene_ids
    identifiers = np.asarray(gene_ids)
    if identifiers.ndim != 1 or (identifiers.dtype.kind not in "UO" and identifiers.size):
        raise MalformedMatrixError(
            f"Gene identifiers must be a list of strings; got dtype {identifiers.dtype} with {identifiers.ndim} "
            "dimension(s).",
            field="gene_ids",
        )
    checkpoint()
    genes = identifiers.astype(np.str_) if identifiers.size else np.zeros(0, dtype="U1")
    names, n_columns = np.unique(genes, return_counts=True)
    if len(names) < len(genes):
        repeated = names[n_columns > 1]
        raise DuplicateGenesError(
            f"{len(repeated)} gene identifier(s) name more than one column (first: {str(repeated[0])!r}). Name a "
            "column of var with an Ensembl id for each (gene_key, on the command line --gene-key). Where "
            "there is none, add up the counts of the columns that share a name.",
            field="gene_ids",
        )
    genes.setflags(write=False)
    CHECKED.put(genes, True)
    return genes


def _check_structure(data: NDArray[Any], indices: NDArray[Any], indptr: NDArray[Any], *, n_genes: int) -> None:
    for name, array in (("data", data), ("indices", indices), ("indptr", indptr)):
        if array.ndim != 1:
            raise MalformedMatrixError(f"CSR {name} has {array.ndim} dimensions; one is needed.", field=name)
    _require_numeric(data.dtype)
    for name, array in (("indices", indices), ("indptr", indptr)):
        if array.dtype.kind not in "iu" and array.size:
            raise MalformedMatrixError(f"CSR {name} has dtype {array.dtype}; integers are needed.", field=name)
    if len(indptr) < 1 or indptr[0] != 0:
        raise MalformedMatrixError("CSR indptr must start with 0.", field="indptr")
    # Compared, not subtracted: a difference of large numbers can wrap around and look like growth.
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if len(falls):
        raise MalformedMatrixError(f"CSR indptr decreases at row {int(falls[0])}.", field="indptr")
    if not len(data) == len(indices) == indptr[-1]:
        raise MalformedMatrixError(
            f"CSR arrays disagree: {len(data)} values, {len(indices)} column indices, "
            f"and indptr ends at {indptr[-1]}. The three must be equal.",
            field="indptr",
        )
    if len(indices) and (indices.min() < 0 or indices.max() >= n_genes):
        worst = int(indices.max()) if indices.max() >= n_genes else int(indices.min())
        raise MalformedMatrixError(
            f"CSR column index {worst} lies outside the {n_genes} gene identifiers.",
            field="indices",
        )


def _integral(
    data: NDArray[Any],
    indices: NDArray[Any],
    indptr: NDArray[Any],
    genes: NDArray[np.str_],
    first_row: int,
    round_counts: bool,
) -> NDArray[np.int32]:
    """Return the values as int32; the error names the first bad value and guesses the reason."""
    if data.dtype.kind == "f":
        finite = np.isfinite(data)
        with np.errstate(invalid="ignore"):
            rounded = np.rint(data)
            fractional = np.abs(data - rounded) > INTEGRAL_TOLERANCE
            bad = ~finite | (data < 0) | fractional
            if round_counts and bad.any() and (finite & (data >= 0)).all():
                bad &= not _may_be_rounded(data, indptr)
    else:
        rounded = data
        bad = data < 0 if data.dtype.kind == "i" else np.zeros(len(data), dtype=bool)
    # As float64: MAX_COUNT as float32 is 2^31, which int32 cannot hold, and as float16 it is infinite.
    bad |= rounded > (np.float64(MAX_COUNT) if data.dtype.kind == "f" else MAX_COUNT)
    if not bad.any():
        counts: NDArray[np.int32] = rounded.astype(np.int32, copy=False)
        return counts
    at = int(np.flatnonzero(bad)[0])
    row = int(np.searchsorted(indptr, at, side="right")) - 1
    value = data[at]
    remedy = RAW_REMEDY
    if not np.isfinite(value):
        why = "is not a finite number"
    elif value < 0:
        why = "is negative; the data look scaled or centred"
    elif float(value) > MAX_COUNT:
        why = f"is larger than {MAX_COUNT}"
    else:
        from perturbscope.cells.scales import scale_of

        scale = scale_of(np.where(np.isfinite(data) & (data > 0), data, 0), indptr)
        why = "is fractional"
        if scale.what is not None:
            why += f"; the data look {scale.what}"
            why += ", and must not be rounded" if round_counts else ""
        if scale.is_estimated or scale.what is None:
            remedy = (
                f"If these are estimated counts (of alevin, RSEM, CellBender, STARsolo), {ROUND_REMEDY} {RAW_REMEDY}"
            )
    raise NotRawCountsError(
        f"Raw counts are needed, but the value {float(value):g} of gene {str(genes[indices[at]])!r} in row "
        f"{first_row + row} {why} ({int(bad.sum())} such values). {remedy}",
        field="counts",
    )


def _may_be_rounded(data: NDArray[Any], indptr: NDArray[Any]) -> bool:
    """Return whether fractional values may be estimated counts, as their caller says."""
    from perturbscope.cells.scales import scale_of

    scale = scale_of(data, indptr)
    return scale.is_estimated or scale.what is None


def _canonical(csr: sparse.csr_matrix, first_row: int) -> sparse.csr_matrix:
    """Return counts with sorted indices and no entry repeated or zero; the same matrix if it is so already."""
    if not csr.has_canonical_format:
        csr = csr.astype(np.int64)
        csr.sum_duplicates()
        if csr.nnz and csr.data.max() > MAX_COUNT:
            row = int(np.searchsorted(csr.indptr, int(csr.data.argmax()), side="right")) - 1
            raise NotRawCountsError(
                f"Repeated entries of row {first_row + row} add up to more than {MAX_COUNT}. Give the raw counts.",
                field="counts",
            )
        csr = csr.astype(np.int32)
    if csr.nnz and csr.data.min() == 0:
        csr = csr.copy()
        csr.eliminate_zeros()
    return csr


def _check_totals(
    totals: Sequence[float] | NDArray[Any] | None, row_sums: NDArray[np.float64], first_row: int
) -> NDArray[np.float64]:
    if totals is None:
        return row_sums
    values = np.asarray(totals)
    if values.shape != row_sums.shape or values.dtype.kind not in "iuf":
        raise MalformedMatrixError(
            f"Total counts have shape {values.shape} and dtype {values.dtype}; "
            f"{len(row_sums)} numbers are needed, one a cell.",
            field="total_counts",
        )
    values = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values) | (values < row_sums * (1 - 1e-6)))
    if len(bad):
        row = int(bad[0])
        raise MalformedMatrixError(
            f"Total counts of row {first_row + row} are {values[row]:g}, but its genes sum to {row_sums[row]:g}; "
            "the total runs over all measured genes, so it cannot be smaller.",
            field="total_counts",
        )
    return values
