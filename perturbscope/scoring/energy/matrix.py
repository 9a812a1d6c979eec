"""Distances between cells, computed by any array library and held as a matrix, and sums of them over subsets of cells.

The code follows the array API, so numpy, torch, CuPy and others compute what their own arrays ask for. Distances are
computed in float32 as |x|^2 + |y|^2 - 2 x.y about a common origin, in tiles that stay in the cache of a core. The
subtraction loses digits if two cells are close, and the square root makes that worse; so a tile with a pair nearer than
a tenth of the cell's distance from the origin is computed in float64 instead, where equal cells are at distance 0
exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj, is_cupy_array, is_numpy_array, is_torch_array, to_device
from array_api_compat import device as array_device
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.scoring.distances import STEP_PRODUCTS, STEP_VALUES, product
from perturbscope.threads import checkpoint

TILE = 2**18
"""Distances of a tile: a mebibyte of float32."""
DEVICE_TILE = 2**26
"""Distances of a tile on an accelerator, which wants large products."""
CLOSE = 0.01
"""Squared distance, as a share of the cell's from the origin, below which float32 is not exact enough."""
_ROWS = 512
"""Most rows of a matrix that are converted to float64 at a time; sums over subsets of so few cells use all of it."""
SPARSE = 6
"""Dense products that take the time of a sparse one."""
DENSE = 1 / SPARSE
"""Share of cells marked above which subsets are dense matrices: a product takes 26 ps of a core for each float32
multiplication when dense and 160 ps when sparse (AMD EPYC 9004, OpenBLAS and scipy)."""


@dataclass(frozen=True)
class Compute:
    """The array library and the device that compute distances.

    Attributes
    ----------
    like
        Any array of the library, on the device; None stands for numpy.
    """

    like: Any = None

    @classmethod
    def of(cls, values: Any) -> tuple[Compute, Any]:
        """Return the library and device of an array, and its values in numpy; anything else is returned unchanged."""
        if not is_array_api_obj(values) or is_numpy_array(values):
            return HOST, values
        return cls(values[:0]), to_numpy(values)

    @property
    def on_host(self) -> bool:
        """Whether the arrays are numpy arrays."""
        return self.like is None or is_numpy_array(self.like)

    def put(self, values: NDArray[Any]) -> Any:
        """Return the same values as an array of the library, on the device."""
        if self.on_host:
            return values
        xp = array_namespace(self.like)
        return xp.asarray(values, device=array_device(self.like))


HOST = Compute()


def to_numpy(values: Any) -> NDArray[Any]:
    """Return the same values in numpy, from any library and device."""
    if is_torch_array(values) or is_cupy_array(values):
        values = to_device(values, "cpu")
    array: NDArray[Any] = values if is_numpy_array(values) else np.from_dlpack(values)
    return array


