"""The gate of the HTTP server, around everything that it answers, BentoML's own pages included.

Slow connections are ended, a key is asked for before anything is looked up or read, and unknown paths are counted.

uvicorn ends a connection that is idle after an answer, but waits for ever for the first request, for the rest of a
head, and for a client that does not read its answer, which stays in memory until then. So a few thousand idle sockets
would use up the files of the process, and a few slow readers its memory. (Bodies have a time limit of their own,
``body_timeout``; streams watch their readers themselves.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn.config
from fastapi import Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from perturbscope import protocol
from perturbscope.errors import InvalidParameterError, PermissionDeniedError, PerturbScopeError
from perturbscope.operations import OPERATIONS
from serving.access.front import Front
from serving.call import REQUEST_ID, Call
from serving.http.edge import error_body, error_response, peer_of
from serving.telemetry.metrics import OTHER

OPEN = frozenset({"/", "/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""Paths without a key: they tell nothing but whether the server is well, or are the empty upload page."""
METRICS = "/metrics"
_MAY_READ_METRICS = frozenset({"metrics", "infer"})
LEAST_RATE = 1024
"""Least bytes a second that a client must read of a finished answer."""
WINDOW = 30.0
"""Seconds over which that rate is measured."""
TICK = 1.0
"""Seconds between two checks of a connection."""


class GuardedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type,unused-ignore]
    """uvicorn's HTTP protocol, which ends connections of slow clients."""

    head_timeout = 30.0
    """Seconds within which the head of a request must have arrived, once the connection is free for it."""

    def connection_made(self, transport: Any) -> None:
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._guarded: Any = transport
        self._clock = asyncio.get_running_loop()
        self._free_since = self._window_since = self._clock.time()
        self._window_bytes = 0
        self._next_look = self._clock.call_later(TICK, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """End the connection if its client took too long; else check again later."""
        now, unread = self._clock.time(), self._guarded.get_write_buffer_size()
        cycle: Any = self.cycle
        working = cycle is not None and not cycle.response_complete
        if working or unread:
            self._free_since = now
        if working or not unread or not self._window_bytes:
            # While an answer is made, its buffer is filled again as it empties.
            self._window_since, self._window_bytes = now, 0 if working else unread
        elif now - self._window_since >= WINDOW:
            if self._window_bytes - unread < min(LEAST_RATE * WINDOW, self._window_bytes):
                self._guarded.abort()
                return
            self._window_since, self._window_bytes = now, unread
        if now - self._free_since > self.head_timeout:
            self._guarded.abort()
            return
        self._next_look = self._clock.call_later(TICK, self._look)


def install(*, head_timeout: float) -> None:
    """Let every uvicorn server of this process use :class:`GuardedProtocol`; called before it is configured."""
    GuardedProtocol.head_timeout = head_timeout
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{GuardedProtocol.__name__}"


class Gate:
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
        404: f"There is nothing at {path[:200]!r}. Operations are {', '.join(OPERATIONS)}; see /v1/openapi.json.",
        405: f"{request.method[:20]} is not what {path[:200]!r} takes, but {headers.get('Allow')}.",
    }.get(error.status_code, str(error.detail))
    told = InvalidParameterError(message)
    Front.finish(call, error.status_code, told.code)
    return Response(error_body(told, path), error.status_code, headers, media_type=protocol.JSON)
