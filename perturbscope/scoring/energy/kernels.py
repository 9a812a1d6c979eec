"""The heavy products of scoring: distances between cells, and sums of them over subsets of cells.

Written once, for any array library that follows the array API (numpy, torch, CuPy ...), found from the arrays
themselves. Distances are computed in float32 as |x|^2 + |y|^2 - 2 x.y about a common origin, in tiles that stay in the
cache of a core. The subtraction loses digits where two cells are close, and the square root makes them worse; so a tile
with a pair nearer than a tenth of the cell's distance from the origin is computed in float64 instead, where equal cells
are at distance 0 exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj, is_cupy_array, is_numpy_array, is_torch_array, to_device
from array_api_compat import device as array_device
from numpy.typing import NDArray
from scipy import sparse

TILE = 2**18
"""Distances of a tile: a mebibyte of float32."""
DEVICE_TILE = 2**26
"""The same on an accelerator, which wants large products."""
CLOSE = 0.01
"""Squared distance, as a share of the cell's from the origin, below which float32 is not exact enough."""
DENSE = 1 / 6
"""Share of cells marked above which subsets are dense matrices: a product takes 26 ps of a core for each float32
multiplication when dense and 160 ps when sparse (AMD EPYC 9004, OpenBLAS and scipy)."""


@dataclass(frozen=True)
class Compute:
    """Where distances are computed.

    Attributes
    ----------
    like
        Any array of the library, on the device; None stands for numpy.
    """

    like: Any = None

    @classmethod
    def of(cls, values: Any) -> tuple[Compute, Any]:
        """Where an array of any library is, and its values in numpy; what is no array is left as it is."""
        if not is_array_api_obj(values) or is_numpy_array(values):
            return HOST, values
        return cls(values[:0]), to_numpy(values)

    @property
    def on_host(self) -> bool:
        """Whether the arrays are numpy's."""
        return self.like is None or is_numpy_array(self.like)

    def put(self, values: NDArray[Any]) -> Any:
        """The same values as an array of the library, on the device."""
        if self.on_host:
            return values
        xp = array_namespace(self.like)
        return xp.asarray(values, device=array_device(self.like))


HOST = Compute()


def to_numpy(values: Any) -> NDArray[Any]:
    """The same values in numpy, from whatever library and device."""
    if is_torch_array(values) or is_cupy_array(values):
        values = to_device(values, "cpu")
    found: NDArray[Any] = values if is_numpy_array(values) else np.from_dlpack(values)
    return found


