"""Interceptors of every gRPC method: nothing is read of a call before its caller was let in.

:class:`KeyInterceptor` turns a stranger away at the headers, from reflection too. :class:`MessageInterceptor` leaves
the message of everyone else on the wire, until :class:`serving.access.front.Front` has let the call in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from perturbscope.errors import PerturbScopeError, UnauthenticatedError
from serving.access.front import Front
from serving.engine.engine import Engine
from serving.grpc.edge import abort, begin, headers_of
from serving.grpc.inflow import Inflow
from serving.grpc.received import Incoming

OPEN = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    }
)
"""Methods without a key: they tell nothing but whether the server is well. All others are closed."""
Continuation = Callable[[Any], Awaitable[Any]]


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc,name-defined,unused-ignore]
    """Asks for a key before a message is read.

    Parameters
    ----------
    front
        The front door, which has the doorkeeper.
    """

    def __init__(self, front: Front) -> None:
        self._front = front

    async def intercept_service(self, continuation: Continuation, details: Any) -> Any:
        """Return the handler of a method, or one that refuses."""
        if details.method in OPEN:
            return await continuation(details)
        try:
            # Without an address, so that a bad key is counted once: in _Refusal, where the address is known.
            self._front.doorkeeper.caller(headers_of(details.invocation_metadata))
        except PerturbScopeError:
            route = details.method.removeprefix("/") if await continuation(details) else "unknown"
            # Whatever the method's kind: a stream that is not read leaves the message on the wire.
            return grpc.stream_unary_rpc_method_handler(_Refusal(self._front, route).answer)
        return await continuation(details)


class _Refusal:
    """Refuses one call without reading its messages."""

    def __init__(self, front: Front, route: str) -> None:
        self._front, self._route = front, route

    async def answer(self, _: Any, context: Any) -> None:
        call = begin(self._route, context)
        try:
            self._front.doorkeeper.caller(call.headers, call.peer)
            raise UnauthenticatedError("The API key came to be valid just now. Try again.")
        except PerturbScopeError as error:
            await abort(error, call, context)


class MessageInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc,name-defined,unused-ignore]
    """Leaves the messages of a call unread, until the method asks for them.

    gRPC's own handlers of one message read and decode it before the method runs, whoever sent it, and however much
    memory it takes. Handlers of streams read when they are told to, so every method becomes one, and is called with
    :class:`Incoming`. A method without a key never reads: an empty message stands for what was sent.

    Parameters
    ----------
    engine
        Has the limits, and the threads that decode.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._inflow = engine, Inflow(engine.admission)

    async def intercept_service(self, continuation: Continuation, details: Any) -> Any:
        """Return the handler of a method, whose messages are read late."""
        handler = await continuation(details)
        if handler is None:
            return None
        own = handler.stream_stream or handler.unary_stream or handler.unary_unary
        late = _Late(own, handler.request_deserializer.__self__, self._engine, self._inflow)
        answer = late.without_message if details.method in OPEN else late.with_messages
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)


class _Late:
    """A method that is called with its messages unread."""

    def __init__(self, method: Callable[[Any, Any], Awaitable[Any]], kind: Any, engine: Engine, inflow: Inflow) -> None:
        self._method, self._kind, self._engine, self._inflow = method, kind, engine, inflow

    async def without_message(self, _: Any, context: Any) -> Any:
        return await self._method(self._kind(), context)

    async def with_messages(self, _: Any, context: Any) -> Any:
        return await self._method(Incoming(context, self._kind, self._engine, self._inflow), context)
