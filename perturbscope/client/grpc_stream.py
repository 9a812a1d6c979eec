"""Streams of cells over gRPC, blocking and asynchronous: one call, until it ends or breaks off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, cast

from perturbscope.cells.counts import CountMatrix
from perturbscope.client.conversation import Failure
from perturbscope.client.streams import Flight, fill, fill_async
from perturbscope.client.transports import grpc_failure
from perturbscope.errors import InvalidInputError, ServerError, ServerUnreachableError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol.protobuf_streams import (
    stream_answer_from_proto,
    stream_cells_to_proto,
    stream_start_to_proto,
)
from perturbscope.protocol.streams import StreamChunk, StreamEnd, StreamOpened

Progress = Callable[[int], None] | None

_RESET, _WRITE_FAILED = "RST_STREAM", "Internal error from Core"
"""Details of the status INTERNAL with which grpc reports a stream that was reset, and grpc.aio a failed write."""


@dataclass(kw_only=True)
class StreamCall:
    """A call of ``EmbedStream``, blocking or asynchronous.

    Parameters
    ----------
    method
        Method ``EmbedStream`` of a stub, whose only missing argument is the iterator of requests.
    target
        Address of the server, for messages.
    timeout
        Seconds to wait for one answer.
    """

    method: Callable[[Any], Any]
    target: str
    timeout: float

    def results(self, flight: Flight, source: Iterator[CountMatrix], progress: Progress) -> Iterator[Embeddings]:
        """Yield results until every cell is answered. Raises :class:`Failure` if the stream breaks off."""
        outbox: SimpleQueue[Any] = SimpleQueue()
        reading = _Reading(flight, self.target, progress)
        call = None
        try:
            while not reading.ended:
                for part in fill(flight, source):
                    if call is None:
                        outbox.put(stream_start_to_proto(flight.start()))
                        call = self.method(iter(outbox.get, None))
                    outbox.put(stream_cells_to_proto(part))
                if call is None:
                    return
                if flight.done:
                    outbox.put(None)
                result = reading.take(self._next(call))
                if result is not None:
                    yield result
        finally:
            outbox.put(None)
            if call is not None:
                call.cancel()

    def _next(self, call: Any) -> Any:
        """Return the next message; None at the end."""
        import grpc

        late = threading.Event()

        def give_up() -> None:
            late.set()
            call.cancel()

        watch = threading.Timer(self.timeout, give_up)
        watch.daemon = True
        watch.start()
        try:
            return next(call, None)
        except grpc.RpcError as error:
            raise self._failure(error, late=late.is_set()) from error
        finally:
            watch.cancel()

    async def results_async(
        self, flight: Flight, source: AsyncIterator[CountMatrix], progress: Progress
    ) -> AsyncGenerator[Embeddings, None]:
        """Yield the results like :meth:`results`, asynchronously."""
        outbox: asyncio.Queue[Any] = asyncio.Queue()
        reading = _Reading(flight, self.target, progress)
        call = None

        async def requests() -> AsyncIterator[Any]:
            while (message := await outbox.get()) is not None:
                yield message

        try:
            while not reading.ended:
                async for part in fill_async(flight, source):
                    if call is None:
                        outbox.put_nowait(stream_start_to_proto(flight.start()))
                        call = self.method(requests())
                        # Before cells are written: see _failure.
                        reading.take(await self._read(call))
                    outbox.put_nowait(stream_cells_to_proto(part))
                if call is None:
                    return
                if flight.done:
                    outbox.put_nowait(None)
                result = reading.take(await self._read(call))
                if result is not None:
                    yield result
        finally:
            outbox.put_nowait(None)
            if call is not None:
                call.cancel()

    async def _read(self, call: Any) -> Any:
        """Return the next message; None at the end."""
        import grpc.aio

        try:
            async with asyncio.timeout(self.timeout):
                message = await call.read()
        except grpc.aio.AioRpcError as error:
            raise self._failure(error, late=False) from error
        except TimeoutError as error:
            raise Failure(_too_late(self.target), retry=False) from error
        return None if message is grpc.aio.EOF else message

    def _failure(self, error: Any, *, late: bool) -> Failure:
        if late:
            return Failure(_too_late(self.target), retry=False)
        status, details = error.code().name, error.details() or ""
        # grpc.aio loses the status with which a server ends a stream while a message is being written (grpcio 1.85).
        unheard = status == "INTERNAL" and _WRITE_FAILED in details
        # A server that stops cancels its calls.
        if unheard or status == "CANCELLED" or (status == "INTERNAL" and _RESET in details):
            status = "UNAVAILABLE"
        failure = grpc_failure(status, details, cast("Any", error.trailing_metadata()), self.target)
        failure.unheard = unheard
        return failure


@dataclass
class _Reading:
    """Reads the messages of the server, in their order."""

    flight: Flight
    target: str
    progress: Progress
    opened: StreamOpened | None = None
    ended: bool = False

    def take(self, message: Any) -> Embeddings | None:
        """Take a message; return a result if the message completes one."""
        if message is None:
            raise Failure(ServerUnreachableError(f"The stream from {self.target} was cut off before its end."))
        try:
            answer = stream_answer_from_proto(message, self.opened)
        except InvalidInputError as error:
            raise Failure(ServerError(f"The answer of EmbedStream cannot be read: {error.message}")) from error
        match answer:
            case StreamOpened():
                self.opened = answer
            case StreamChunk():
                if self.progress:
                    self.progress(len(answer.embeddings))
                return self.flight.land(answer.embeddings, first_row=answer.first_row)
            case StreamEnd():
                if not self.flight.done:
                    raise Failure(ServerError(f"The server ended the stream after {answer.n_cells} cells, too early."))
                self.ended = True
        return None


def _too_late(target: str) -> ServerUnreachableError:
    return ServerUnreachableError(
        f"No answer from {target} in time. Send fewer cells at a time, or allow a longer timeout."
    )
