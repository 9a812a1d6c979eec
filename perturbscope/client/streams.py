"""Streams of chunks: what a client keeps of one, and how it goes on after a failure. No network.

Over gRPC a stream is one call with messages in both directions. Over HTTP it is one request a part, several of them in
flight: HTTP/1.1 clients and many proxies send a whole request before they read its answer, and each of those requests
can go to another replica, and is repeated alone. The price is that each repeats the genes' names; where that matters,
use gRPC. (The server's ``/v1/embed/stream`` is for callers without this client.)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.client.conversation import (
    ChunkLimits,
    Conversation,
    Failure,
    InChunks,
    Pause,
    RetryPolicy,
    check_maker,
)
from perturbscope.errors import (
    DeadlineExceededError,
    LimitExceededError,
    MalformedMatrixError,
    ServerError,
    UnknownModelError,
)
from perturbscope.inference.embedder import Embeddings, Maker, join
from perturbscope.protocol.streams import StreamStart

T = TypeVar("T")


@dataclass
class _Chunk:
    """A chunk of the caller's, of which not all is answered."""

    cells: CountMatrix
    sent: int = 0
    answered: int = 0
    parts: list[Embeddings] = field(default_factory=list)


class Flight:
    """The unanswered part of a stream: all that a client keeps of it.

    Chunks are cut into parts that the server takes; :meth:`land` takes their answers in order, and gives one result a
    chunk. After a failure, :meth:`retry` puts what was sent and not answered back.

    Parameters
    ----------
    model
        Name of the model; None: the server's default.
    limits
        Most cells and counts of a part, and parts in flight.
    policy, rng
        When to try again.
    """

    def __init__(
        self, *, model: str | None, limits: ChunkLimits, policy: RetryPolicy, rng: np.random.Generator
    ) -> None:
        self._model, self._limits, self._policy, self._rng = model, limits, policy, rng
        self._most = limits.cells
        self._chunks: deque[_Chunk] = deque()
        self._in_flight: deque[int] = deque()
        self._genes: NDArray[np.str_] | None = None
        self._next_row = 0
        self._maker: Maker | None = None
        self._attempt = 1
        self._careful = False
        self.n_cells = 0
        """Cells that were answered."""
        self.ended = False
        """Whether the caller has no more chunks."""

    @property
    def room(self) -> bool:
        """Whether one more part may be sent."""
        return len(self._in_flight) < (1 if self._careful else self._limits.at_a_time)

    @property
    def done(self) -> bool:
        """Whether all is answered."""
        return self.ended and not self._chunks

    def add(self, cells: CountMatrix) -> None:
        """One chunk more. Rows are counted on from the first one's.

        Raises
        ------
        MalformedMatrixError
            It has no cells, or other genes than the first.
        """
        if not len(cells):
            raise MalformedMatrixError(f"The chunk that begins with row {self._next_row} has no cells.", field="counts")
        if self._genes is None:
            self._genes, self._next_row = cells.gene_ids, cells.first_row
        elif cells.gene_ids is not self._genes and not np.array_equal(cells.gene_ids, self._genes):
            raise MalformedMatrixError(
                f"The chunk that begins with row {self._next_row} has other genes than the first; all chunks of a "
                "stream have the same, in the same order.",
                field="gene_ids",
            )
        # Without its own copy of the names: a source may give every chunk a new one.
        self._chunks.append(_Chunk(replace(cells, gene_ids=self._genes, first_row=self._next_row)))
        self._next_row += len(cells)

    def part(self) -> CountMatrix | None:
        """What is to be sent next, and counts as sent from now on; None if that needs another chunk."""
        for chunk in self._chunks:
            if chunk.sent < len(chunk.cells):
                indptr = chunk.cells.counts.indptr
                fitting = int(np.searchsorted(indptr, int(indptr[chunk.sent]) + self._limits.values, side="right")) - 1
                stop = min(len(chunk.cells), chunk.sent + self._most, max(chunk.sent + 1, fitting))
                part = chunk.cells[chunk.sent : stop]
                chunk.sent = stop
                self._in_flight.append(len(part))
                return part
        return None

    def land(self, found: Embeddings, *, first_row: int | None = None) -> Embeddings | None:
        """Take the answer of the oldest part in flight; the result of its chunk, once that is whole.

        Parameters
        ----------
        first_row
            Of which cell the answer says that it begins; None: it does not say.

        Raises
        ------
        ServerError
            It is not an answer to that part, or another model's.
        """
        expected = self._in_flight.popleft() if self._in_flight else 0
        if len(found) != expected:
            raise ServerError(f"The server sent {len(found)} embeddings for {expected} cells.")
        chunk = self._chunks[0]
        row = chunk.cells.first_row + chunk.answered
        if first_row not in (None, row):
            raise ServerError(f"The server answered row {first_row} in place of row {row}.")
        self._maker = self._maker or found.maker
        check_maker(self._maker, found.maker)
        chunk.parts.append(found)
        chunk.answered += len(found)
        self.n_cells += len(found)
        self._attempt, self._careful = 1, False
        if chunk.answered < len(chunk.cells):
            return None
        self._chunks.popleft()
        return join(chunk.parts)

    def start(self) -> StreamStart:
        """What opens a stream of all that is not answered; names the model that answered before."""
        head = self._chunks[0]
        return StreamStart(
            gene_ids=head.cells.gene_ids,
            model=self._maker[0] if self._maker else self._model,
            first_row=head.cells.first_row + head.answered,
        )

    def retry(self, failure: Failure) -> Pause:
        """Put back what was not answered, and say how long to wait. Raises the error where that makes no sense."""
        error, largest = failure.error, max(self._in_flight, default=1)
        self._in_flight.clear()
        for chunk in self._chunks:
            chunk.sent = chunk.answered
        if isinstance(error, LimitExceededError) and error.field != "gene_ids" and largest > 1:
            self._most = min(self._most, largest // 2)
            return Pause(0.0)
        if isinstance(error, UnknownModelError) and self._maker is not None:
            raise UnknownModelError(
                f"The model {self._maker[0]} embedded {self.n_cells} cells, and the server has it no more. Vectors of "
                "two models cannot be compared: embed all cells again.",
                field="model",
            ) from failure
        if failure.unheard and not self._careful:
            # With one part in flight nothing is being written when the server answers, so that it is heard.
            self._careful = True
            return Pause(0.0)
        # The server ends a stream that pauses too long, for instance while its caller works with a result.
        again = failure.retry or isinstance(error, DeadlineExceededError)
        if not again or self._attempt >= self._policy.attempts:
            raise error from failure.__cause__
        pause = self._policy.pause(self._attempt, error, self._rng)
        self._attempt += 1
        return pause

    def ask(self, part: CountMatrix) -> Conversation[Embeddings]:
        """Embed one part by requests of its own."""
        embedding = InChunks(part, self._model, self._policy, self._rng, self._most)
        found = yield from embedding.chunk(0, len(part))
        self._most = min(self._most, embedding.most)
        return found


def fill(flight: Flight, source: Iterator[CountMatrix]) -> Iterator[CountMatrix]:
    """Parts to be sent now, from as many chunks as that takes."""
    while flight.room:
        part = flight.part()
        if part is not None:
            yield part
        elif flight.ended:
            return
        else:
            cells = next(source, None)
            if cells is None:
                flight.ended = True
            else:
                flight.add(cells)


async def fill_async(flight: Flight, source: AsyncIterator[CountMatrix]) -> AsyncIterator[CountMatrix]:
    """As :func:`fill`."""
    while flight.room:
        part = flight.part()
        if part is not None:
            yield part
        elif flight.ended:
            return
        else:
            cells = await anext(source, None)
            if cells is None:
                flight.ended = True
            else:
                flight.add(cells)


async def each(chunks: Iterable[CountMatrix] | AsyncIterable[CountMatrix]) -> AsyncIterator[CountMatrix]:
    """Chunks of either kind of iterable."""
    if isinstance(chunks, AsyncIterable):
        async for cells in chunks:
            yield cells
    else:
        for cells in chunks:
            yield cells


class Later(Generic[T]):
    """A result that a thread is getting.

    Parameters
    ----------
    work
        Gets it.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._outcome: SimpleQueue[T | BaseException] = SimpleQueue()
        self._work = work
        # A daemon: an interrupted program need not wait for an answer that nobody wants any more.
        threading.Thread(target=self._run, daemon=True, name="perturbscope-client").start()

    def _run(self) -> None:
        try:
            self._outcome.put(self._work())
        except BaseException as error:  # noqa: BLE001  it is raised again where the caller waits
            self._outcome.put(error)

    def result(self) -> T:
        """Wait for it; once. Raises what `work` raised."""
        outcome = self._outcome.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