class Points:
    """Cells ready to be measured.

    Parameters
    ----------
    rows
        Vectors about the origin, float64 [n, width], in numpy.
    compute
        Where to measure.
    """

    def __init__(self, rows: NDArray[np.float64], compute: Compute = HOST) -> None:
        self.rows, self.compute = rows, compute
        ones = np.ones((len(rows), 1))
        squares: NDArray[np.float64] = np.einsum("nw,nw->n", rows, rows)[:, None]
        self.left = compute.put(np.concatenate([rows, squares, ones], axis=1, dtype=np.float32))
        """x, |x|^2 and 1, float32 [n, width + 2]: its product with `right` is the squared distance."""
        self.right = compute.put(np.concatenate([-2 * rows, ones, squares], axis=1, dtype=np.float32))
        """-2 y, 1 and |y|^2, float32 [n, width + 2]."""
        self.near = compute.put((CLOSE * squares[:, 0]).astype(np.float32))
        """Squared distance of each cell below which float32 does not do, float32 [n]."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, cells: NDArray[np.intp]) -> Points:
        """Some of them."""
        found = object.__new__(Points)
        found.rows, found.compute = self.rows[cells], self.compute
        xp, places = array_namespace(self.left), self.compute.put(cells)
        found.left, found.right, found.near = (
            xp.take(values, places, axis=0) for values in (self.left, self.right, self.near)
        )
        return found


def distances(x: Points, y: Points | None = None) -> Any:
    """Euclidean distances of the cells `x` from the cells `y` (or among `x`), float32 [n, m], on the device of `x`."""
    others = x if y is None else y
    xp = array_namespace(x.left)
    device = array_device(x.left)
    out = xp.empty((len(x), len(others)), dtype=xp.float32, device=device)
    step = max(1, (TILE if x.compute.on_host else DEVICE_TILE) // len(others))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        tile = x.left[rows, :] @ xp.matrix_transpose(others.right)
        own = None
        if y is None:
            own = xp.eye(rows.stop - start, len(others), k=start, dtype=xp.bool, device=device)
            tile = xp.where(own, xp.asarray(xp.inf, dtype=xp.float32, device=device), tile)
        if bool(xp.any(xp.min(tile, axis=1) < x.near[rows])):
            tile = _exact(x.rows[rows], others.rows, x.compute)
        if own is not None:
            tile = xp.where(own, xp.zeros_like(tile), tile)
        out[rows, :] = xp.sqrt(tile)
    return out


def _exact(x: NDArray[np.float64], y: NDArray[np.float64], compute: Compute) -> Any:
    """Squared distances from float64, 0 where only rounding is left; float32."""
    a, b = compute.put(x), compute.put(y)
    xp = array_namespace(a)
    sizes = xp.sum(a * a, axis=1)[:, None] + xp.sum(b * b, axis=1)[None, :]
    tile = sizes - 2 * (a @ xp.matrix_transpose(b))
    return xp.astype(xp.where(tile < 1e-14 * sizes, xp.zeros_like(tile), tile), xp.float32)


def sums(matrix: Any, axis: int) -> NDArray[np.float64]:
    """Sums of a float32 matrix along an axis, in float64."""
    xp = array_namespace(matrix)
    return to_numpy(xp.sum(matrix, axis=axis, dtype=xp.float64))


class Subsets:
    """R subsets of the same cells, and sums over each of them.

    Parameters
    ----------
    indices
        Cells of the first subset, then of the second and so on.
    counts
        Cells of each subset, [R].
    size
        Cells to choose from.
    """

    def __init__(self, indices: NDArray[np.integer[Any]], counts: NDArray[np.integer[Any]], size: int) -> None:
        self._indices, self.size = indices, size
        self.counts: NDArray[np.float64] = counts.astype(np.float64)
        self._ends = np.concatenate([[0], np.cumsum(counts)])
        self._put: dict[str, Any] = {}
        self.sparse = len(indices) < DENSE * size * len(counts)

    @classmethod
    def of(cls, members: NDArray[np.float32] | Subsets) -> Subsets:
        """Of a matrix [size, R] of 0 and 1."""
        if isinstance(members, Subsets):
            return members
        draws, cells = np.nonzero(members.T)
        return cls(cells, np.bincount(draws, minlength=members.shape[1]), len(members))

    @cached_property
    def members(self) -> NDArray[np.float32]:
        """As a matrix [size, R] of 0 and 1, the subsets contiguous."""
        found = np.zeros((len(self.counts), self.size), dtype=np.float32)
        found[self._draws, self._indices] = 1
        return found.T

    @cached_property
    def _draws(self) -> NDArray[np.intp]:
        return np.repeat(np.arange(len(self.counts)), np.diff(self._ends))

    @cached_property
    def _matrix(self) -> sparse.csr_array:
        indices, ends = self._indices.astype(np.int32), self._ends.astype(np.int32)
        ones = np.ones(len(indices), dtype=np.float32)
        return sparse.csr_array((ones, indices, ends), shape=(len(self.counts), self.size))

    def _on(self, matrix: Any) -> Any:
        """The subsets as a matrix [R, size] beside `matrix`, on its device."""
        if is_numpy_array(matrix):
            return self.members.T.astype(matrix.dtype, copy=False)
        place = str(array_device(matrix))
        if place not in self._put:
            self._put[place] = Compute(matrix).put(np.ascontiguousarray(self.members.T))
        return self._put[place]

    def sums(self, matrix: Any) -> Any:
        """Sums of the rows of `matrix`, [size, n] or [size], over each subset, [R, n] or [R]; of its type."""
        if self.sparse and is_numpy_array(matrix):
            return self._matrix @ matrix
        return self._on(matrix) @ matrix

    def dots(self, rows: Any) -> NDArray[np.float64]:
        """Sum over each subset of its own row of `rows` [R, size], [R]."""
        if self.sparse and is_numpy_array(rows):
            marked = rows[self._draws, self._indices].astype(np.float64)
            return np.bincount(self._draws, marked, minlength=len(rows)).astype(np.float64, copy=False)
        xp = array_namespace(rows)
        return to_numpy(xp.sum(self._on(rows) * rows, axis=1, dtype=xp.float64))
