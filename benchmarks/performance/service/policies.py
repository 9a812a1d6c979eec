"""Batches by arrival and by length, over the same encoder: two dispatchers in one process, and no transport.

text-embeddings-inference publishes its rule (core/src/queue.rs, commit 0204616): every text is an entry of a queue; a
batch takes entries in the order of their arrival, until the next one would make (longest + its padding) x entries more
than ``max_batch_tokens``, 16,384 by default. Here the same rule is stated anew over :class:`Embedder`; what the rest of
that server costs or saves is not part of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.service.inputs import Ask, embedder
from perturbscope.families.tokens import TokenizedCells, concatenate
from serving.queue import Dispatcher, DispatchObserver

MAX_BATCH_TOKENS = 16_384
"""text-embeddings-inference's default."""
_Entry = tuple[TokenizedCells, int, "asyncio.Future[NDArray[np.float32]]"]
"""A request, one of its cells, and who waits for it."""


class Policy(Protocol):
    """A rule for making batches."""

    async def embed(self, tokens: TokenizedCells) -> NDArray[np.float32]:
        """Embed one request."""
        ...

    async def close(self) -> None:
        """Stop the policy."""
        ...


@dataclass
class Slots:
    """Counts of the tokens and batches that went through the model."""

    tokens: int = 0
    padded: int = 0
    batches: int = 0
    longest: float = 0.0

    def add(self, tokens: int, padded: int, seconds: float) -> None:
        """Count one batch."""
        self.tokens += tokens
        self.padded += padded
        self.batches += 1
        self.longest = max(self.longest, seconds)

    @property
    def padding(self) -> float:
        """Share of the slots that held no token."""
        return 1 - self.tokens / self.padded if self.padded else 0.0


@dataclass
class ByArrival:
    """Batches by arrival, the published rule.

    Attributes
    ----------
    max_batch_tokens
        Most padded tokens of a batch.
    slots
        Counts of what was run.
    """

    max_batch_tokens: int = MAX_BATCH_TOKENS
    slots: Slots = field(default_factory=Slots)

    def __post_init__(self) -> None:
        self._entries: deque[_Entry] = deque()
        self._runs: asyncio.Task[None] | None = None

    async def embed(self, tokens: TokenizedCells) -> NDArray[np.float32]:
        """Embed one request; each of its cells is an entry of the queue."""
        loop = asyncio.get_running_loop()
        waiting = [loop.create_future() for _ in range(len(tokens))]
        self._entries.extend((tokens, row, future) for row, future in enumerate(waiting))
        if self._runs is None:
            self._runs = loop.create_task(self._drain())
        return np.stack(await asyncio.gather(*waiting))

    async def close(self) -> None:
        """Do nothing: no batch runs once all requests are answered."""

    async def _drain(self) -> None:
        while self._entries:
            batch: list[_Entry] = []
            longest = 0
            while self._entries:
                tokens, row, _ = self._entries[0]
                length = int(tokens.offsets[row + 1] - tokens.offsets[row])
                if batch and max(longest, length) * (len(batch) + 1) > self.max_batch_tokens:
                    break
                longest = max(longest, length)
                batch.append(self._entries.popleft())
            values, seconds, n_tokens = await asyncio.to_thread(self._run, batch)
            self.slots.add(n_tokens, longest * len(batch), seconds)
            for (_, _, future), vector in zip(batch, values, strict=True):
                future.set_result(vector)
        self._runs = None

    def _run(self, batch: list[_Entry]) -> tuple[NDArray[np.float32], float, int]:
        started = time.perf_counter()
        # One copy of each request's tokens, and the rows that are wanted of it: no cell is copied by itself.
        requests = list({id(tokens): tokens for tokens, _, _ in batch}.values())
        first = dict(zip(map(id, requests), np.cumsum([0, *map(len, requests)]), strict=False))
        joined = concatenate(requests)
        rows = np.array([first[id(tokens)] + row for tokens, row, _ in batch])
        values = embedder().run(joined, rows)
        return values, time.perf_counter() - started, int(joined.lengths[rows].sum())


class ByLength(DispatchObserver):
    """PerturbScope's dispatcher, with counts of what went through its model."""

    def __init__(self) -> None:
        self.slots = Slots()
        self._dispatcher = Dispatcher(embedder(), observer=self)

    def batch(self, *, n_cells: int, n_tokens: int, n_padded: int, seconds: float, **_: object) -> None:
        """See :class:`DispatchObserver`."""
        self.slots.add(n_tokens, n_padded, seconds)

    async def embed(self, tokens: TokenizedCells) -> NDArray[np.float32]:
        """Vectors of one request."""
        values, _ = await self._dispatcher.submit(tokens)
        return values

    async def close(self) -> None:
        """Stop its thread."""
        await self._dispatcher.close()


@dataclass(frozen=True)
class Tried:
    """Result of a policy."""

    wall: float
    latency: list[float]
    sizes: list[int]
    slots: Slots
    vectors: list[NDArray[np.float32]]


def drain(policy: ByArrival | ByLength, asks: list[Ask], tokens: list[TokenizedCells], callers: int) -> Tried:
    """Embed all requests, `callers` at a time; their tokens were made before."""
    return asyncio.run(_drain(policy, asks, tokens, callers))


async def _drain(policy: ByArrival | ByLength, asks: list[Ask], tokens: list[TokenizedCells], callers: int) -> Tried:
    left, latency, sizes = deque(range(len(asks))), [], []
    vectors: dict[int, NDArray[np.float32]] = {}

    async def caller() -> None:
        while left:
            at = left.popleft()
            asked = time.perf_counter()
            vectors[at] = await policy.embed(tokens[at])
            latency.append(time.perf_counter() - asked)
            sizes.append(len(tokens[at]))

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    wall = time.perf_counter() - started
    await policy.close()
    return Tried(wall, latency, sizes, policy.slots, [vectors[at] for at in range(len(asks))])
