"""The end of the service, which begins with the signal and not when the HTTP server is done.

Where a balancer stands in front, it must see that this server is not ready before connections are refused: after
SIGTERM the server goes on for the drain delay, and only its health probes change.

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

    async def leave(self) -> None:
        """Tell those who watch that the engine is not ready any more."""
        ...

    async def stop(self) -> None:
        """Refuse new calls, and wait for those in progress."""
        ...


class Stopping:
    """Stops an engine and a listener, once.

    Parameters
    ----------
    engine, listener
        Engine and server to stop.
    delay
        Seconds from SIGTERM to the stop, in which the engine is not ready and still answers. SIGINT does not wait.
    """

    def __init__(self, engine: Engine, listener: Listener, delay: float = 0.0) -> None:
        self._engine = engine
        self._listener = listener
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Task[Any] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Begin to stop with the first signal, whose earlier handler is called then. For the main thread."""
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
        if number == signal.SIGTERM and self._delay > 0 and self._task is None:
            self._loop.call_soon_threadsafe(self._drain)
            return
        self._loop.call_soon_threadsafe(self.begin)
        self._hand_on(number, frame)

    def _drain(self) -> None:
        """Be not ready, and stop after the delay. A second SIGTERM, which a service manager may send, is no hurry."""
        if self._told is None:
            log.event("draining", seconds=self._delay, requests_in_progress=self._engine.admission.in_progress)
            self._engine.leave()
            self._told = self._loop.create_task(self._listener.leave(), name="perturbscope-draining")
            self._loop.call_later(self._delay, self._end)

    def _end(self) -> None:
        self.begin()
        self._hand_on(signal.SIGTERM, None)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
