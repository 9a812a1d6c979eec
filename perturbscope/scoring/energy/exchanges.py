"""The energy test: how often exchanged labels give a distance as large as the observed one, for many perturbations.

Exchanges are drawn in parts, the same for all perturbations, and a perturbation leaves as soon as `exceedances` of its
exchanges have reached the observed distance (Besag and Clifford 1991): with the h-th at draw l, ``p = h / l``,
otherwise ``p = (1 + exceeding) / (1 + draws)``. Both are exact. A perturbation without an effect needs some hundred
draws, so most of the time is left for those whose p is small.

Without a number of exchanges given, all perturbations that are still open get the first :data:`BASE`. After that they
get as many as tell one from chance at their number: if A of P perturbations are open, the largest p that Benjamini and
Hochberg accept for all of them is ``0.05 A / P``, and ``200 P / A`` draws resolve a tenth of it. A perturbation's own
labels have no part in that, since A counts it as open while it is drawn for.

The draws of perturbations with equal numbers of cells are the same, and depend on nothing else but the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from math import exp, lgamma, log
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring.energy.batch_permutations import TABLE, BatchPermutations
from perturbscope.scoring.energy.matrix import DenseGroup
from perturbscope.scoring.energy.permutations import Permutations
from perturbscope.scoring.energy.pool import Group, Labels, Pool
from perturbscope.scoring.results import MOST_EXCHANGES
from perturbscope.scoring.statistics import Exchange
from perturbscope.threads import in_order

FIRST = 125
"""Exchanges of every perturbation."""
BASE = 1000
"""Exchanges of every perturbation that is still open, and the most that are drawn at a time."""
RESOLVED = 200
"""Draws, by perturbations for each open one."""
ENUMERATED = 10_000
"""Numbers of different exchanges up to which all are made."""
HELD = 2**27
"""Bytes of distances and vectors up to which perturbations are drawn for side by side."""
KEPT = 10_000
"""Distances after exchanges that are kept of a perturbation that none has reached, from which its tail is known."""

PSource = Literal["", "exchanges", "sequential", "enumerated"]
"""Where p comes from: all exchanges that were asked for, those up to the last exceedance, or every possible one."""
T = TypeVar("T")
Output = TypeVar("Output")


@dataclass
class EnergyTest:
    """The test of one perturbation while exchanges are drawn.

    Attributes
    ----------
    cells
        Positions of its cells that can be exchanged.
    batches
        Batch of each, or None.
    observed, mean, sd
        Its distance from all controls, and mean and sd of that over all exchanges.
    noise
        Difference up to which two distances are equal.
    exceeding, draws
        Exchanges whose distance is at least the observed one, and all that count.
    source
        Where p comes from; empty while exchanges are drawn.
    null
        Distances after exchanges, in parts: the first part, and others as long as none has reached the observed
        distance, up to :data:`KEPT`.
    """

    cells: NDArray[np.intp]
    batches: NDArray[np.intp] | None
    observed: float = float("nan")
    mean: float = float("nan")
    sd: float = float("nan")
    noise: float = 0.0
    exceeding: int = 0
    draws: int = 0
    source: PSource = ""
    null: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def p(self) -> float:
        """The p-value of what was drawn."""
        if self.draws == 0:
            return float("nan")
        if self.source in ("sequential", "enumerated"):
            return self.exceeding / self.draws
        return (1 + self.exceeding) / (1 + self.draws)

    def count(self, values: NDArray[np.float64], stop_at: int) -> None:
        """Count distances after exchanges, up to the exceedance number `stop_at` (0: all)."""
        hits = np.flatnonzero(values >= self.observed - self.noise)
        if stop_at and self.exceeding + len(hits) >= stop_at:
            self.draws += int(hits[stop_at - self.exceeding - 1]) + 1
            self.exceeding, self.source = stop_at, "sequential"
        else:
            self.draws += len(values)
            self.exceeding += len(hits)
        if self.exceeding and self.null:
            del self.null[1:]
        elif sum(map(len, self.null)) < KEPT:
            self.null.append(values.astype(np.float32))

    def count_all(self, values: NDArray[np.float64]) -> None:
        """Count the distances of every possible exchange, the observed labels among them."""
        self.exceeding = int(np.count_nonzero(values >= self.observed - self.noise))
        self.draws, self.source = len(values), "enumerated"


class EnergyTests:
    """Tests groups against one group of controls.

    Parameters
    ----------
    controls
        The group of all controls.
    batches
        Batch of each control, below `n_batches`; None: labels are exchanged freely.
    n_batches
        Number of batches.
    pool
        Returns the pool of some cells, given as positions, and the controls.
    permutations
        Most exchanges of a perturbation; None: see the module.
    exceedances
        Exceedances after which a perturbation leaves; 0: none does.
    seed
        Seed of the exchanges.
    """

    def __init__(
        self,
        controls: Group,
        batches: NDArray[np.intp] | None,
        n_batches: int,
        pool: Callable[[NDArray[np.intp]], Pool],
        *,
        permutations: int | None,
        exceedances: int,
        seed: int,
    ) -> None:
        self._controls, self._batches, self._pool = controls, batches, pool
        self._permutations, self._stop_at, self._seed = permutations, exceedances, seed
        self._count = n_batches if batches is not None else 1
        codes = np.zeros(controls.size, dtype=np.intp) if batches is None else batches
        self._sizes = np.bincount(codes, minlength=self._count)
        self._sums = controls.by_batch(codes, self._count)
        self._kept: dict[tuple[int, int], Callable[[EnergyTest], Labels]] = {}

    def run(
        self,
        tests: Sequence[EnergyTest],
        begun: Callable[[EnergyTest, Pool], None] = lambda test, pool: None,
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        """Fill in the tests; `begun` is called with each when its distance is known, `finished` when it is done."""
        pools: dict[int, Pool] = {}
        held = 0
        for part in self._parts(tests, self._first):
            draw = self._draws(0, self._first, [test for test in part if not self._few(test)])
            for test, pool in _each(partial(self._begin, draw), part):
                begun(test, pool)
                if test.source:
                    finished()
                elif held + self._bytes(test) <= HELD:
                    pools[id(test)] = pool
                    held += self._bytes(test)
        done = self._first
        left = [test for test in tests if not test.source]
        while left and done < (end := self._end(done, len(tests), len(left))):
            for block in self._blocks(left):
                self._draw_block(block, {id(test): pools.pop(id(test), None) for test in block}, done, end, finished)
            done = end
            left = [test for test in left if not test.source]
        for test in left:
            test.source = "exchanges"
            finished()

    def parts(self, test: EnergyTest, draws: int) -> list[Labels]:
        """Return `draws` exchanges of a test's labels, the first that are drawn for any; or all, if they are few."""
        if self._few(test):
            n = len(test.cells)
            batches = None if test.batches is None else np.concatenate([test.batches, self._batches])
            every = Exchange.of(n, self._controls.size, batches).every()
            return [
                Labels.of(every[:n, i : i + BASE], every[n:, i : i + BASE], self._controls)
                for i in range(0, every.shape[1], BASE)
            ]
        sizes = [min(self._first, draws)]
        while sum(sizes) < draws:
            sizes.append(min(BASE - sum(sizes) % BASE, draws - sum(sizes)))
        starts = np.cumsum([0, *sizes[:-1]])
        return [self._shared(int(start), size)(test) for start, size in zip(starts, sizes, strict=True)]

    def _shared(self, start: int, draws: int) -> Callable[[EnergyTest], Labels]:
        """Return exchanges as :meth:`_draws` does, drawn once."""
        if (start, draws) not in self._kept:
            self._kept[start, draws] = self._draws(start, draws, [])
        return self._kept[start, draws]

    def limit(self, n_tests: int, n_open: int) -> int:
        """Return the most exchanges of each of `n_open` tests that are open, of `n_tests`."""
        if self._permutations is not None:
            return self._permutations
        return min(MOST_EXCHANGES, max(BASE, -(-RESOLVED * n_tests // n_open)))

    @property
    def _first(self) -> int:
        return FIRST if self._permutations is None else min(FIRST, self._permutations)

    def _end(self, done: int, n_tests: int, n_open: int) -> int:
        """Return the number of exchanges until the number of open tests is looked at again."""
        return min(self.limit(n_tests, n_open), BASE if done < BASE else 4 * done)

    def _begin(self, draw: Callable[[EnergyTest], Labels], test: EnergyTest) -> tuple[EnergyTest, Pool]:
        pool = self._pool(test.cells)
        test.observed, test.noise = pool.observed, pool.noise
        test.mean, test.sd = pool.moments(test.batches, self._batches, self._count, self._sums)
        if self._few(test):
            batches = None if test.batches is None else np.concatenate([test.batches, self._batches])
            every = Exchange.of(pool.a.size, pool.b.size, batches).every()
            test.count_all(np.concatenate([pool.split(every[:, i : i + BASE]) for i in range(0, every.shape[1], BASE)]))
        else:
            test.count(pool.exchanged(draw(test)), self._stop_at)
        return test, pool

    def _few(self, test: EnergyTest) -> bool:
        """Whether all exchanges can be made."""
        return self.different(test.batches, len(test.cells)) <= ENUMERATED

    def different(self, batches: NDArray[np.intp] | None, n: int) -> float:
        """Return the number of different exchanges of n cells in `batches`, up to 1e300."""
        marked = np.array([n]) if batches is None else np.bincount(batches, minlength=self._count)
        logs = sum(lgamma(m + k + 1) - lgamma(k + 1) - lgamma(m + 1) for k, m in zip(marked, self._sizes, strict=True))
        return round(exp(min(logs, log(1e300))), 6)

    def _draw_block(
        self, block: list[EnergyTest], pools: dict[int, Pool | None], done: int, end: int, finished: Callable[[], None]
    ) -> None:
        """Draw exchanges number `done` to `end` for tests whose distances fit into memory together."""

        def made(test: EnergyTest) -> tuple[int, Pool]:
            return id(test), pools[id(test)] or self._pool(test.cells)

        ready = dict(_each(made, block))
        pools.clear()
        left = block
        while left and done < end:
            stop = min(end, done - done % BASE + BASE)
            for part in self._parts(left, stop - done):
                draw = self._draws(done, stop - done, part)

                def one(test: EnergyTest, draw: Callable[[EnergyTest], Labels] = draw) -> None:
                    test.count(ready[id(test)].exchanged(draw(test)), self._stop_at)

                for _ in _each(one, part):
                    pass
            for test in left:
                if test.source:
                    del ready[id(test)]
                    finished()
            left = [test for test in left if not test.source]
            done = stop

    def _draws(self, number: int, draws: int, tests: Sequence[EnergyTest]) -> Callable[[EnergyTest], Labels]:
        """Return the exchanges of part `number`, as a function of a test; `tests` are those that will ask."""
        if self._batches is None:
            free = Permutations(self._controls, draws, self._seed, number)
            return lambda test: free.labels(len(test.cells))
        within = BatchPermutations(self._controls, self._batches, draws, self._seed, number)
        within.prepare([test.batches for test in tests if test.batches is not None])

        def labels(test: EnergyTest) -> Labels:
            assert test.batches is not None  # noqa: S101  where controls have batches, so have tests
            return within.labels(test.batches)

        return labels

    def _bytes(self, test: EnergyTest) -> int:
        return bytes_of(len(test.cells), self._controls)

    def _parts(self, tests: Sequence[EnergyTest], draws: int) -> Iterator[Sequence[EnergyTest]]:
        step = len(tests) if self._batches is None else TABLE // draws
        return (tests[start : start + step] for start in range(0, len(tests), max(step, 1)))

    def _blocks(self, tests: list[EnergyTest]) -> Iterator[list[EnergyTest]]:
        """Yield tests in groups whose distances fit into memory together."""
        block: list[EnergyTest] = []
        held = 0
        for test in tests:
            size = self._bytes(test)
            if block and held + size > HELD:
                yield block
                block, held = [], 0
            block.append(test)
            held += size
        if block:
            yield block


def bytes_of(n: int, controls: Group) -> int:
    """Return the bytes of a pool of n cells and the controls, beside those of the controls."""
    distances = 4 * (n + controls.size) if isinstance(controls, DenseGroup) else 16
    return n * (distances + 24 * int(controls.rows.shape[1]))


def _each(work: Callable[[T], Output], items: Sequence[T]) -> Iterator[Output]:
    """Yield ``work(item)`` of each item in order, on all cores if there are several."""
    if len(items) < 2:
        yield from map(work, items)
        return
    with closing(in_order(work, items)) as found:
        yield from found
