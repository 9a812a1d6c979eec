"""Exchanges of labels that many perturbations share.

A permutation test of n perturbed cells against m controls marks n of the n + m cells at random. Of these, a
hypergeometric number k are controls, and they are a uniform random subset of k controls, like the first k in a uniform
random order of all controls. So the orders are drawn once for all perturbations, and the distances among the first k of
each order, for all k, are summed once. Each p-value is as valid as with draws of its own. The draws of different
perturbations are dependent, as their p-values are anyway: they share the controls themselves.
"""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring.distances import row_by_row
from perturbscope.scoring.energy.matrix import DenseGroup, Subsets
from perturbscope.scoring.energy.pool import Group, Labels
from perturbscope.scoring.statistics import generator

KEPT = 4
"""Sizes of groups whose exchanges are kept: threads work on neighbouring sizes."""
MAX_DEPTH = 1024
"""Most cells of a growing subset whose sums are kept; the time for them grows with its square, and is spent once."""


class Permutations:
    """Some exchanges of labels between a group and the controls, without batches.

    Parameters
    ----------
    controls
        The group of all controls.
    draws
        Number of exchanges.
    seed
        Seed of the draws, which depend on the numbers of cells and not on which other perturbations are scored.
    number
        Which exchanges, of many such parts.
    """

    def __init__(self, controls: Group, draws: int, seed: int, number: int = 0) -> None:
        self._controls, self._draws, self._seed, self._number = controls, draws, seed, number
        self._spent = 0
        self._kept: dict[int, Labels] = {}
        self._lock = threading.Lock()
        self._orders = np.empty((0, 0), dtype=np.intp)
        self._within = self._rows = np.empty((0, 0))

    def labels(self, n: int) -> Labels:
        """Return the exchanges with a group of n cells; call it by size, since those of a few n are kept."""
        with self._lock:
            if n not in self._kept:
                while len(self._kept) >= KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[n] = self._make(n)
            return self._kept[n]

    def _make(self, n: int) -> Labels:
        m, number, draws = self._controls.size, self._number, self._draws
        rng = generator(self._seed, "exchange", n, number)
        taken = rng.hypergeometric(m, n, n, size=draws)
        # Taking the n - k smallest random keys makes every subset equally likely.
        keys = rng.random((draws, n))
        cut = row_by_row(_sorted, keys)[np.arange(draws), np.minimum(n - taken, n - 1)]
        rows, cells = np.nonzero((taken == 0)[:, None] | (keys < cut[:, None]))
        of_group = Subsets(cells, np.bincount(rows, minlength=draws), n)
        depth = int(taken.max(initial=0))
        orders = self._first(depth)
        of_controls = Subsets(orders[:, :depth][np.arange(depth) < taken[:, None]], taken, m)
        marked = self._controls.mark(of_controls)
        if depth > MAX_DEPTH or not self._grows(n, depth):
            row_sums = of_controls.sums(self._controls.row_sums)
            return Labels(of_group, of_controls, marked, self._controls.within(marked), row_sums)
        self._sum_up(depth)
        within, row_sums = (table[np.arange(draws), taken] for table in (self._within, self._rows))
        return Labels(of_group, of_controls, marked, within, row_sums)

    def _grows(self, n: int, depth: int) -> bool:
        """Whether sums over growing subsets are kept already, or cost less than the sums over subsets so far did.

        Costs are picoseconds of a core for each draw, measured. Distances from sums of vectors leave nothing to save.
        """
        m = self._controls.size
        if self._within.shape[1] > depth:
            return True
        self._spent += min(160 * min(n, m) * m, 26 * m * m)
        return isinstance(self._controls, DenseGroup) and self._spent > 9000 * (2 * depth) ** 2

    def _first(self, depth: int) -> NDArray[np.intp]:
        """Return the first controls of each order, [draws, depth or more]; the same for any depth."""
        if self._orders.shape[0] == self._draws and self._orders.shape[1] >= depth:
            return self._orders
        m = self._controls.size
        depth = min(m, max(64, 2 * depth))
        keys = generator(self._seed, "orders", m, self._number).random((self._draws, m))
        self._orders = row_by_row(partial(smallest, depth=depth), keys)
        return self._orders

    def _sum_up(self, depth: int) -> None:
        """Compute and keep the sums over growing subsets up to `depth` cells."""
        if self._within.shape[1] > depth:
            return
        orders = self._orders[:, : min(self._orders.shape[1], MAX_DEPTH)]
        self._within = self._controls.growing(orders)
        self._rows = np.zeros_like(self._within)
        np.cumsum(self._controls.row_sums[orders], axis=1, out=self._rows[:, 1:])


def smallest(keys: NDArray[np.float64], depth: int) -> NDArray[np.intp]:
    """Return the columns of the `depth` smallest keys of each row, ascending by key: [R, depth]."""
    n, m = keys.shape
    first = np.argpartition(keys, depth - 1, axis=1)[:, :depth] if depth < m else np.tile(np.arange(m), (n, 1))
    return np.take_along_axis(first, np.argsort(np.take_along_axis(keys, first, axis=1), axis=1), axis=1)


def _sorted(keys: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sort(keys, axis=1)
