"""The edge of the HTTP server: every request is admitted, read within the limits and answered; errors are answers too.

:class:`Endpoint` stands around each route; :class:`OperationEndpoint` reads, calls the engine and encodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from perturbscope import protocol
from perturbscope.errors import (
    InvalidParameterError,
    LimitExceededError,
    OverloadedError,
    PerturbScopeError,
    UnauthenticatedError,
    UnsupportedMediaTypeError,
)
from serving.access.front import Front
from serving.access.limits import Held, decoded_bytes, too_many_bytes
from serving.call import GROWTH, JSON_GROWTH, REQUEST_ID, Call, Right
from serving.engine.engine import Engine, kept_bytes
from serving.engine.operations import Served
from serving.engine.reports import HTML
from serving.engine.scores import annotated, read_from_file
from serving.engine.status import explain, status_of
from serving.http.files import HDF5_TYPES, MULTIPART, room_on_disk, write_file
from serving.http.upload_page import PAGE_HEADERS
from serving.uploads.folder import upload_folder
from serving.uploads.readers import file_readers
from serving.uploads.requests import FILE_NAME, Upload

T = TypeVar("T")
OPEN_INFERENCE = "/v2"
"""Path of the Open Inference Protocol, which has an error form of its own."""
Work = Callable[[Request, Call, Held], Awaitable[Response]]
"""Makes the answer to an admitted request; it calls the third argument with the number of bytes that it reads."""
CLIENT_GONE = 499
"""Status of a request whose caller went away: for the log and the metrics only."""


class Endpoint:
    """One route: lets a caller in, does the work, answers.

    Parameters
    ----------
    path
        Path of the route, with names in braces where callers choose: for the log.
    work
        Makes the answer.
    right
        Right that the caller needs.
    """

    def __init__(self, path: str, work: Work, right: Right = "infer") -> None:
        self._path, self._work, self._right = path, work, right

    async def answer(self, request: Request) -> Response:
        """Answer a request whose body is not read yet; every failure becomes an error answer and a line of the log."""
        front: Front = request.app.state.engine.front
        call = front.begin(self._path, "http", request.headers, peer=peer_of(request.scope), method=request.method)
        code = "ok"
        try:
            async with front.admitted(call, self._right) as held:
                refuse_encoded(request)
                response = await self._work(request, call, held)
        except ClientDisconnect:
            code, response = "client_gone", Response(status_code=CLIENT_GONE)
        except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
            explained = explain(error, call)
            code, response = explained.code, error_response(explained, request.url.path)
        response.headers[REQUEST_ID] = call.id
        front.finish(call, response.status_code, code)
        return response


class OperationEndpoint(Endpoint):
    """The route of an operation of the engine: reads the body, calls the engine, encodes its answer."""

    def __init__(self, operation: Served) -> None:
        super().__init__(operation.path, self._operate)
        self._operation = operation

    async def _operate(self, request: Request, call: Call, held: Held) -> Response:
        engine: Engine = request.app.state.engine
        upload = await read_request(LimitedBody(request, engine, held, call), self._operation, engine)
        encode = self._operation.encode
        wants_arrow = protocol.ARROW in encode and protocol.ARROW in request.headers.get("accept", "")
        media_type = protocol.ARROW if wants_arrow else next(iter(encode))
        call.growth = GROWTH if wants_arrow else JSON_GROWTH
        body = await while_connected(request, self._encoded(engine, upload, media_type, call))
        return Response(body, headers=PAGE_HEADERS if media_type == HTML else None, media_type=media_type)

    async def _encoded(self, engine: Engine, upload: Upload, media_type: str, call: Call) -> bytes:
        answer = await self._operation.call(engine, upload.request, call)
        if upload.file is not None or upload.warnings:
            answer = annotated(answer, upload.warnings, engine.scores.seen(upload.request, upload.file, call))
            answer = read_from_file(answer, upload.left_out, round_counts=upload.round_counts)
        with call.stage("encode"):
            return await engine.work(self._operation.encode[media_type], answer)


class LimitedBody:
    """A request whose body is counted, and timed, while it arrives.

    Parameters
    ----------
    request
        The request, whose body is not read yet.
    engine
        Has the limits.
    held
        Called with the number of bytes as they arrive.
    call
        The call that is timed.
    """

    def __init__(self, request: Request, engine: Engine, held: Callable[[int], None], call: Call | None = None) -> None:
        self.call = call or Call(request.url.path, "http")
        self.headers = request.headers
        self.content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.query = dict(request.query_params)
        json = self.content_type == protocol.JSON
        self._limit = min(engine.settings.max_json_bytes if json else 2**63, engine.settings.max_body_bytes)
        self._timeout = engine.settings.body_timeout
        self._held = held
        self._received = 0
        self._receive: Receive = request.receive
        self.request = Request(request.scope, self._counted)

    async def _counted(self) -> Message:
        """Receive the next message of the body, and count it."""
        message = await self._receive()
        n_bytes = len(message.get("body", b""))
        self._received += n_bytes
        if self._received > self._limit:
            raise too_many_bytes(self._limit, self.content_type)
        self._held(n_bytes)
        return message

    @contextlib.asynccontextmanager
    async def timed(self) -> AsyncIterator[None]:
        """Time the reading of :attr:`request`, and end it when it takes too long."""
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            raise too_many_bytes(self._limit, self.content_type)
        try:
            with self.call.stage("receive"):
                async with asyncio.timeout(self._timeout):
                    yield
        except TimeoutError as error:
            raise LimitExceededError(
                f"The body did not arrive within {self._timeout} seconds. Send less at a time.", field="body"
            ) from error

    async def body(self) -> bytes:
        """Read the whole body."""
        async with self.timed():
            return await self.request.body()

    async def decoded(self, engine: Engine, decode: Callable[[bytes], T], body: bytes) -> T:
        """Decode a body. The memory for decoding is held before, and that of the outcome until the call ends."""
        with self.call.stage("decode"):
            needed = await engine.work(decoded_bytes, self.content_type, body, engine.settings.max_json_bytes)
            self.call.reserve(needed)
            decoded = await engine.work(decode, body)
        if self.call.held is not None:
            self.call.held.release_reserved(needed)
        self.call.reserve(kept_bytes(decoded))
        return decoded


async def read_request(body: LimitedBody, operation: Served, engine: Engine) -> Upload:
    """Read the request in a body of JSON or Arrow, or in an uploaded .h5ad file."""
    kind = body.content_type
    if operation.operation is not None and not operation.has_body:
        return Upload(operation.operation.request())
    if kind in operation.decode:
        if body.query:
            raise InvalidParameterError(
                f"The query parameter {next(iter(body.query))!r} has no effect here; put it into the body.",
                field=next(iter(body.query)),
            )
        return Upload(await body.decoded(engine, operation.decode[kind], await body.body()))
    if kind not in (*HDF5_TYPES, MULTIPART) or not operation.uploads:
        files = f"an .h5ad file as {protocol.HDF5}, or a form ({MULTIPART}) with the .h5ad file in the field 'file'"
        understood = [*operation.decode, files] if operation.uploads else [" or ".join(operation.decode)]
        raise UnsupportedMediaTypeError(
            f"The content type {kind or '(none)'!r} is not understood. Send {', '.join(understood)}.",
            field="content-type",
        )
    with room_on_disk(), tempfile.TemporaryDirectory(dir=upload_folder().path()) as directory:
        path = Path(directory) / FILE_NAME
        async with body.timed():
            fields, name = await write_file(body.request, kind, path)
        with body.call.stage("decode"):
            parts: list[int] = []

            def hold(n_bytes: int) -> None:
                # The frame of the reader, and what is made of it.
                body.call.reserve((1 + GROWTH) * n_bytes)
                parts.append((1 + GROWTH) * n_bytes)

            parameters, settings = {**body.query, **fields}, engine.settings
            upload = await file_readers().read(operation.name, path, parameters, settings, hold, name=name)
        if body.call.held is not None:
            body.call.held.release_reserved(sum(parts))
        body.call.reserve(kept_bytes(upload.request))
        return upload


def peer_of(scope: Scope) -> str:
    """Address of the client; empty if it is not known."""
    return str((scope.get("client") or [""])[0])


def refuse_encoded(request: Request) -> None:
    """Refuse a compressed body: it would be counted packed, and grow once it is let in."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaTypeError(
            f"The content encoding {encoding[:40]!r} is not understood. Send the body as it is; an .h5ad file may be "
            "compressed inside.",
            field="content-encoding",
        )


def error_response(error: PerturbScopeError, path: str = "") -> Response:
    """Return the answer that tells of an error, in the form that callers of `path` know."""
    headers = {}
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if isinstance(error, UnauthenticatedError):
        headers["www-authenticate"] = "Bearer"
    return Response(error_body(error, path), status_of(error).http, headers, media_type=protocol.JSON)


def error_body(error: PerturbScopeError, path: str) -> bytes:
    """``{"error": {"code", "message", "field"}}``, and in the Open Inference Protocol ``{"error": message}``."""
    if path == OPEN_INFERENCE or path.startswith(OPEN_INFERENCE + "/"):
        return json.dumps({"error": error.message}).encode()
    return protocol.error_to_json(error)


async def while_connected(request: Request, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """Return the result of `work`, which is cancelled when the client goes away: its cells then cost nothing more."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
