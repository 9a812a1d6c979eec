"""The gate of the HTTP server, around everything that it answers, BentoML's own pages included.

Slow connections are ended, a key is asked for before anything is looked up or read, and unknown paths are counted.

A request of which two programs could see two different ends is refused (request smuggling): h11 takes it, as the
standard allows, where a proxy in front may have seen another request in it.

uvicorn ends a connection that is idle after an answer, but waits for ever for the first request, for the rest of a
head, and for a client that does not read its answer, which stays in memory until then. So a few thousand idle sockets
would use up the files of the process, and a few slow readers its memory. (Bodies have a time limit of their own,
``body_timeout``; streams watch their readers themselves.)
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import h11
import uvicorn.config
from fastapi import Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from perturbscope import protocol
from perturbscope.errors import InvalidParameterError, PermissionDeniedError, PerturbScopeError
from perturbscope.operations import OPERATIONS
from serving.access.front import Front
from serving.call import REQUEST_ID, Call
from serving.http.edge import error_body, error_response, peer_of
from serving.http.sites import Sites
from serving.settings import Settings
from serving.telemetry.metrics import OTHER

OPEN = frozenset({"/", "/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""Paths without a key: they tell nothing but whether the server is well, or are the empty upload page."""
METRICS = "/metrics"
_BENTOML, _BENTOML_FILES = ("/docs.json", "/schema.json"), "/static_content/"
"""BentoML's own pages, which describe a service without routes: ours are in /v1/openapi.json."""
LEAST_RATE = 1024
"""Least bytes a second that a client must read of a finished answer."""
WINDOW = 30.0
"""Seconds over which that rate is measured."""
TICK = 1.0
"""Seconds between two checks of a connection."""
CLOSE = (b"connection", b"close")


class _StrictBuffer(h11._receivebuffer.ReceiveBuffer):  # type: ignore[misc,unused-ignore]
    """The buffer of h11, which gives out no head that could be read in two ways."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines of a head. Raises RemoteProtocolError: the answer is 400, and the connection ends."""
        lines: list[bytearray] | None = super().maybe_extract_lines()
        if lines:
            _check_head(lines)
        return lines


def _check_head(lines: list[bytearray]) -> None:
    headers = [bytes(line).partition(b":") for line in lines[1:]]
    lengths = [value.strip() for name, _, value in headers if name.lower() == b"content-length"]
    n_encodings = sum(name.lower() == b"transfer-encoding" for name, _, _ in headers)
    if any(line.startswith((b" ", b"\t")) for line in lines):
        _refuse("a header that goes on in the next line")
    if any(b"\r" in line or b"\0" in line for line in lines):
        _refuse("a carriage return or zero inside of a header")
    if len(lengths) + n_encodings > 1 or b"," in b"".join(lengths):
        _refuse("several of Content-Length and Transfer-Encoding")
    if n_encodings and lines[0].rstrip().endswith(b"HTTP/1.0"):
        _refuse("Transfer-Encoding in HTTP/1.0")


