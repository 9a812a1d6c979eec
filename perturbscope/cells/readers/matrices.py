"""Rows of a cells x genes matrix: dense, CSR or CSC, in memory or in a file."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.counts import native
from perturbscope.errors import MalformedMatrixError, UnreadableFileError

CsrArrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""The arrays data, indices and indptr; indptr starts with 0."""
_DENSE_BYTES = 64 * 2**20
"""Bytes of dense values that are in memory at a time."""
_SPARSE_VALUES = 4 * 2**20
"""Values of a CSC matrix that are in memory at a time."""


class Rows(Protocol):
    """A matrix that gives any run of rows; the receiver checks the values."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of cells and genes."""
        ...

    def rows(self, start: int, stop: int) -> CsrArrays:
        """Return rows `start` to `stop` as CSR arrays."""
        ...


class DenseRows:
    """A dense matrix, in memory or in a file; read in blocks of bounded size."""

    def __init__(self, array: Any) -> None:
        if len(array.shape) != 2:
            raise MalformedMatrixError(
                f"Counts have {len(array.shape)} dimension(s); two are needed, cells x genes.", field="counts"
            )
        require_numeric(array.dtype)
        self._array = array
        self.shape: tuple[int, int] = (int(array.shape[0]), int(array.shape[1]))

    def rows(self, start: int, stop: int) -> CsrArrays:
        """See :class:`Rows`."""
        block = max(1, _DENSE_BYTES // max(1, self.shape[1] * self._array.dtype.itemsize))
        parts = [
            sparse.csr_matrix(native(np.asarray(self._array[at : min(at + block, stop)])))
            for at in range(start, stop, block)
        ]
        csr = parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")
        return csr.data, csr.indices, csr.indptr


class CsrRows:
    """The three arrays of a CSR matrix, in memory or in a file; only `indptr` is held in memory.

    Parameters
    ----------
    data, indices, indptr
        Arrays, or anything that gives arrays when sliced.
    shape
        Numbers of cells and genes.

    Raises
    ------
    MalformedMatrixError
        The arrays contradict each other or the shape.
    """

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> None:
        require_numeric(data.dtype)
        self._indptr = check_indptr(indptr, len(data), len(indices), shape, "row")
        self._data, self._indices = data, indices
        self.shape: tuple[int, int] = (int(shape[0]), int(shape[1]))

    def rows(self, start: int, stop: int) -> CsrArrays:
        """See :class:`Rows`."""
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        data, indices = np.asarray(self._data[first:last]), np.asarray(self._indices[first:last])
        return data, indices, self._indptr[start : stop + 1] - first


class KeptColumns:
    """Some columns of another matrix, in its order.

    Parameters
    ----------
    matrix
        The other matrix.
    keep
        Whether each column is kept, bool [n_columns].
    """

    def __init__(self, matrix: Rows, keep: NDArray[np.bool_]) -> None:
        self._matrix, self._keep = matrix, keep
        self._place = np.cumsum(keep) - 1
        self.shape: tuple[int, int] = (matrix.shape[0], int(keep.sum()))

    def rows(self, start: int, stop: int) -> CsrArrays:
        """See :class:`Rows`."""
        data, indices, indptr = self._matrix.rows(start, stop)
        check_indices(indices, len(self._keep))
        inside = self._keep[indices]
        before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(inside, dtype=np.int64)])
        return data[inside], self._place[indices[inside]], before[indptr]


def from_scipy(matrix: Any) -> Rows:
    """Return the rows of a scipy sparse matrix or array of any format, or of a dense array."""
    if not hasattr(matrix, "tocsr"):
        return DenseRows(np.asarray(matrix))
    require_numeric(matrix.dtype)
    csr = native(matrix).tocsr(copy=False)
    return CsrRows(csr.data, csr.indices, csr.indptr, csr.shape)


