"""The service of reflection: it describes the methods to callers that may call them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from grpc_reflection.v1alpha import reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from perturbscope.errors import LimitExceededError
from serving.access.front import Front
from serving.access.limits import Held
from serving.call import Call
from serving.grpc.edge import begin, streamed
from serving.grpc.received import Incoming

_LONGEST = 4096
"""Bytes of one question; a question is a name."""


class Reflection(ReflectionServicer):  # type: ignore[misc]  # grpc_reflection has no types
    """Answers the questions of a caller that was let in.

    Parameters
    ----------
    front
        The front door.
    services
        Names of the services.
    """

    def __init__(self, front: Front, services: Sequence[str]) -> None:
        super().__init__(services)
        self._front = front

    def register(self, server: Any) -> None:
        """Add the service to a server of grpc.aio."""
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(self, server)

    async def ServerReflectionInfo(self, requests: Incoming, context: Any) -> None:  # noqa: N802  gRPC's name
        """Answer each question of a stream."""

        async def answer(call: Call, held: Held) -> None:
            async for reply in ReflectionServicer.ServerReflectionInfo(self, _questions(requests, call, held), context):
                await context.write(reply)

        await streamed(self._front, begin("grpc.reflection.v1alpha.ServerReflection", context), context, answer)


async def _questions(requests: Incoming, call: Call, held: Held) -> AsyncIterator[Any]:
    while (sent := await requests.next(call)) is not None:
        if len(sent) > _LONGEST:
            raise LimitExceededError(f"A question of reflection has {_LONGEST} bytes at most.", field="body")
        yield await sent.decoded(held)
