"""Messages of gRPC that are none: bytes that protobuf cannot read are the caller's mistake, and are called so."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from perturbscope.errors import UnreadableFileError
from serving.grpc.edge import abort, begin


class _Unreadable:
    """Stands for a message that could not be read."""

    def __init__(self, why: str) -> None:
        self.why = why


class MessageInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc,name-defined,unused-ignore]
    """Turns what protobuf cannot read into a typed error; grpc itself would say UNKNOWN, and log it as a bug.

    In a stream, such a message becomes an empty one, which the stream refuses as it refuses one without a body.
    """

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The handler of a method, whose messages are read with care."""
        handler = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        read = handler.request_deserializer
        if handler.request_streaming:
            kind = getattr(read, "__self__", None)
            return handler if kind is None else handler._replace(request_deserializer=_or(read, lambda _: kind()))
        if handler.response_streaming or not inspect.iscoroutinefunction(handler.unary_unary):
            return handler
        answer = handler.unary_unary

        async def answered(request: Any, context: Any) -> Any:
            if not isinstance(request, _Unreadable):
                return await answer(request, context)
            error = UnreadableFileError(f"The message is no protobuf of this method: {request.why}.", field="body")
            return await abort(error, begin(details.method.removeprefix("/"), context), context)

        return handler._replace(request_deserializer=_or(read, _Unreadable), unary_unary=answered)


def _or(read: Callable[[bytes], Any], otherwise: Callable[[str], Any]) -> Callable[[bytes], Any]:
    def careful(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError as error:
            return otherwise(str(error)[:200].rstrip("."))

    return careful