class Points:
    """Cells prepared for :func:`distances`.

    Parameters
    ----------
    rows
        Vectors about the origin, float64 [n, width], in numpy.
    compute
        Library and device that compute the distances.
    """

    def __init__(self, rows: NDArray[np.float64], compute: Compute = HOST) -> None:
        self.rows, self.compute = rows, compute
        ones = np.ones((len(rows), 1))
        squares: NDArray[np.float64] = np.einsum("nw,nw->n", rows, rows)[:, None]
        self.left = compute.put(np.concatenate([rows, squares, ones], axis=1, dtype=np.float32))
        """x, |x|^2 and 1, float32 [n, width + 2]; the product with another's `right` is the squared distance."""
        self.right = compute.put(np.concatenate([-2 * rows, ones, squares], axis=1, dtype=np.float32))
        """-2 y, 1 and |y|^2, float32 [n, width + 2]."""
        self.near = compute.put((CLOSE * squares[:, 0]).astype(np.float32))
        """Squared distance of each cell below which float32 is not exact enough, float32 [n]."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, cells: NDArray[np.intp]) -> Points:
        """Return the cells at these positions."""
        points = object.__new__(Points)
        points.rows, points.compute = self.rows[cells], self.compute
        xp, places = array_namespace(self.left), self.compute.put(cells)
        points.left, points.right, points.near = (
            xp.take(values, places, axis=0) for values in (self.left, self.right, self.near)
        )
        return points


def distances(x: Points, y: Points | None = None) -> Any:
    """Return Euclidean distances of cells `x` from cells `y` (or among `x`), float32 [n, m], on the device of `x`."""
    others = x if y is None else y
    xp = array_namespace(x.left)
    device = array_device(x.left)
    out = xp.empty((len(x), len(others)), dtype=xp.float32, device=device)
    step = max(1, (TILE if x.compute.on_host else DEVICE_TILE) // len(others))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        checkpoint()
        tile = _times(x.left[rows, :], xp.matrix_transpose(others.right))
        diagonal = None
        if y is None:
            diagonal = xp.eye(rows.stop - start, len(others), k=start, dtype=xp.bool, device=device)
            tile = xp.where(diagonal, xp.asarray(xp.inf, dtype=xp.float32, device=device), tile)
        if bool(xp.any(xp.min(tile, axis=1) < x.near[rows])):
            tile = _exact(x.rows[rows], others.rows, x.compute)
        if diagonal is not None:
            tile = xp.where(diagonal, xp.zeros_like(tile), tile)
        out[rows, :] = xp.sqrt(tile)
    return out


def _exact(x: NDArray[np.float64], y: NDArray[np.float64], compute: Compute) -> Any:
    """Return squared distances computed in float64, 0 where only rounding is left; float32."""
    a, b = compute.put(x), compute.put(y)
    xp = array_namespace(a)
    sizes = xp.sum(a * a, axis=1)[:, None] + xp.sum(b * b, axis=1)[None, :]
    tile = sizes - 2 * _times(a, xp.matrix_transpose(b))
    return xp.astype(xp.where(tile < 1e-14 * sizes, xp.zeros_like(tile), tile), xp.float32)


def _times(a: Any, b: Any) -> Any:
    """Return the product of two matrices of any library; in numpy with checkpoints."""
    return product(a, b) if is_numpy_array(a) and b.ndim == 2 else a @ b


def sums(matrix: Any, axis: int) -> NDArray[np.float64]:
    """Sum a float32 matrix along an axis, in float64."""
    xp = array_namespace(matrix)
    return to_numpy(xp.sum(matrix, axis=axis, dtype=xp.float64))


class BlockSums(NamedTuple):
    """Sums over the blocks of a matrix of distances: between the cells of one batch and those of another.

    Attributes
    ----------
    rows
        Sum of each row over the columns of each batch, [n, batches].
    columns
        Sum of each column over the rows of each batch, [m, batches].
    squares
        Sum of the squares of each block, [batches, batches].
    """

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]
    squares: NDArray[np.float64]


def block_sums(
    tiles: Iterable[NDArray[np.float64]], of_rows: NDArray[np.intp], of_columns: NDArray[np.intp], count: int
) -> BlockSums:
    """Sum the blocks of a matrix that comes in tiles of its rows; codes of batches are below `count`."""
    order = None if (np.diff(of_columns) >= 0).all() else np.argsort(of_columns, kind="stable")
    sorted_columns = of_columns if order is None else of_columns[order]
    batches, starts = np.unique(sorted_columns, return_index=True)
    rows, columns = np.zeros((len(of_rows), count)), np.zeros((len(of_columns), count))
    squares = np.zeros((count, count))
    done = 0
    for tile in tiles:
        checkpoint()
        codes = of_rows[done : done + len(tile)]
        ends = np.flatnonzero(np.diff(codes)) + 1
        # A batch that comes again after another is added a second time.
        for part, code in zip(np.split(tile, ends), codes[np.concatenate([[0], ends])], strict=True):
            columns[:, code] += part.sum(axis=0)
        parted = tile if order is None else tile[:, order]
        rows[done : done + len(tile), batches] = np.add.reduceat(parted, starts, axis=1)
        checkpoint()
        squared = np.add.reduceat(parted * parted, starts, axis=1)
        by_code = np.zeros((count, len(batches)))
        np.add.at(by_code, codes, squared)
        squares[:, batches] += by_code
        done += len(tile)
    return BlockSums(rows, columns, squares)


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
        """Return the subsets that the columns of a matrix [size, R] of 0 and 1 mark."""
        if isinstance(members, Subsets):
            return members
        draws, cells = np.nonzero(members.T)
        return cls(cells, np.bincount(draws, minlength=members.shape[1]), len(members))

    @cached_property
    def members(self) -> NDArray[np.float32]:
        """The subsets as a matrix [size, R] of 0 and 1, each subset contiguous."""
        members = np.zeros((len(self.counts), self.size), dtype=np.float32)
        members[self._draws, self._indices] = 1
        return members.T

    @cached_property
    def _draws(self) -> NDArray[np.intp]:
        return np.repeat(np.arange(len(self.counts)), np.diff(self._ends))

    @cached_property
    def _matrix(self) -> sparse.csr_array:
        indices, ends = self._indices.astype(np.int32), self._ends.astype(np.int32)
        ones = np.ones(len(indices), dtype=np.float32)
        return sparse.csr_array((ones, indices, ends), shape=(len(self.counts), self.size))

    def _on(self, matrix: Any) -> Any:
        """Return the subsets as a matrix [R, size] on the device of `matrix`."""
        if is_numpy_array(matrix):
            return self.members.T.astype(matrix.dtype, copy=False)
        place = str(array_device(matrix))
        if place not in self._put:
            self._put[place] = Compute(matrix).put(np.ascontiguousarray(self.members.T))
        return self._put[place]

    def sums(self, matrix: Any) -> Any:
        """Sum the rows of `matrix` [size, n] or [size] over each subset: [R, n] or [R], in the dtype of `matrix`."""
        if self.sparse and is_numpy_array(matrix):
            return self._sparse_sums(matrix)
        return _times(self._on(matrix), matrix)

    def _sparse_sums(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return the sparse product, some subsets at a time."""
        columns = 1 if matrix.ndim == 1 else matrix.shape[1]
        step = max(1, STEP_PRODUCTS // SPARSE // max(1, columns * len(self._indices) // max(1, len(self.counts))))
        found: NDArray[Any]
        if len(self.counts) <= step:
            checkpoint()
            found = self._matrix @ matrix
            return found
        found = np.empty((len(self.counts), *matrix.shape[1:]), dtype=matrix.dtype)
        for start in range(0, len(found), step):
            checkpoint()
            found[start : start + step] = self._matrix[start : start + step] @ matrix
        return found

    def dots(self, rows: Any) -> NDArray[np.float64]:
        """Sum row r of `rows` [R, size] over subset r: float64 [R]."""
        if self.sparse and is_numpy_array(rows):
            marked = rows[self._draws, self._indices].astype(np.float64)
            return np.bincount(self._draws, marked, minlength=len(rows)).astype(np.float64, copy=False)
        xp = array_namespace(rows)
        return to_numpy(xp.sum(self._on(rows) * rows, axis=1, dtype=xp.float64))


class DenseGroup:
    """A group of cells whose unsquared Euclidean distances are held as a matrix.

    Parameters
    ----------
    rows
        Vectors, float [n, width].
    origin
        Any point near the cells, [width]; default their mean. It only reduces rounding.
    compute
        Library and device that compute and hold the distances.
    matrix
        Distances among the rows, if they are known already.
    """

    def __init__(
        self,
        rows: NDArray[np.float64],
        origin: NDArray[np.float64] | None = None,
        *,
        compute: Compute = HOST,
        matrix: Any = None,
    ) -> None:
        self.rows = rows
        self.size = len(rows)
        self.origin: NDArray[np.float64] = rows.mean(axis=0, dtype=np.float64) if origin is None else origin
        self.points = Points(rows - self.origin, compute)
        self.matrix = distances(self.points) if matrix is None else matrix
        self.row_sums = sums(self.matrix, 1)

    def mark(self, members: NDArray[np.float32] | Subsets) -> Subsets:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        return Subsets.of(members)

    def within(self, marked: Subsets) -> NDArray[np.float64]:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        return marked.dots(marked.sums(self.matrix))

    def inside(self, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        if self.size <= _ROWS:
            counts = np.full(len(chosen), chosen.shape[1])
            return self.within(Subsets(chosen.ravel(), counts, self.size))
        # Computed again: to look up cells that lie apart in a large matrix takes twice as long.
        return np.array([float(sums(distances(self.points.take(cells)), 1).sum()) for cells in chosen])

    def part(self, a: NDArray[np.intp], b: NDArray[np.intp]) -> Any:
        """Return the distances from the cells at positions `a` to those at positions `b`, float32 [a, b]."""
        if self.points.compute.on_host:
            return self.matrix[np.ix_(a, b)]
        rows, columns = self.points.compute.put(a), self.points.compute.put(b)
        return self.matrix[rows[:, None], columns[None, :]]

    def growing(self, orders: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        totals = np.zeros((len(orders), orders.shape[1] + 1))
        for order, row in zip(orders, totals, strict=True):
            checkpoint()
            # What a cell adds: its distances to those before it, in both directions.
            added = np.tril(to_numpy(self.part(order, order)), -1).sum(axis=1, dtype=np.float64)
            np.cumsum(2 * added, out=row[1:])
        return totals

    def squares(self) -> float:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        return _squares(self.matrix)

    def by_batch(self, codes: NDArray[np.intp], count: int) -> BlockSums:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        if count == 1:
            return BlockSums(self.row_sums[:, None], self.row_sums[:, None], np.array([[self.squares()]]))
        return block_sums(_tiles(self.matrix), codes, codes, count)

    def link(self, other: DenseGroup) -> DenseLink:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        return DenseLink(self, other)


class DensePart(DenseGroup):
    """Some cells of a dense group, whose distances are looked up there and not computed again."""

    def __init__(self, whole: DenseGroup, positions: NDArray[np.intp]) -> None:
        super().__init__(
            whole.rows[positions],
            whole.origin,
            compute=whole.points.compute,
            matrix=whole.part(positions, positions),
        )
        self.whole, self.positions = whole, positions

    def link(self, other: DenseGroup) -> DenseLink:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        if isinstance(other, DensePart) and other.whole is self.whole:
            return DenseLink(self, other, self.whole.part(other.positions, self.positions))
        return DenseLink(self, other)


def _tiles(matrix: Any) -> Iterator[NDArray[np.float64]]:
    """Yield a matrix of distances in float64, some rows at a time, with a checkpoint before each."""
    step = max(1, min(_ROWS, STEP_VALUES // max(1, matrix.shape[1])))
    for start in range(0, matrix.shape[0], step):
        checkpoint()
        yield to_numpy(matrix[start : start + step]).astype(np.float64)


def _squares(matrix: Any) -> float:
    return sum(float(np.vdot(tile, tile)) for tile in _tiles(matrix))


class DenseLink:
    """Distances between two dense groups, held as a matrix, float32 [cells of b, cells of a]."""

    def __init__(self, a: DenseGroup, b: DenseGroup, matrix: Any = None) -> None:
        if matrix is None:
            points = a.points if a.origin is b.origin else Points(a.rows - b.origin, b.points.compute)
            matrix = distances(b.points, points)
        self.matrix = matrix
        self.sums_a = sums(self.matrix, 0)
        self.sums_b = sums(self.matrix, 1)

    def between(self, marked_a: Subsets, marked_b: Subsets) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See :class:`perturbscope.scoring.energy.pool.Link`."""
        return marked_a.dots(marked_b.sums(self.matrix)), marked_b.sums(self.sums_b)

    def by_batch(self, codes_a: NDArray[np.intp], codes_b: NDArray[np.intp], count: int) -> BlockSums:
        """See :class:`perturbscope.scoring.energy.pool.Link`."""
        if count == 1:
            squares = np.array([[_squares(self.matrix)]])
            return BlockSums(self.sums_a[:, None], self.sums_b[:, None], squares)
        found = block_sums(_tiles(self.matrix), codes_b, codes_a, count)
        return BlockSums(found.columns, found.rows, found.squares.T)
