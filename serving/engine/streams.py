"""Streams of cells: chunks in, vectors out, in constant memory however long the stream is.

A transport brings a :class:`Pipe`; :func:`answer_stream` does the rest. At most ``stream_chunks`` chunks are in
progress, from the moment when one was read to the moment when its answer was taken, and no more are read meanwhile. So
a caller that sends faster than the model works, or that does not read its answers, is held up by the flow control of
its connection, and memory does not grow.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import DeadlineExceededError, LimitExceededError, OverloadedError
from perturbscope.families.outputs import CELL_EMBEDDING, OutputSpec
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol.streams import StreamAnswer, StreamChunk, StreamOpened, StreamStart, StreamTotals
from serving.access import limits
from serving.access.limits import Held
from serving.call import GROWTH, Call
from serving.engine.engine import Engine, reserved_bytes
from serving.models.loading import ServedModel
from serving.telemetry.metrics import STREAMS

_MOMENT = 0.05
"""Seconds between two checks whether a chunk of this stream was answered."""
_GLANCE = 1.0
"""Seconds after which a stream that waits for its caller checks whether the server stops."""


class Pipe(Protocol):
    """The transport of a stream. Bytes are held as they arrive; the reader of a message gives them back."""

    async def start(self) -> tuple[Any, int]:
        """Read the message that opens the stream; return it with the bytes that are held for it. Bad input raises."""
        ...

    async def next(self) -> tuple[Any, int] | None:
        """Read the next chunk; return it undecoded, with the bytes that are held for it, or None at the end."""
        ...

    def weigh_start(self, message: Any) -> int:
        """Estimate the bytes that decoding the start takes beside it; blocks, for a worker thread."""
        ...

    def decode_start(self, message: Any) -> StreamStart:
        """Decode the start; blocks, for a worker thread."""
        ...

    def decode(self, message: Any, genes: NDArray[np.str_], first_row: int) -> CountMatrix:
        """Decode the cells of a chunk; blocks, for a worker thread."""
        ...

    def encode(self, answer: StreamAnswer) -> Any:
        """Encode an answer; blocks, for a worker thread."""
        ...

    async def write(self, message: Any) -> None:
        """Send an encoded answer; returns when there is room for the next."""
        ...


async def answer_stream(engine: Engine, call: Call, held: Held, pipe: Pipe) -> None:
    """Read, embed and answer one stream to its end, within :meth:`Front.admitted`.

    Raises
    ------
    PerturbScopeError
        As :meth:`Engine.embed` for the first chunk that cannot be answered; all chunks before it were. Also
        DeadlineExceededError, if the caller neither sends nor reads for ``body_timeout`` seconds, and OverloadedError,
        if the server stops.
    """
    with STREAMS.labels(call.transport).track_inprogress():
        await _Stream(engine, call, held, pipe).run()


class _Job(NamedTuple):
    """A chunk in progress."""

    first_row: int
    n_bytes: int
    """Bytes that are held for its message."""
    memory: int
    """Bytes that are held for its cells, tokens and vectors."""
    vectors: asyncio.Task[Embeddings]


class _Stream:
    """One stream."""

    def __init__(self, engine: Engine, call: Call, held: Held, pipe: Pipe) -> None:
        self._engine, self._call, self._held, self._pipe = engine, call, held, pipe
        self._settings = engine.settings
        self._patience = engine.settings.body_timeout
        self._slots = asyncio.Semaphore(engine.settings.stream_chunks)
        self._in_progress: asyncio.Queue[_Job | Exception | None] = asyncio.Queue()
        self._jobs: set[asyncio.Task[Any]] = set()
        self._genes: NDArray[np.str_] = np.zeros(0, dtype=np.str_)
        """Gene identifiers of all its cells, once they are checked."""
        self._outputs: tuple[OutputSpec, ...] = ()
        """Outputs that the stream asks for, once it is open."""
        self._unanswered = 0
        self._moved = time.monotonic()
        """Time on ``time.monotonic`` when a message was last read or an answer last taken."""

    async def run(self) -> None:
        """Read and answer chunks until all are answered."""
        message, n_bytes = await self._patiently(self._pipe.start)
        needed = await self._engine.work(self._pipe.weigh_start, message)
        self._held.reserve(needed)
        start = await self._engine.work(self._pipe.decode_start, message)
        self._held.release_reserved(needed)
        del message
        with self._engine.registry.lease(start.model) as model:
            opened = await self._open(model, start)
            self._held.release(n_bytes)
            await self._write(opened)
            reader = asyncio.ensure_future(self._read(model, start))
            try:
                end = (await self._answer()).end(opened)
            finally:
                # Whatever ended the stream: chunks that nobody waits for must not cost the model anything.
                tasks = [reader, *self._jobs]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        await self._write(end)

    async def _open(self, model: ServedModel, start: StreamStart) -> StreamOpened:
        """Answer the start; refuse genes that no cell could be embedded with before there are cells."""
        self._outputs = self._engine.wanted(model, start.outputs)
        settings, n_genes = self._settings, len(start.gene_ids)
        limits.check_shape(settings, 1, n_genes, n_genes)
        cells = await self._engine.work(start.every_gene)
        # Checked, and from now on the same array in all chunks.
        self._genes = cells.gene_ids
        tokens, _ = await self._engine.tokenize(model.embedder, cells)
        self._call.model, self._call.model_id = model.embedder, model.info.model_id
        return StreamOpened(
            model_id=model.embedder.model_id,
            vocabulary_hash=model.embedder.vocabulary_hash,
            coverage=tokens.coverage,
            width=model.embedder.width,
            chunks_in_progress=settings.stream_chunks,
            max_chunk_cells=settings.max_cells,
            max_chunk_bytes=settings.chunk_bytes,
            variant=model.embedder.variant,
            outputs=tuple(spec for spec in self._outputs if spec.name != CELL_EMBEDDING),
        )

    async def _read(self, model: ServedModel, start: StreamStart) -> None:
        """Put chunk after chunk into the queue, then None, or the error that stops reading."""
        row = start.first_row
        try:
            while True:
                await self._slots.acquire()
                self._go_on()
                found = await self._patiently(self._pipe.next)
                if found is None:
                    self._in_progress.put_nowait(None)
                    return
                message, n_bytes = found
                self._unanswered += 1
                memory = await self._reserve(GROWTH * n_bytes)
                with self._call.stage("decode"):
                    cells = await self._engine.work(self._pipe.decode, message, self._genes, row)
                del message, found
                limits.check_shape(self._settings, len(cells), cells.n_genes, int(cells.counts.nnz))
                await self._when_there_is_room(functools.partial(self._call.take, len(cells)))
                memory += await self._reserve(reserved_bytes(model.embedder, cells, self._outputs, self._call))
                job = asyncio.ensure_future(self._embed(model, cells))
                self._jobs.add(job)
                self._in_progress.put_nowait(_Job(row, n_bytes, memory, job))
                row += len(cells)
        except Exception as error:  # noqa: BLE001  it is raised again, after the answers of the chunks before it
            self._in_progress.put_nowait(error)

    async def _embed(self, model: ServedModel, cells: CountMatrix) -> Embeddings:
        """Embed a chunk, once the queue has room: a stream waits where a request would be refused."""
        engine, call = self._engine, self._call
        with call.stage("tokenize"):
            tokens, seconds = await engine.tokenize(model.embedder, cells)
        cost, flow = int(model.embedder.limits.costs_of(tokens.lengths).sum()), call.caller.name
        await self._when_there_is_room(lambda: model.dispatcher.check_room(cost, flow))
        values, timings = await engine.infer_tokens(model, tokens, call, [spec.name for spec in self._outputs])
        return model.embedder.describe(tokens, values, {"tokenize": seconds, **timings})

    async def _reserve(self, n_bytes: int) -> int:
        """Hold memory for a chunk's cells, tokens and vectors; it is given back with the answer."""
        await self._when_there_is_room(functools.partial(self._held.reserve, n_bytes))
        return n_bytes

    async def _when_there_is_room(self, ask: Callable[[], None]) -> None:
        """Call `ask` until there is room; not for ever, and not when the server stops."""
        until = time.monotonic() + self._patience
        while True:
            try:
                return ask()
            except OverloadedError as error:
                if self._engine.admission.closed or time.monotonic() + error.retry_after > until:
                    raise
                await asyncio.sleep(error.retry_after)
            except LimitExceededError:
                # Too much for one request may be too much beside the chunks before it.
                if self._unanswered == 1:
                    raise
                await asyncio.sleep(_MOMENT)

    async def _answer(self) -> StreamTotals:
        """Send the answers in the order of the chunks."""
        totals = StreamTotals()
        while (found := await self._in_progress.get()) is not None:
            if isinstance(found, Exception):
                raise found
            embeddings = await found.vectors
            await self._write(StreamChunk(first_row=found.first_row, embeddings=embeddings))
            totals.add(embeddings)
            self._jobs.discard(found.vectors)
            self._held.release(found.n_bytes)
            self._held.release_reserved(found.memory)
            self._unanswered -= 1
            self._slots.release()
        return totals

    async def _write(self, answer: StreamAnswer) -> None:
        with self._call.stage("encode"):
            message = await self._engine.work(self._pipe.encode, answer)
        try:
            async with asyncio.timeout(self._patience):
                await self._pipe.write(message)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"The answers of the stream were not read for {self._patience} seconds. Read them while you send; go "
                "on with a new stream at the first cell without an answer.",
                field="stream",
            ) from error
        self._moved = time.monotonic()

    async def _patiently(self, read: Callable[[], Any]) -> Any:
        """Read the next message. The caller has ``body_timeout`` seconds once everything that it sent is answered."""
        waiting = asyncio.ensure_future(read())
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=min(_GLANCE, self._patience))
                if waiting.done():
                    break
                self._go_on()
                if not self._unanswered and time.monotonic() - self._moved >= self._patience:
                    raise DeadlineExceededError(
                        f"No whole chunk arrived within {self._patience} seconds. Send smaller ones, or go on with a "
                        "new stream when there are more cells.",
                        field="stream",
                    )
            self._moved = time.monotonic()
            return waiting.result()
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    def _go_on(self) -> None:
        """Raise OverloadedError if the server stops, so that nothing more is read."""
        if self._engine.admission.closed:
            raise OverloadedError(
                "The server is shutting down. Go on with a new stream at the first cell without an answer, here or on "
                "another server.",
                retry_after=5.0,
            )


def check_chunk(n_bytes: int, limit: int) -> None:
    """Refuse a message that is too large; called before it is kept. Raises LimitExceededError."""
    if n_bytes > limit:
        raise LimitExceededError(
            f"A message of the stream has {n_bytes:,} bytes; this server takes {limit:,}. Send fewer cells at a time.",
            field="chunk",
        )
