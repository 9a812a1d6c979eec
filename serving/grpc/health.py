"""``grpc.health.v1.Health``: whether the server, and each of its services, can be used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from serving.engine.engine import Engine

EVERY = 5.0
"""Seconds after which those who watch are told of a change; who asks is told what is so now."""


class Health(HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Says SERVING while every model answers.

    Parameters
    ----------
    engine
        Knows the models.
    services
        Names of the services; they share the models, and so their state.
    """

    def __init__(self, engine: Engine, services: Sequence[str]) -> None:
        super().__init__()
        self._engine = engine
        self._names = ("", *services)
        self._follower: asyncio.Task[None] | None = None

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802  gRPC's name
        """The state of a service now."""
        if request.service in self._names:
            await self.refresh()
        return await super().Check(request, context)

    async def refresh(self) -> None:
        """Look at the models."""
        status = health_pb2.HealthCheckResponse
        state = status.SERVING if await self._engine.ready() else status.NOT_SERVING
        for name in self._names:
            await self.set(name, state)

    async def start(self) -> None:
        """Look at the models now, and from time to time."""
        await self.refresh()
        self._follower = asyncio.create_task(self._follow(), name="perturbscope-health")

    async def stop(self) -> None:
        """Say NOT_SERVING from now on."""
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        await self.enter_graceful_shutdown()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            await self.refresh()
