"""The thread that runs the model."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Worker(Generic[T]):
    """Runs functions one after the other on a thread of its own.

    The thread is a daemon: a forward pass that never returns must not keep the process from ending, as the threads of
    an executor would.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run `function`; the future is done when it has returned or raised, and is not to be cancelled."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  whoever waits must hear of it
                tell(future.set_exception, error)
            else:
                tell(future.set_result, result)

        def tell(setter: Callable[..., None], value: object) -> None:
            # The loop may be closed when a forward pass returns that was given up.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(lambda: None if future.done() else setter(value))

        self._jobs.put(job)
        return future

    def stop(self, *, wait: bool) -> None:
        """End the thread after what was submitted. May be called twice."""
        self._jobs.put(None)
        if wait and self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
