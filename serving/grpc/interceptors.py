"""Interceptors of every gRPC method: a key is asked for, and messages that protobuf cannot read are called so.

gRPC reads and decodes a whole message before its method is called, and so before :class:`serving.access.front.Front`
sees it. :class:`KeyInterceptor` turns a stranger away at the headers, from reflection too. :class:`MessageInterceptor`
makes unreadable bytes the caller's mistake.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from perturbscope.errors import PerturbScopeError, UnauthenticatedError, UnreadableFileError
from serving.access.front import Front
from serving.grpc.edge import abort, begin, headers_of

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
    """Turns what protobuf cannot read into a typed error; grpc itself would say UNKNOWN, and log it as a bug.

    In a stream, such a message becomes an empty one, which the stream refuses as it refuses one without a body.
    """

    async def intercept_service(self, continuation: Continuation, details: Any) -> Any:
        """Return the handler of a method, whose messages are read with care."""
        handler = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        read = handler.request_deserializer
        if handler.request_streaming:
            kind = getattr(read, "__self__", None)
            return handler if kind is None else handler._replace(request_deserializer=_Careful(read, _Empty(kind)))
        if handler.response_streaming or not inspect.iscoroutinefunction(handler.unary_unary):
            return handler
        answer = _Readable(handler.unary_unary, details.method.removeprefix("/")).answer
        return handler._replace(request_deserializer=_Careful(read, _Unreadable), unary_unary=answer)


class _Unreadable:
    """Stands for a message that could not be read."""

    def __init__(self, why: str) -> None:
        self.why = why


class _Empty:
    """Makes an empty message in place of one that could not be read."""

    def __init__(self, kind: Callable[[], Any]) -> None:
        self._kind = kind

    def __call__(self, why: str) -> Any:
        return self._kind()


class _Careful:
    """A deserializer that returns `otherwise(why)` for bytes that protobuf cannot read."""

    def __init__(self, read: Callable[[bytes], Any], otherwise: Callable[[str], Any]) -> None:
        self._read, self._otherwise = read, otherwise

    def __call__(self, data: bytes) -> Any:
        try:
            return self._read(data)
        except DecodeError as error:
            return self._otherwise(str(error)[:200].rstrip("."))


class _Readable:
    """A method that is called with messages that could be read, and refuses the others."""

    def __init__(self, method: Callable[[Any, Any], Awaitable[Any]], route: str) -> None:
        self._method, self._route = method, route

    async def answer(self, request: Any, context: Any) -> Any:
        if not isinstance(request, _Unreadable):
            return await self._method(request, context)
        error = UnreadableFileError(f"The message is no protobuf of this method: {request.why}.", field="body")
        return await abort(error, begin(self._route, context), context)
