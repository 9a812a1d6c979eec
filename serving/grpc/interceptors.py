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
from serving.grpc.received import Message, Unread

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
    """Leaves the message of a call unread, until the method asks for it.

    gRPC's own handlers of one message read and decode it before the method runs, whoever sent it, and however much
    memory it takes. Handlers of streams read when they are told to, so every method becomes one. A method without a key
    never reads: an empty message stands for what was sent.

    Parameters
    ----------
    engine
        Has the limits, and the threads that decode.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def intercept_service(self, continuation: Continuation, details: Any) -> Any:
        """Return the handler of a method, whose messages are read late."""
        handler = await continuation(details)
        if handler is None:
            return None
        kind = handler.request_deserializer.__self__
        if handler.request_streaming:
            return handler._replace(request_deserializer=_AsSent(kind, self._engine))
        if handler.response_streaming:
            answer, make = _Late(handler.unary_stream, kind, self._engine), grpc.stream_stream_rpc_method_handler
        else:
            answer, make = _Late(handler.unary_unary, kind, self._engine), grpc.stream_unary_rpc_method_handler
        method = answer.without_message if details.method in OPEN else answer.with_message
        return make(method, None, handler.response_serializer)


class _Late:
    """A method that is called with its message unread."""

    def __init__(self, method: Callable[[Any, Any], Awaitable[Any]], kind: Any, engine: Engine) -> None:
        self._method, self._kind, self._engine = method, kind, engine

    async def without_message(self, _: Any, context: Any) -> Any:
        return await self._method(self._kind(), context)

    async def with_message(self, _: Any, context: Any) -> Any:
        patience = self._engine.settings.body_timeout
        return await self._method(Unread(context, self._kind, self._engine.work, patience), context)


class _AsSent:
    """The deserializer of a stream, which leaves its messages as they were sent."""

    def __init__(self, kind: Any, engine: Engine) -> None:
        self._kind, self._engine = kind, engine

    def __call__(self, data: bytes) -> Message:
        return Message(data, self._kind, self._engine.work)
