"""Streams of chunks: what a client keeps of a stream, and how it continues after a failure. No network.

Over gRPC a stream is one call with messages in both directions. Over HTTP it is one request a part, several of them in
flight: HTTP/1.1 clients and many proxies send a whole request before they read its answer, and each of those requests
can go to another replica, and is repeated alone. The price is that each repeats the names of the genes; use gRPC if
that matters. (The server's ``/v1/embed/stream`` is for callers without this client.)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import as_counts
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
from perturbscope.inference.embeddings import Embeddings, Maker, join
from perturbscope.protocol.messages import EmbedRequest
from perturbscope.protocol.operations import EMBED
from perturbscope.protocol.streams import StreamStart

T = TypeVar("T")


@dataclass
class _Chunk:
    """A chunk of the caller that is not answered completely."""

    cells: CountMatrix
    sent: int = 0
    answered: int = 0
    parts: list[Embeddings] = field(default_factory=list)


class Flight:
    """The unanswered part of a stream, which is all that a client keeps of it.

    Chunks are cut into parts that the server takes; :meth:`land` takes their answers in order, and gives one result a
    chunk. After a failure, :meth:`retry` puts back the parts that were sent and not answered.

    Parameters
    ----------
    model
        Name of the model; None: the server's default.
    limits
        Most cells and counts of a part, and most parts in flight.
    policy, rng
        When to try again.
    outputs
        Names of outputs that are wanted beside the cell embedding.
    """

    def __init__(
        self,
        *,
        model: str | None,
        limits: ChunkLimits,
        policy: RetryPolicy,
        rng: np.random.Generator,
        outputs: tuple[str, ...] | None = None,
    ) -> None:
        self._outputs = outputs
        self._model, self._limits, self._policy, self._rng = model, limits, policy, rng
        self._most = limits.cells
        self._chunks: deque[_Chunk] = deque()
        self._in_flight: deque[int] = deque()
        self._genes: NDArray[np.str_] | None = None
        self._next_row = 0
        self._maker: Maker | None = None
        self._attempt, self._waited = 1, 0.0
        self._careful = False
        self.n_cells = 0
        """Number of cells that were answered."""
        self.ended = False
        """Whether the caller has no more chunks."""

    @property
    def room(self) -> bool:
        """Whether one more part may be sent."""
        return len(self._in_flight) < (1 if self._careful else self._limits.at_a_time)

    @property
    def done(self) -> bool:
        """Whether every cell is answered."""
        return self.ended and not self._chunks

    def add(self, cells: CountMatrix | None) -> None:
        """Add a chunk, or None after the last one. Rows are numbered from the first row of the first chunk.

        Raises
        ------
        MalformedMatrixError
            The chunk has no cells, or other genes than the first.
        """
        if cells is None:
            self.ended = True
            return
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
        # A source may give every chunk a new copy of the names; one is enough.
        self._chunks.append(_Chunk(replace(cells, gene_ids=self._genes, first_row=self._next_row)))
        self._next_row += len(cells)

    def part(self) -> CountMatrix | None:
        """Return the part to send next, which counts as sent from now on; None if another chunk is needed for it."""
        for chunk in self._chunks:
            if chunk.sent < len(chunk.cells):
                stop = self._limits.end(chunk.cells, chunk.sent, self._most)
                part = chunk.cells[chunk.sent : stop]
                chunk.sent = stop
                self._in_flight.append(len(part))
                return part
        return None

    def land(self, answer: Embeddings, *, first_row: int | None = None) -> Embeddings | None:
        """Take the answer of the oldest part in flight; return the result of its chunk if that is complete.

        Parameters
        ----------
        answer
            Embeddings of the part.
        first_row
            Row of the first cell as the answer states it; None if it states none.

        Raises
        ------
        ServerError
            The answer does not belong to that part, or another model made it.
        """
        expected = self._in_flight.popleft() if self._in_flight else 0
        if len(answer) != expected:
            raise ServerError(f"The server sent {len(answer)} embeddings for {expected} cells.")
        chunk = self._chunks[0]
        row = chunk.cells.first_row + chunk.answered
        if first_row not in (None, row):
            raise ServerError(f"The server answered row {first_row} in place of row {row}.")
        self._maker = self._maker or answer.maker
        check_maker(self._maker, answer.maker)
        chunk.parts.append(answer)
        chunk.answered += len(answer)
        self.n_cells += len(answer)
        self._attempt, self._waited, self._careful = 1, 0.0, False
        if chunk.answered < len(chunk.cells):
            return None
        self._chunks.popleft()
        return join(chunk.parts)

    def start(self) -> StreamStart:
        """Return the start of a stream of all cells that are not answered; it names the model that answered before."""
        head = self._chunks[0]
        return StreamStart(
            gene_ids=head.cells.gene_ids,
            model=self._maker[0] if self._maker else self._model,
            first_row=head.cells.first_row + head.answered,
            outputs=self._outputs,
        )

    def retry(self, failure: Failure) -> Pause:
        """Put back the parts without an answer and return the wait; raise the error if trying again makes no sense."""
        error, largest = failure.error, max(self._in_flight, default=1)
        self._in_flight.clear()
        for chunk in self._chunks:
            chunk.sent = chunk.answered
        if isinstance(error, LimitExceededError) and error.field != "gene_ids" and largest > 1:
            self._most = min(self._most, largest // 2)
            return Pause(0.0)
        if isinstance(error, UnknownModelError) and self._maker is not None:
            raise UnknownModelError(
                f"The model {self._maker[0]} embedded {self.n_cells} cells, and the server no longer has it. Vectors "
                "of two models cannot be compared: embed all cells again.",
                field="model",
            ) from failure
        if failure.unheard and not self._careful:
            # With one part in flight nothing is being written when the server answers, so that it is heard.
            self._careful = True
            return Pause(0.0)
        # The server ends a stream that pauses too long, for instance while its caller works with a result.
        again = failure.retry or isinstance(error, DeadlineExceededError)
        pause = self._policy.pause(self._attempt, error, self._rng, self._waited) if again else None
        if pause is None:
            raise error from failure.__cause__
        self._attempt, self._waited = self._attempt + 1, self._waited + pause.seconds
        return pause

    def ask(self, part: CountMatrix) -> Conversation[Embeddings]:
        """Embed one part by requests of its own."""
        request = EmbedRequest(cells=part, model=self._model, outputs=self._outputs)
        embedding = InChunks(EMBED, request, self._policy, self._rng, self._most)
        answer = yield from embedding.chunk(0, len(part))
        self._most = min(self._most, embedding.most)
        return answer


def fill(flight: Flight, source: Iterator[CountMatrix]) -> Iterator[CountMatrix]:
    """Yield the parts to send now, from as many chunks as they take."""
    while flight.room:
        if (part := flight.part()) is not None:
            yield part
        elif flight.ended:
            return
        else:
            flight.add(next(source, None))


async def fill_async(flight: Flight, source: AsyncIterator[CountMatrix]) -> AsyncIterator[CountMatrix]:
    """Fill parts like :func:`fill`, from an asynchronous source."""
    while flight.room:
        if (part := flight.part()) is not None:
            yield part
        elif flight.ended:
            return
        else:
            flight.add(await anext(source, None))


def chunks_of(cells: Any) -> Iterator[CountMatrix]:
    """Yield the raw counts of each chunk; an AnnData object is a chunk, and is one alone too. As :func:`as_counts`."""
    return map(as_counts, [cells] if hasattr(cells, "obs_names") else cells)


async def each(chunks: Iterable[CountMatrix] | AsyncIterable[CountMatrix]) -> AsyncIterator[CountMatrix]:
    """Yield the chunks of either kind of iterable."""
    if isinstance(chunks, AsyncIterable):
        async for cells in chunks:
            yield as_counts(cells)
    else:
        for cells in chunks_of(chunks):
            yield cells


class Later(Generic[T]):
    """A result that a thread of its own computes.

    Parameters
    ----------
    work
        Function that returns the result.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._outcome: SimpleQueue[T | BaseException] = SimpleQueue()
        self._work = work
        # A daemon thread: an interrupted program does not wait for an answer that nobody needs any more.
        threading.Thread(target=self._run, daemon=True, name="perturbscope-client").start()

    def _run(self) -> None:
        try:
            self._outcome.put(self._work())
        except BaseException as error:  # noqa: BLE001  result() raises it
            self._outcome.put(error)

    def result(self) -> T:
        """Wait for the result, once. Raises what `work` raised."""
        outcome = self._outcome.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
