"""Streams of cells over HTTP: an Arrow IPC stream in, an Arrow IPC stream out, at the same time.

The answer begins while the body still arrives. A caller that sends everything before it reads anything is served as
long as the buffers of the connection hold the answers (some thousand cells); then both sides wait for each other, and
after ``body_timeout`` seconds the server gives up: it answers no more, and reads and discards the rest of the body, so
that the caller comes to read the answers so far, and the error.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError, PerturbScopeError, UnsupportedMediaTypeError
from perturbscope.protocol.arrow_streams import (
    PREFIX_BYTES,
    StreamAnswerWriter,
    StreamRequestReader,
    message_length,
    metadata_length,
)
from perturbscope.protocol.streams import StreamAnswer, StreamChunk, StreamStart
from serving.access.front import Front
from serving.access.limits import Held, decoded_bytes
from serving.call import REQUEST_ID, Call
from serving.engine.engine import Engine
from serving.engine.status import explain
from serving.engine.streams import answer_stream
from serving.http.edge import CLIENT_GONE, error_response, peer_of, refuse_encoded

PATH = "/v1/embed/stream"
_LAST_WORDS = 30
"""Seconds within which a caller must read why its stream is broken off; or ``body_timeout``, if that is less."""
_AT_THE_END = 3
"""The same when the server stops."""


class HttpPipe:
    """The two bodies of one request; see :class:`serving.engine.streams.Pipe`."""

    def __init__(self, receive: Receive, send: Send, call: Call, held: Held, limit: int) -> None:
        self._receive, self._send, self._call, self._held, self._limit = receive, send, call, held, limit
        self._buffer = bytearray()
        self._more = True
        self._reader, self._writer = StreamRequestReader(), StreamAnswerWriter()
        self.begun = False
        """Whether the status has been sent."""
        self.row = 0
        """Row of the first cell whose answer has not been sent."""
        self._over = asyncio.Event()
        """Set when nothing more of the body is to be read."""
        self._left = False

    async def start(self) -> tuple[Any, int]:
        """See :meth:`Pipe.start`."""
        found = await self.next()
        if found is None:
            raise InvalidParameterError("The Arrow stream is empty; it begins with a schema.", field="body")
        return found

    async def next(self) -> tuple[Any, int] | None:
        """See :meth:`Pipe.next`. The length that a message claims is checked before the message is read."""
        prefix = await self._take(PREFIX_BYTES)
        length = metadata_length(prefix, self._limit)
        if not length:
            await self._skip()
            return None
        metadata = await self._take(length)
        rest = message_length(metadata, self._limit)
        n_bytes = PREFIX_BYTES + length + rest
        self._held(n_bytes)
        return b"".join((prefix, metadata, await self._take(rest))), n_bytes

    async def _take(self, n_bytes: int) -> bytes:
        """Take `n_bytes` of the body, or all that are left."""
        while len(self._buffer) < n_bytes and self._more:
            await self._fill()
        found = bytes(memoryview(self._buffer)[:n_bytes])
        del self._buffer[:n_bytes]
        return found

    async def _fill(self) -> None:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._left = True
            self._over.set()
            raise ClientDisconnect
        self._buffer += message.get("body", b"")
        self._more = message.get("more_body", False)

    async def _skip(self) -> None:
        """Discard the rest of the body, after the end mark."""
        while self._more:
            self._buffer.clear()
            await self._fill()
        self._buffer.clear()
        self._over.set()

    def weigh_start(self, message: Any) -> int:
        """See :meth:`Pipe.weigh_start`."""
        return decoded_bytes(protocol.ARROW, message)

    def decode_start(self, message: Any) -> StreamStart:
        """See :meth:`Pipe.decode_start`."""
        start = self._reader.start(message)
        self.row = start.first_row
        return start

    def decode(self, message: Any, genes: NDArray[np.str_], first_row: int) -> CountMatrix:
        """See :meth:`Pipe.decode`."""
        return self._reader.cells(message, genes, first_row)

    def encode(self, answer: StreamAnswer) -> Any:
        """See :meth:`Pipe.encode`."""
        row = self.row + len(answer.embeddings) if isinstance(answer, StreamChunk) else self.row
        return self._writer.write(answer), row

    async def write(self, message: Any) -> None:
        """See :meth:`Pipe.write`."""
        if not self.begun:
            headers = [(b"content-type", protocol.ARROW.encode()), (REQUEST_ID.encode(), self._call.id.encode())]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self.begun = True
        body, row = message
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self.row = row

    async def end(self) -> None:
        """End the answer."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: PerturbScopeError, seconds: float) -> None:
        """Say why the answer breaks off; as its body has no end, the server then closes the connection.

        Meanwhile, for at most `seconds`, the rest of the request is read and discarded: the caller may read nothing
        before everything is sent, and a connection that is closed with bytes unread loses the last answers.
        """
        body = self._writer.error(error, self.row)
        saying = asyncio.ensure_future(self._send({"type": "http.response.body", "body": body, "more_body": True}))
        try:
            with contextlib.suppress(TimeoutError, ClientDisconnect):
                async with asyncio.timeout(seconds):
                    while self._more:
                        self._buffer.clear()
                        await self._fill()
                    await saying
        finally:
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)

    async def gone(self) -> None:
        """Return when the caller has gone away. While there is more to read, only reading notices that."""
        await self._over.wait()
        while not self._left:
            self._left = (await self._receive())["type"] == "http.disconnect"


class StreamedAnswer(Response):
    """Answers a stream while its request arrives; made before any of the body is read."""

    def __init__(self, request: Request) -> None:
        super().__init__(media_type=protocol.ARROW)
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request; each gets an answer and a line in the log."""
        request = self._request
        engine: Engine = request.app.state.engine
        call = Front.begin(PATH, "http", request.headers, peer=peer_of(scope), method=request.method)
        status, code = 200, "ok"
        pipe: HttpPipe | None = None
        try:
            async with engine.front.admitted(call) as held:
                _check_type(request)
                pipe = HttpPipe(receive, send, call, held, engine.settings.chunk_bytes)
                await _while_there(pipe, answer_stream(engine, call, held, pipe))
            await pipe.end()
        except ClientDisconnect:
            status, code = CLIENT_GONE, "client_gone"
        except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
            told = explain(error, call)
            code = told.code
            if pipe is not None and pipe.begun:
                patience = _AT_THE_END if engine.admission.closed else _LAST_WORDS
                await pipe.fail(told, min(patience, engine.settings.body_timeout))
            else:
                response = error_response(told)
                response.headers[REQUEST_ID] = call.id
                status = response.status_code
                await response(scope, receive, send)
        except BaseException:
            Front.finish(call, CLIENT_GONE, "client_gone")
            raise
        Front.finish(call, status, code)


def _check_type(request: Request) -> None:
    refuse_encoded(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != protocol.ARROW:
        raise UnsupportedMediaTypeError(
            f"The content type {kind[:60] or '(none)'!r} is not understood here; send {protocol.ARROW}, or use "
            "/v1/embed.",
            field="content-type",
        )
    if request.query_params:
        name = next(iter(request.query_params))
        raise InvalidParameterError(
            f"The query parameter {name[:60]!r} has no effect here; put it into the metadata of the schema.",
            field=name[:60],
        )


async def _while_there(pipe: HttpPipe, work: Any) -> None:
    """Await `work`, which is cancelled when the caller goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(pipe.gone())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
