"""Threads for work that would block the event loop, shared so that small work does not wait for large.

Decoding, tokenizing and encoding of large bodies have threads of their own. Scores, which take from milliseconds to
minutes, take turns: see :class:`Turns`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from perturbscope.threads import interruptible, usable_cores
from serving.queue.fairness import FairShare

T = TypeVar("T")
_SLICE = 0.1
"""Seconds that a score computes at least before it gives its turn to another."""


class Workers:
    """Two pools of threads: for small work, and for large."""

    def __init__(self) -> None:
        cores = usable_cores()
        self._small = ThreadPoolExecutor(max(2, cores), thread_name_prefix="perturbscope-worker")
        self._large = ThreadPoolExecutor(max(1, cores - 1), thread_name_prefix="perturbscope-large")

    async def run(self, large: bool, function: Callable[..., T], *args: Any) -> T:
        """Run a function on a thread; one that has not begun when the caller goes is never run.

        One that has begun ends at its next checkpoint (:func:`perturbscope.threads.checkpoint`): a caller that leaves,
        or whose time is over, leaves no decoding behind.
        """
        gone = threading.Event()

        def check() -> None:
            if gone.is_set():
                raise GoneError

        def work() -> T:
            with interruptible(check):
                return function(*args)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._large if large else self._small, work)
        except asyncio.CancelledError:
            gone.set()
            raise

    def close(self) -> None:
        """Begin nothing more."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)


class Job:
    """A score that is computed turn by turn.

    Parameters
    ----------
    turns
        The turns that it takes.
    ends
        Time on ``time.monotonic`` after which nobody waits for it; None: never.
    """

    def __init__(self, turns: Turns, ends: float | None = None) -> None:
        self._turns, self._ends = turns, ends
        self._passing = threading.Lock()
        self.began = 0.0
        """Time at which its turn began, on ``time.monotonic``; 0 between turns."""
        self.seconds = 0.0
        """Seconds of its finished turns."""
        self.gone = False
        """Whether nobody waits for it any more."""

    def computed(self) -> float:
        """Seconds that it has computed."""
        return self.seconds + (time.monotonic() - self.began if self.began else 0.0)

    def step(self) -> None:
        """Let others compute that had less; called between two steps of the computation, by any of its threads.

        Raises
        ------
        GoneError
            Nobody waits for it any more.
        """
        now = time.monotonic()
        if self.gone or (self._ends is not None and now >= self._ends):
            raise GoneError
        if now - self.began < _SLICE:
            return
        # All of its threads wait here until it is its turn again; the first of them hands it on.
        with self._passing:
            if self.gone:
                raise GoneError
            if time.monotonic() - self.began >= _SLICE:
                self._turns.pass_on(self)


class GoneError(Exception):
    """Ends a computation that nobody waits for any more."""


class Turns:
    """A fixed number of scores compute at a time; all others wait, each on a thread of its own.

    After a tenth of a second, at its next checkpoint (:func:`perturbscope.threads.checkpoint`), a score hands its turn
    to the one that had least: flows share equally, and so do the scores of one flow (:mod:`serving.queue.fairness`). So
    a short score waits for one step of a long one, not for its minutes.

    Parameters
    ----------
    at_a_time
        Number of scores that compute at a time.
    """

    def __init__(self, at_a_time: int) -> None:
        self._free = at_a_time
        self._share: FairShare[Job] = FairShare(1.0)
        self._waiting: set[Job] = set()
        self._joined: set[Job] = set()
        self._changed = threading.Condition()

    @property
    def abandoned(self) -> int:
        """Number of jobs that nobody waits for, and that have not ended yet."""
        with self._changed:
            return sum(job.gone for job in self._joined)

    def held(self) -> float:
        """Return the seconds for which one job has computed without reaching a step, the most of all."""
        now = time.monotonic()
        with self._changed:
            return max((now - job.began for job in self._joined if job.began), default=0.0)

    @contextlib.contextmanager
    def turn(self, job: Job, flow: str) -> Iterator[None]:
        """Wait for the first turn, and compute inside; in the job's own thread. Raises :class:`GoneError`."""
        with self._changed:
            self._joined.add(job)
            self._share.join(job, flow)
            try:
                self._take(job)
            except GoneError:
                self._leave(job)
                raise
        try:
            yield
        finally:
            with self._changed:
                if job.began:
                    self._give(job)
                self._leave(job)

    def new(self, ends: float | None = None) -> Job:
        """Return a new job; it joins with :meth:`turn`. See :class:`Job`."""
        return Job(self, ends)

    def cancel(self, job: Job) -> None:
        """End a job at its next step, or before its first turn."""
        with self._changed:
            job.gone = True
            self._changed.notify_all()

    def pass_on(self, job: Job) -> None:
        """Give the turn back, and wait for the next."""
        with self._changed:
            self._give(job)
            self._take(job)

    def _leave(self, job: Job) -> None:
        self._joined.discard(job)
        self._share.leave(job)
        self._changed.notify_all()

    def _take(self, job: Job) -> None:
        self._waiting.add(job)
        try:
            while not job.gone and not (self._free and self._next() is job):
                self._changed.wait()
        finally:
            self._waiting.discard(job)
        if job.gone:
            raise GoneError
        self._free -= 1
        job.began = time.monotonic()
        if self._free:
            self._changed.notify_all()

    def _next(self) -> Job | None:
        return next((job for job in self._share.order(lambda _: 0.0) if job in self._waiting), None)

    def _give(self, job: Job) -> None:
        self._free += 1
        seconds = time.monotonic() - job.began
        job.seconds += seconds
        self._share.charge(job, seconds)
        self._share.settle()
        job.began = 0.0
        self._changed.notify_all()
