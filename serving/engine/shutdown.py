"""The end of the service, which begins with the signal and not when the HTTP server is done.

uvicorn first waits for its open connections, and only then tells the application. By then the service should long have
refused new requests, on both transports, and the grace period of those in progress should have begun.
"""

from __future__ import annotations

import asyncio
import signal
from types import FrameType
from typing import Any, Protocol

from serving.engine.engine import Engine
from serving.telemetry import log

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Listener(Protocol):
    """A server that is stopped beside the engine: the gRPC server."""

    async def stop(self) -> None:
        """Refuse new calls, and wait for those in progress."""
        ...


class Stopping:
    """Stops an engine and a listener, once.

    Parameters
    ----------
    engine, listener
        Engine and server to stop.
    """

    def __init__(self, engine: Engine, listener: Listener) -> None:
        self._engine = engine
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Begin to stop with the first signal, whose earlier handler is still called. For the main thread."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._signalled)

    def forget(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._signalled:
                signal.signal(number, handler)
        self._previous.clear()

    def begin(self) -> asyncio.Task[Any]:
        """Refuse new requests, and give those in progress their time; the task is done when they are."""
        if self._task is None:
            log.event("stopping", requests_in_progress=self._engine.admission.in_progress)
            self._engine.begin_close()
            self._task = self._loop.create_task(self._stop(), name="perturbscope-stopping")
        return self._task

    async def _stop(self) -> None:
        await asyncio.gather(self._engine.close(), self._listener.stop())

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self.begin)
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
