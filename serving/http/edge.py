"""The edge of the HTTP server: every request gets an answer, an id and a line of the log."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from perturbscope import protocol
from perturbscope.errors import OverloadedError, PerturbScopeError, UnauthenticatedError, UnsupportedMediaTypeError
from serving.access.front import Front
from serving.access.limits import Held
from serving.call import REQUEST_ID, Call, Right
from serving.engine.engine import Engine
from serving.engine.operations import explain
from serving.engine.status import status_of

T = TypeVar("T")
OPEN_INFERENCE = "/v2"
"""Where the Open Inference Protocol begins, which has an error form of its own."""
Work = Callable[[Call, Held], Awaitable[Response]]
"""What makes an answer, once the caller is let in; it tells the second of the bytes that it reads."""
CLIENT_GONE = 499
"""Written to the log only: nobody is there to read it."""


async def answered(request: Request, route: str, work: Work, *, right: Right = "infer") -> Response:
    """Let a caller in, work, answer; whatever goes wrong becomes an error answer and a line in the log.

    Parameters
    ----------
    request
        Whose body is not read yet.
    route
        Its path, with names in braces where callers choose: for the log.
    work
        Makes the answer.
    right
        That the caller needs.
    """
    engine: Engine = request.app.state.engine
    peer = request.client.host if request.client else ""
    call = Front.begin(route, "http", request.headers, peer=peer, method=request.method)
    code = "ok"
    try:
        async with engine.front.admitted(call, right) as hold:
            refuse_encoded(request)
            response = await work(call, hold)
    except ClientDisconnect:
        code, response = "client_gone", Response(status_code=CLIENT_GONE)
    except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
        explained = explain(error, call)
        code, response = explained.code, error_response(explained, request.url.path)
    response.headers[REQUEST_ID] = call.id
    Front.finish(call, response.status_code, code)
    return response


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
    """The answer that tells of an error, in the form that callers of `path` know."""
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
    """The result of `work`, which is cancelled when the client goes away: its cells then cost nothing more."""
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
