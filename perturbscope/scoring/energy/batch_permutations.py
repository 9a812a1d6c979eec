"""Exchanges of labels within batches that many perturbations share.

Within a batch of n_s perturbed cells and m_s controls an exchange is as :mod:`perturbscope.scoring.energy.permutations`
describes: a hypergeometric number k_s of controls is marked, the first k_s in a uniform random order of the batch's
controls, and independently a uniform subset of n_s - k_s perturbed cells. Batches are independent of each other. So
orders are drawn once a batch, and numbers and subsets once for each n_s that occurs in it; the exchanges of a
perturbation are put together from those of its batches, and its p-value is as valid as with draws of its own.

The sum of the distances among the marked controls then depends on all k_s at once. For one draw, let T be the matrix of
distances between controls in their orders, batch after batch, cumulated along both axes within each batch. The sum is
that of the entries of T at the rows and columns k_s of all batches: for P perturbations in S batches a product of a
sparse matrix, P S ones, with T. So perturbations are prepared together, draw by draw.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring.distances import row_by_row
from perturbscope.scoring.energy.matrix import DenseGroup, Subsets, to_numpy
from perturbscope.scoring.energy.permutations import smallest
from perturbscope.scoring.energy.pool import Group, Labels
from perturbscope.scoring.statistics import generator
from perturbscope.threads import checkpoint, in_order

TABLE = 2**24
"""Most sums among controls that are kept: 128 MiB."""
KEPT = 2**27
"""Most bytes of drawn labels that are kept."""
_ROWS = 1024
"""Perturbations of one product, whose sums stay in the cache."""
_Sizes = tuple[tuple[int, int], ...]
"""Batch codes of a group, and its number of cells in each."""


class _Drawn(NamedTuple):
    """Exchanges of one batch: number of marked controls [R], and mask of perturbed cells that stay marked [R, n]."""

    taken: NDArray[np.int32]
    kept: NDArray[np.bool_]


class BatchPermutations:
    """Some exchanges of labels between groups and the controls, within batches.

    Parameters
    ----------
    controls
        The group of all controls.
    batches
        Batch of each control.
    draws
        Number of exchanges.
    seed
        Seed of the draws, which depend on the numbers of cells in each batch and not on which other perturbations are
        scored.
    number
        Which exchanges, of many such parts.
    """

    def __init__(self, controls: Group, batches: NDArray[np.intp], draws: int, seed: int, number: int = 0) -> None:
        self._controls, self._draws, self._seed, self._number = controls, draws, seed, number
        names, codes = np.unique(batches, return_inverse=True)
        self._cells = {int(name): np.flatnonzero(codes == i) for i, name in enumerate(names)}
        self._numbers = {int(name): i for i, name in enumerate(names)}
        self._depths = dict.fromkeys(self._cells, 0)
        self._orders: dict[int, NDArray[np.int32]] = {}
        self._drawn: dict[tuple[int, int], _Drawn] = {}
        self._held = 0
        self._sums: dict[_Sizes, NDArray[np.float64]] = {}
        self._lock = threading.RLock()

    @property
    def at_a_time(self) -> int:
        """Number of groups that may be prepared together."""
        return max(1, TABLE // self._draws)

    def labels(self, batches: NDArray[np.intp]) -> Labels:
        """Return the exchanges with a group whose cells are in these `batches` [n]."""
        sizes, draws = self._sizes(batches), self._draws
        sums = self._sums.get(tuple(sizes.items()))
        stays = np.ones((draws, len(batches)), dtype=bool)
        places = [np.empty((draws, 0), dtype=np.int32)]
        marks = [np.empty((draws, 0), dtype=bool)]
        for code, n in sizes.items():
            checkpoint()
            drawn = self._draw(code, n)
            stays[:, np.flatnonzero(batches == code)] = drawn.kept
            orders = self._order(code, n)[:, :n]
            places.append(orders)
            marks.append(np.arange(orders.shape[1]) < drawn.taken[:, None])
        marked = np.concatenate(marks, axis=1)
        of_controls = Subsets(np.concatenate(places, axis=1)[marked], marked.sum(axis=1), self._controls.size)
        marked_controls = self._controls.mark(of_controls)
        within = self._controls.within(marked_controls) if sums is None else sums
        of_group = Subsets(np.nonzero(stays)[1], stays.sum(axis=1), len(batches))
        row_sums = of_controls.sums(self._controls.row_sums)
        return Labels(of_group, of_controls, marked_controls, within, row_sums)

    def prepare(self, groups: Sequence[NDArray[np.intp]]) -> None:
        """Sum the distances among marked controls for many groups at once, if that is cheaper than one after the other.

        Parameters
        ----------
        groups
            Batches of each group's cells. Sums of an earlier call are forgotten.
        """
        self._sums = {}
        by_key = {tuple(sizes.items()): sizes for sizes in map(self._sizes, groups)}
        for sizes in by_key.values():
            for code, n in sizes.items():
                self._depths[code] = max(self._depths[code], min(n, len(self._cells[code])))
        if not isinstance(self._controls, DenseGroup) or not self._pays(list(by_key.values())):
            return
        keys = [key for key in by_key if key]
        self._sums = dict(zip(keys, self._sum_up(keys), strict=True))

    def _pays(self, groups: list[dict[int, int]]) -> bool:
        """Whether a table for each draw costs less than sums for each group, in picoseconds of a core (measured)."""
        m, depth = self._controls.size, sum(self._depths.values())
        table = 9000 * depth**2 + 160 * depth * sum(map(len, groups))
        return table < sum(min(160 * sum(sizes.values()) * m, 26 * m * m) for sizes in groups)

    def _sum_up(self, keys: list[tuple[tuple[int, int], ...]]) -> NDArray[np.float64]:
        """Return sums among marked controls, [groups, draws]."""
        out = np.empty((len(keys), self._draws))
        used = sorted({code for key in keys for code, _ in key})
        orders = [self._order(code, self._depths[code])[:, : self._depths[code]] for code in used]
        joined, ends = np.concatenate(orders, axis=1), np.cumsum([part.shape[1] for part in orders])
        starts = dict(zip(used, ends - [part.shape[1] for part in orders], strict=True))
        blocks = [slice(starts[code], end) for code, end in zip(used, ends, strict=True)]
        pairs = sorted({pair for key in keys for pair in key})
        rank = {pair: i for i, pair in enumerate(pairs)}
        taken = np.stack([self._draw(code, n).taken for code, n in pairs])
        counts = np.array([len(key) for key in keys])
        which = np.array([rank[pair] for key in keys for pair in key])
        offsets = np.array([starts[code] for key in keys for code, _ in key])
        group = np.repeat(np.arange(len(keys)), counts)

        def one(draw: int) -> NDArray[np.float64]:
            checkpoint()
            order = joined[draw].astype(np.intp)
            table = to_numpy(self._part(order))
            for block in blocks:
                checkpoint()
                np.cumsum(table[block], axis=0, out=table[block])
            for block in blocks:
                checkpoint()
                np.cumsum(table[:, block], axis=1, out=table[:, block])
            k = taken[which, draw]
            taking = k > 0
            places, owners = (offsets + k - 1)[taking], group[taking]
            lengths = np.bincount(owners, minlength=len(keys))
            edges = np.concatenate([[0], np.cumsum(lengths)])
            totals = np.empty(len(keys))
            for first in range(0, len(keys), _ROWS):
                checkpoint()
                last = min(first + _ROWS, len(keys))
                subsets = Subsets(places[edges[first] : edges[last]], lengths[first:last], len(order))
                totals[first:last] = subsets.dots(subsets.sums(table))
            return totals

        for draw, totals in enumerate(in_order(one, range(self._draws))):
            out[:, draw] = totals
        return out

    def _part(self, order: NDArray[np.intp]) -> Any:
        assert isinstance(self._controls, DenseGroup)  # noqa: S101  prepare() has looked
        return self._controls.part(order, order)

    def _sizes(self, batches: NDArray[np.intp]) -> dict[int, int]:
        """Return the number of cells in each batch that has controls as well."""
        names, counts = np.unique(batches, return_counts=True)
        return {int(code): int(n) for code, n in zip(names, counts, strict=True) if int(code) in self._cells}

    def _draw(self, code: int, n: int) -> _Drawn:
        """Return the exchanges of a batch with n perturbed cells."""
        with self._lock:
            drawn = self._drawn.get((code, n))
        if drawn is not None:
            return drawn
        rng = generator(self._seed, "exchange", "batch", self._numbers[code], n, self._number)
        taken = rng.hypergeometric(len(self._cells[code]), n, n, size=self._draws).astype(np.int32)
        # Taking the n - k smallest random keys makes every subset equally likely.
        rank = row_by_row(_ranks, rng.random((self._draws, n)))
        drawn = _Drawn(taken, rank < (n - taken)[:, None])
        with self._lock:
            if self._held < KEPT and (code, n) not in self._drawn:
                self._drawn[code, n] = drawn
                self._held += drawn.taken.nbytes + drawn.kept.nbytes
        return drawn

    def _order(self, code: int, depth: int) -> NDArray[np.int32]:
        """Return the first controls of each order of a batch, [draws, depth or more or all]; the same for any depth."""
        cells = self._cells[code]
        depth = min(len(cells), max(depth, self._depths[code]))
        with self._lock:
            order = self._orders.get(code)
            if order is not None and order.shape[1] >= depth:
                return order
            rng = generator(self._seed, "orders", "batch", self._numbers[code], self._number)
            first = row_by_row(partial(smallest, depth=depth), rng.random((self._draws, len(cells))))
            self._orders[code] = cells[first].astype(np.int32)
            return self._orders[code]


def _ranks(keys: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.argsort(np.argsort(keys, axis=1), axis=1)
