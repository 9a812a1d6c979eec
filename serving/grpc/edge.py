"""The edge of the gRPC server: every call gets an answer, an id and a line of the log."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from starlette.datastructures import Headers

from perturbscope.errors import OverloadedError, PerturbScopeError
from serving.access.front import Front
from serving.access.limits import Held
from serving.call import REQUEST_ID, Call, Right
from serving.engine.status import explain, status_of
from serving.grpc.received import Incoming

_MAX_MESSAGE, _MAX_FIELD = 2000, 200
"""Bytes of an error that are sent. Clients refuse more than 8 KiB of trailing metadata, where a byte may take three."""
_LAST_WORDS = 5.0
"""Seconds within which the status of a stream must be sent; one behind answers that nobody reads never is."""
Work = Callable[[Any, Call, Held], Awaitable[Any]]
"""Answers a request message, whose memory is held."""


async def answered(
    front: Front, route: str, work: Work, request: Incoming, context: Any, right: Right = "infer"
) -> Any:
    """Let a caller in, read its message, work, answer; grpc.aio cancels this when the caller does, or too late.

    Parameters
    ----------
    front
        The front door.
    route
        Service and method.
    work
        Makes the answer.
    request
        The request message, which is not read yet.
    context
        The call's context of grpc.aio.
    right
        Right that the caller needs.
    """
    call = begin(route, context)
    try:
        async with front.admitted(call, right) as held:
            answer = await work(await request.only(call, held), call, held)
    except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
        await abort(error, call, context)
    except BaseException:
        Front.finish(call, "CANCELLED", "client_gone")
        raise
    Front.finish(call, "OK")
    return answer


async def streamed(front: Front, call: Call, context: Any, work: Callable[[Call, Held], Awaitable[None]]) -> None:
    """Let a caller in, and answer its stream; `work` reads and writes the messages."""
    try:
        async with front.admitted(call) as held:
            await work(call, held)
    except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
        async with asyncio.timeout(_LAST_WORDS):
            await abort(error, call, context)
    except BaseException:
        Front.finish(call, "CANCELLED", "client_gone")
        raise
    Front.finish(call, "OK")


def begin(route: str, context: Any) -> Call:
    """Begin the call of a context of gRPC; its id is sent back, however the call ends."""
    call = Front.begin(
        route,
        "grpc",
        headers_of(context.invocation_metadata()),
        peer=context.peer() or "",
        remaining=context.time_remaining(),
    )
    context.set_trailing_metadata(((REQUEST_ID, call.id),))
    return call


def headers_of(metadata: Any) -> Headers:
    """Return metadata as headers; a name that is given twice stays twice."""
    return Headers(raw=[(key.encode(), value.encode()) for key, value in metadata or () if isinstance(value, str)])


async def abort(error: Exception, call: Call, context: Any) -> NoReturn:
    """End a call with the status of an error; called in an except block."""
    told = explain(error, call)
    status = status_of(told).grpc
    Front.finish(call, status.name, told.code)
    await context.abort(status, told.message.encode()[:_MAX_MESSAGE].decode(errors="ignore"), _metadata(told, call))
    raise AssertionError("abort always raises")


def _metadata(error: PerturbScopeError, call: Call) -> tuple[tuple[str, str], ...]:
    found = [("perturbscope-code", error.code), ("perturbscope-request-id", call.id), (REQUEST_ID, call.id)]
    if error.field is not None:
        # Metadata is ASCII, and a field may be an unknown name that the caller made up.
        name = "".join(c for c in error.field if c.isprintable())[:_MAX_FIELD]
        found.append(("perturbscope-field", name.encode("ascii", "backslashreplace").decode()))
    if isinstance(error, OverloadedError):
        found.append(("retry-after", str(math.ceil(error.retry_after))))
    return tuple(found)
