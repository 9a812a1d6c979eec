"""Which cells of which callers make the next batch."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import PerturbScopeError
from perturbscope.families.tokens import TokenizedCells, concatenate
from perturbscope.inference.batching import BatchLimits
from serving.queue.fairness import FairShare

SIMILAR = 2
"""Cells of several callers share a batch where their lengths differ by less than this factor from the first's."""
SHORT = 64
"""Lengths up to this one are all similar: so short, padding costs next to nothing."""


class Caller:
    """One call of `Dispatcher.submit` that has not been answered yet.

    Parameters
    ----------
    tokens
        Its cells.
    width
        Dimensions of a vector.
    flow
        On whose behalf.
    limits
        Of a batch.
    tag
        What the observer knows it by.
    """

    def __init__(self, tokens: TokenizedCells, width: int, flow: str, limits: BatchLimits, tag: object = None) -> None:
        self.tokens = tokens
        self.flow = flow
        self.tag = tag
        self.values: NDArray[np.float32] = np.empty((len(tokens), width), dtype=np.float32)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = time.perf_counter()
        self.inference = 0.0
        """Seconds of the batches that held a cell of this caller."""
        self.answered = 0
        """Cells whose vectors are in `values`."""
        self.unanswered_tokens = int(tokens.offsets[-1] - tokens.offsets[0])
        self.served = False
        """Whether a batch with a cell of this caller was begun."""
        self._limits = limits
        lengths = tokens.lengths
        self._rows: NDArray[np.intp] = np.argsort(lengths, kind="stable")
        self._lengths = lengths[self._rows]

    def __len__(self) -> int:
        """Cells that no batch has taken yet."""
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Length of the longest cell that no batch has taken yet."""
        return int(self._lengths[-1])

    def turn(self) -> float:
        """Slots of the batch that it would fill on its own."""
        return self.longest * min(self._limits.capacity(self.longest), len(self))

    def up_to(self, length: int) -> int:
        """How many of the remaining cells have at most this length."""
        return int(np.searchsorted(self._lengths, length, side="right"))

    def take(self, start: int, stop: int) -> NDArray[np.intp]:
        """Take the cells from `start` to `stop`, counted from the shortest that remains."""
        rows = self._rows[start:stop]
        self._rows = np.concatenate([self._rows[:start], self._rows[stop:]])
        self._lengths = np.concatenate([self._lengths[:start], self._lengths[stop:]])
        return rows

    def fail(self, error: PerturbScopeError) -> None:
        """Tell the caller, unless it has heard something already."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(frozen=True, eq=False)
class Part:
    """Cells of one caller in a batch."""

    caller: Caller
    rows: NDArray[np.intp]


def next_batch(share: FairShare[Caller], limits: BatchLimits) -> list[Part]:
    """Take the cells of the next batch, and charge their callers; callers without cells left leave `share`.

    The caller whose turn it is comes first, with its longest cells. The others fill what room is left, in the order of
    their turns, with cells of similar length: all that they have, or else those that are not longer than the batch is
    already.
    """
    parts: list[Part] = []
    n_cells, length, first = 0, 0, 0
    for caller in share.order(Caller.turn):
        if not parts:
            length = first = caller.longest
            start, stop = max(0, len(caller) - limits.capacity(length)), len(caller)
        else:
            low, high = (first // SIMILAR, first * SIMILAR) if first > SHORT else (0, max(SHORT, first * SIMILAR))
            start, stop = caller.up_to(low), caller.up_to(high)
            longer = max(length, caller.longest)
            if stop - start == len(caller) and n_cells + len(caller) <= limits.capacity(longer):
                length = longer
            else:
                stop = caller.up_to(length)
                start = max(start, stop - (limits.capacity(length) - n_cells))
        if start < stop:
            parts.append(Part(caller, caller.take(start, stop)))
            n_cells += stop - start
            share.charge(caller, (stop - start) * length)
        if n_cells >= limits.capacity(length):
            break
    for part in parts:
        if not len(part.caller):
            share.leave(part.caller)
    return parts


def joined(parts: list[Part]) -> tuple[TokenizedCells, NDArray[np.intp]]:
    """Where the cells of a batch are, and which they are."""
    if len(parts) == 1:
        return parts[0].caller.tokens, parts[0].rows
    tokens = concatenate([chosen(part.caller.tokens, part.rows) for part in parts])
    return tokens, np.arange(len(tokens))


def chosen(tokens: TokenizedCells, rows: NDArray[np.intp]) -> TokenizedCells:
    """A copy of some cells."""
    lengths = tokens.lengths[rows]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    take = np.repeat(tokens.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return TokenizedCells(
        arrays={name: array[take] for name, array in tokens.arrays.items()},
        offsets=offsets,
        known_share=tokens.known_share[rows],
        n_detected=tokens.n_detected[rows],
        coverage=tokens.coverage,
    )
