"""The service ``grpc.health.v1.Health``: whether the server, and each of its services, can be used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from serving.engine.engine import Engine
from serving.queue.fairness import Room

WATCHERS = 1000
"""Watchers at a time. What they send is not read, but up to 64 KiB of it lie here."""
EVERY = 5.0
"""Seconds after which watchers hear of a change; ``Check`` always tells the present state."""


class Health(HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Tells SERVING while every model answers.

    Anyone may ask, so what is asked is not read (see :class:`serving.grpc.interceptors.MessageInterceptor`): the
    services share the models, and the state is that of all, whatever name was given.

    Parameters
    ----------
    engine
        Engine with the models.
    services
        Names of the services; they share the models, and so their state.
    """

    def __init__(self, engine: Engine, services: Sequence[str]) -> None:
        super().__init__()
        self._engine = engine
        self._names = ("", *services)
        self._watchers = Room(WATCHERS, by_size=False)
        self._follower: asyncio.Task[None] | None = None

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802  gRPC's name
        """Tell the present state of a service."""
        await self.refresh()
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Tell the state of a service, and every change of it."""
        host = (context.peer() or "").rpartition(":")[0]
        if self._watchers.missing(1, host):
            # Clients take any other status for ill health.
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                "There are as many watchers as may be, of all or of this address. Check.",
            )
        self._watchers.take(1, host)
        try:
            await super().Watch(request, context)
        finally:
            self._watchers.give(1, host)

    async def refresh(self) -> None:
        """Update the state from the models."""
        status = health_pb2.HealthCheckResponse
        state = status.SERVING if await self._engine.ready() else status.NOT_SERVING
        for name in self._names:
            await self.set(name, state)

    async def start(self) -> None:
        """Update the state now, and every :data:`EVERY` seconds."""
        await self.refresh()
        self._follower = asyncio.create_task(self._follow(), name="perturbscope-health")

    async def stop(self) -> None:
        """Tell NOT_SERVING from now on."""
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        await self.enter_graceful_shutdown()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            await self.refresh()
