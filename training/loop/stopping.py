"""Signals that end a run after its current step, with a state to go on from."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that schedulers send before they end a job: Slurm's ``--signal=USR1@120``, Kubernetes' SIGTERM."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Give a function that returns the number of the signal that asked for an end; 0 if none has.

    A second signal ends the process at once. Outside the main thread, where Python takes no signals, nothing is caught.
    """
    received = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received = number

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