def csc_rows(data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> CsrRows:
    """Return the rows of a CSC matrix in a file.

    The matrix is converted to CSR once, in an unnamed temporary file, with two passes over the values and bounded
    memory; reading rows from columns directly would pass over the whole matrix for each chunk.

    Raises
    ------
    MalformedMatrixError
        The arrays contradict each other or the shape.
    """
    require_numeric(data.dtype)
    n_cells, n_genes = shape
    columns = check_indptr(indptr, len(data), len(indices), (n_genes, n_cells), "column")
    n_values = len(data)
    per_row = np.zeros(n_cells, dtype=np.int64)
    for start in range(0, n_values, _SPARSE_VALUES):
        rows = np.asarray(indices[start : start + _SPARSE_VALUES])
        check_indices(rows, n_cells)
        per_row += np.bincount(rows, minlength=n_cells)
    row_start = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(per_row)])
    new_data, new_indices = _scratch(n_values, data.dtype), _scratch(n_values, np.dtype(np.int32))
    free = row_start[:-1].copy()
    for start in range(0, n_values, _SPARSE_VALUES):
        stop = min(start + _SPARSE_VALUES, n_values)
        rows = np.asarray(indices[start:stop]).astype(np.int64)
        column = np.searchsorted(columns, np.arange(start, stop), side="right") - 1
        # Stable: within a row, columns stay ascending.
        order = np.argsort(rows, kind="stable")
        in_order = rows[order]
        firsts = np.flatnonzero(np.diff(in_order, prepend=-1))
        place = free[in_order] + np.arange(len(in_order)) - np.repeat(firsts, np.diff(firsts, append=len(in_order)))
        new_data[place] = np.asarray(data[start:stop])[order]
        new_indices[place] = column[order]
        free += np.bincount(rows, minlength=n_cells)

    return CsrRows(new_data, new_indices, row_start, shape)


def _scratch(length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array in an unnamed temporary file, whose space is freed with the array."""
    if length == 0:
        return np.zeros(0, dtype=dtype)
    with tempfile.TemporaryFile(prefix="perturbscope-") as file:
        try:
            # Space is reserved now: writing to a mapped file on a full disk would kill the process.
            os.posix_fallocate(file.fileno(), 0, length * dtype.itemsize)
        except OSError as error:
            raise UnreadableFileError(
                f"The matrix is stored by columns (CSC); turning it takes {length * dtype.itemsize >> 20} MiB in "
                f"{tempfile.gettempdir()}, which failed: {error.strerror}. Make room, set TMPDIR, or store it as CSR.",
                field="file",
            ) from error
        return np.memmap(file, dtype=dtype, mode="r+", shape=(length,))


def require_numeric(dtype: Any) -> None:
    """Raise :class:`MalformedMatrixError` unless `dtype` is one of numbers or booleans."""
    if getattr(dtype, "kind", "O") not in "iufb":
        raise MalformedMatrixError(f"Counts have dtype {dtype}; integers or floats are needed.", field="counts")


def check_indices(indices: NDArray[Any], bound: int) -> None:
    """Raise :class:`MalformedMatrixError` unless all of `indices` are integers in 0..bound-1."""
    if len(indices) and (indices.dtype.kind not in "iu" or indices.min() < 0 or indices.max() >= bound):
        raise MalformedMatrixError(
            f"The matrix has an index outside 0..{bound - 1} (dtype {indices.dtype}); the file is damaged.",
            field="indices",
        )


def check_indptr(indptr: Any, n_data: int, n_indices: int, shape: tuple[int, int], axis: str) -> NDArray[np.int64]:
    """Return `indptr` as int64 [shape[0] + 1], checked against `shape` and the lengths of both other arrays.

    `axis` is ``row`` or ``column``: what an entry of `indptr` stands for.
    """
    lines, width = shape
    if len(indptr) != lines + 1:
        raise MalformedMatrixError(
            f"The matrix has {lines} {axis}s, but indptr has {len(indptr)} entries; {lines + 1} are needed.",
            field="indptr",
        )
    starts = np.asarray(indptr[:])
    if starts.dtype.kind not in "iu":
        raise MalformedMatrixError(f"CSR indptr has dtype {starts.dtype}; integers are needed.", field="indptr")
    starts = starts.astype(np.int64)
    sizes = np.diff(starts)
    if starts[0] != 0 or (sizes < 0).any() or (sizes > width).any():
        bad = int(np.flatnonzero((sizes < 0) | (sizes > width))[0]) if starts[0] == 0 else 0
        raise MalformedMatrixError(
            f"The matrix is ragged: indptr does not fit {width} values at most in {axis} {bad}.", field="indptr"
        )
    if not n_data == n_indices == starts[-1]:
        raise MalformedMatrixError(
            f"The matrix is ragged: {n_data} values, {n_indices} indices, and indptr ends at {starts[-1]}. "
            "The three must be equal.",
            field="indptr",
        )
    return starts