def _refuse(what: str) -> None:
    raise h11.RemoteProtocolError(f"the head has {what}", error_status_hint=400)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which ends connections of slow clients, and old ones, and is strict about heads."""

    head_timeout = 30.0
    """Seconds within which the head of a request must have arrived, once the connection is free for it."""
    connection_age = 0.0
    """Seconds, a tenth more or less, after which the next answer is the last; 0: never."""

    def connection_made(self, transport: Any) -> None:
        """Begin to watch the connection."""
        super().connection_made(transport)
        self.conn._receive_buffer = _StrictBuffer()
        self._guarded: Any = transport
        self._clock = asyncio.get_running_loop()
        # Connections that began together shall not end together.
        age = self.connection_age * random.uniform(0.9, 1.1)  # noqa: S311  no secret
        self._old_from = self._clock.time() + age if age else float("inf")
        self._free_since = self._window_since = self._clock.time()
        self._window_bytes = 0
        self._next_look = self._clock.call_later(TICK, self._look)

    def data_received(self, data: bytes) -> None:
        """Take what arrived; a request on an old connection is answered as if it had asked for its end."""
        before = self.cycle
        super().data_received(data)
        cycle: Any = self.cycle
        if cycle is not before:
            # However short it is: a connection with a short request every second is never seen at work.
            self._free_since = self._clock.time()
        if cycle is None or cycle.response_started or CLOSE in cycle.scope["headers"]:
            return
        if self._clock.time() >= self._old_from:
            cycle.scope["headers"].append(CLOSE)

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


def install(settings: Settings) -> None:
    """Let every uvicorn server of this process use :class:`GuardedProtocol`; called before it is configured."""
    GuardedProtocol.head_timeout = settings.head_timeout
    GuardedProtocol.connection_age = settings.connection_age
    # uvicorn would believe whoever comes from this machine, which may be any user of it, or a proxy that hands on what
    # strangers say.
    os.environ["FORWARDED_ALLOW_IPS"] = ",".join(settings.proxies)
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{GuardedProtocol.__name__}"


class Gate:
    """Asks for site and key before anything is looked up or read, and notes the requests that no route of ours answers.

    It stands around BentoML's own pages too, and around routes that somebody adds and forgets to guard: closed unless
    :data:`OPEN` lists the path. Requests for unknown paths are counted and logged under one name, with a request id.

    Parameters
    ----------
    app
        The application inside.
    front
        Returns the front door, once the server is up.
    sites
        Names and sites that may be asked for and from; None: all.
    """

    def __init__(self, app: ASGIApp, front: Callable[[], Front], sites: Sites | None = None) -> None:
        self._app, self._front, self._sites = app, front, sites

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        kind = scope["type"]
        if kind == "http":
            send = _Noted(scope, send, self._front)
        if kind == "lifespan" or (kind == "http" and scope["path"] in OPEN):
            await self._app(scope, receive, send)
            return
        try:
            if self._sites is not None:
                self._sites.check(scope)
            caller = self._front().doorkeeper.caller(Headers(scope=scope), peer_of(scope))
            if scope["path"] == METRICS and "metrics" not in caller.rights:
                raise PermissionDeniedError(
                    f"The API key {caller.name!r} does not have the right 'metrics', which shows what all callers do. "
                    "Its owner can be given one: python -m serving keys add --right metrics."
                )
        except PerturbScopeError as error:
            if kind != "http":
                await send({"type": "websocket.close", "code": 1008})
                return
            await _refusal(scope, error)(scope, receive, send)
            return
        if kind == "http" and (scope["path"] in _BENTOML or scope["path"].startswith(_BENTOML_FILES)):
            # Without an id, as BentoML's own answers are: it is noted on the way out.
            await _answer(scope["path"], scope["method"], 404, {})(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _Noted:
    """The ``send`` of a request that counts and logs what no route of ours has answered, and answers it as ours do.

    BentoML looks for a path before our routes do, and answers some (``/v1/models/a%2Fb/load``) with text or by sending
    the caller elsewhere. While the server is about to stop, each answer ends its connection: its client then connects
    elsewhere.
    """

    def __init__(self, scope: Scope, send: Send, front: Callable[[], Front]) -> None:
        self._scope, self._send, self._front = scope, send, front
        self._answered = False

    async def __call__(self, message: Message) -> None:
        if self._answered:
            return
        if message["type"] == "http.response.start" and self._front().leaving:
            MutableHeaders(scope=message)["connection"] = "close"
        if message["type"] == "http.response.start" and message["status"] in (307, 404, 405):
            headers = MutableHeaders(scope=message)
            if REQUEST_ID not in headers:  # an answer of ours has one, and was counted
                kept = {name: headers[name] for name in ("allow", "connection") if name in headers}
                call = Call(OTHER, "http", Headers(scope=self._scope), peer_of(self._scope))
                status = 405 if message["status"] == 405 else 404
                answer = _answer(self._scope["path"], self._scope["method"], status, {**kept, REQUEST_ID: call.id})
                Front.finish(call, status, InvalidParameterError.code)
                self._answered = True
                await answer(self._scope, _nothing, self._send)
                return
        await self._send(message)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


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
    Front.finish(call, error.status_code, InvalidParameterError.code)
    return _answer(request.url.path, request.method, error.status_code, headers, str(error.detail))


def _answer(path: str, method: str, status: int, headers: Mapping[str, str], detail: str = "") -> Response:
    """Return the answer to a request that no route of ours takes."""
    allowed = headers.get("Allow", headers.get("allow"))
    message = {
        404: f"There is nothing at {path[:200]!r}. Operations are {', '.join(OPERATIONS)}; see /v1/openapi.json.",
        405: f"{method[:20]} is not what {path[:200]!r} takes, but {allowed}.",
    }.get(status, detail)
    return Response(error_body(InvalidParameterError(message), path), status, headers, media_type=protocol.JSON)
