"""The edge of the HTTP server: every request meets a doorkeeper, and gets an answer, an id and a line of the log.

:class:`EdgeMiddleware` stands around the whole server, BentoML's own pages included; :class:`Endpoint` around each
route of ours, where rights, shares and deadlines are checked too (:class:`serving.access.front.Front`).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perturbscope import protocol
from perturbscope.errors import (
    InvalidParameterError,
    OverloadedError,
    PermissionDeniedError,
    PerturbScopeError,
    UnauthenticatedError,
    UnsupportedMediaTypeError,
)
from serving.access.front import Front
from serving.access.limits import Held
from serving.call import GROWTH, JSON_GROWTH, REQUEST_ID, Call, Right
from serving.engine.engine import Engine
from serving.engine.operations import Operation
from serving.engine.reports import HTML
from serving.engine.scores import annotated
from serving.engine.status import explain, status_of
from serving.http.bodies import LimitedBody, read_request
from serving.http.upload_page import PAGE_HEADERS
from serving.telemetry.metrics import OTHER
from serving.uploads.requests import Upload

T = TypeVar("T")
OPEN = frozenset({"/", "/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""Paths without a key: they tell nothing but whether the server is well, or are the empty upload page."""
METRICS = "/metrics"
_MAY_READ_METRICS = frozenset({"metrics", "infer"})
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

    def __init__(self, operation: Operation) -> None:
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
        with call.stage("encode"):
            return await engine.work(self._operation.encode[media_type], answer)


class EdgeMiddleware:
    """Asks for a key before anything is looked up or read, and notes the requests that no route of ours answers.

    It stands around BentoML's own pages too, and around routes that somebody adds and forgets to guard: closed unless
    :data:`OPEN` lists the path. Requests for unknown paths are counted and logged under one name, with a request id.

    Parameters
    ----------
    app
        The application inside.
    front
        Returns the front door, once the server is up.
    """

    def __init__(self, app: ASGIApp, front: Callable[[], Front]) -> None:
        self._app, self._front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        kind = scope["type"]
        if kind == "http":
            send = _Noted(scope, send)
        if kind == "lifespan" or (kind == "http" and scope["path"] in OPEN):
            await self._app(scope, receive, send)
            return
        try:
            caller = self._front().doorkeeper.caller(Headers(scope=scope), peer_of(scope))
            if scope["path"] == METRICS and not caller.rights & _MAY_READ_METRICS:
                raise PermissionDeniedError(f"The API key {caller.name!r} does not have the right 'metrics'.")
        except PerturbScopeError as error:
            if kind != "http":
                await send({"type": "websocket.close", "code": 1008})
                return
            await _refusal(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _Noted:
    """The ``send`` of a request that counts and logs a 404 or 405 which no route of ours has answered."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] in (404, 405):
            headers = MutableHeaders(scope=message)
            if REQUEST_ID not in headers:  # an answer of ours has one, and was counted
                call = Call(OTHER, "http", Headers(scope=self._scope), peer_of(self._scope))
                headers[REQUEST_ID] = call.id
                Front.finish(call, message["status"], InvalidParameterError.code)
        await self._send(message)


def _refusal(scope: Scope, error: PerturbScopeError) -> Response:
    """Answer a request that has no route yet; the path may be anything, so the log has one name for all of them."""
    call = Front.begin(OTHER, "http", Headers(scope=scope), peer=peer_of(scope))
    response = error_response(error, scope["path"])
    response.headers[REQUEST_ID] = call.id
    Front.finish(call, response.status_code, error.code)
    return response


async def refused(request: Request, error: Exception) -> Response:
    """Answer a request that the framework refuses: an unknown path, a wrong method; or one that asks for OPTIONS."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for nothing else
    call = Front.begin(OTHER, "http", request.headers, peer=peer_of(request.scope))
    headers = {**(error.headers or {}), REQUEST_ID: call.id}
    if error.status_code == 405 and request.method == "OPTIONS":
        Front.finish(call, 204)
        return Response(status_code=204, headers=headers)
    path = request.url.path
    message = {
        404: f"There is nothing at {path[:200]!r}. See /v1/openapi.json for what there is.",
        405: f"{request.method[:20]} is not what {path[:200]!r} takes, but {headers.get('Allow')}.",
    }.get(error.status_code, str(error.detail))
    told = InvalidParameterError(message)
    Front.finish(call, error.status_code, told.code)
    return Response(error_body(told, path), error.status_code, headers, media_type=protocol.JSON)


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
