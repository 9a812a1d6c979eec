"""Keys for whatever the gRPC server answers: reflection too, and before a message is read.

gRPC reads and decodes a whole message before its method is called, and so before :class:`serving.access.front.Front`
sees it. Here a stranger is turned away at the headers. Closed unless listed here as open.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
from starlette.datastructures import Headers

from perturbscope.errors import PerturbScopeError, UnauthenticatedError
from serving.access.front import Front
from serving.call import Call

OPEN = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    }
)
"""Methods that tell nothing but whether the server is well."""


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc,name-defined,unused-ignore]
    """Asks for a key before a message is read.

    Parameters
    ----------
    front
        Has what knows the callers.
    headers_of, begin, abort
        Of :mod:`serving.grpc.server`.
    """

    def __init__(
        self,
        front: Front,
        headers_of: Callable[[Any], Headers],
        begin: Callable[[str, Any], Call],
        abort: Callable[[Exception, Call, Any], Awaitable[NoReturn]],
    ) -> None:
        self._front, self._headers_of, self._begin, self._abort = front, headers_of, begin, abort

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The handler of a method, or one that refuses."""
        if details.method in OPEN:
            return await continuation(details)
        try:
            # Without an address, so that a bad key is counted once: below, where the address is known.
            self._front.doorkeeper.caller(self._headers_of(details.invocation_metadata))
        except PerturbScopeError:
            route = details.method.removeprefix("/") if await continuation(details) else "unknown"

            async def refuse(_: Any, context: Any) -> None:
                call = self._begin(route, context)
                try:
                    self._front.doorkeeper.caller(call.headers, call.peer)
                    raise UnauthenticatedError("The API key came to be valid just now. Try again.")
                except PerturbScopeError as error:
                    await self._abort(error, call, context)

            # Whatever the method's kind: a stream that is not read leaves the message on the wire.
            return grpc.stream_unary_rpc_method_handler(refuse)
        return await continuation(details)
