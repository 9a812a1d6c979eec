"""Threads: the number of cores, work on all of them, work that one thread does ahead of another, and its early end.

A computation that may take long calls :func:`checkpoint` between steps of less than a tenth of a second. Alone that
does nothing. Within :func:`interruptible` it calls a function that may raise, and so end the computation, or wait, and
so halt it: a server ends a score that nobody waits for, and lets short ones pass long ones.
"""

from __future__ import annotations

import functools
import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from threadpoolctl import threadpool_limits

from perturbscope.container import cpu_quota

Input = TypeVar("Input")
Output = TypeVar("Output")
T = TypeVar("T")

_lock = threading.Lock()
_limits: list[Any] = []
_users = 0
_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


_quota = functools.cache(cpu_quota)


def usable_cores() -> int:
    """Return the number of threads that can run at a time in this process; at least 1.

    That is the cores that it may run on, or fewer if its container has a quota of processor time (``docker run
    --cpus``), rounded up. On macOS, which tells neither, it is all cores of the machine. The quota is read once.
    """
    cores = _all_cores()
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def blas_variables() -> dict[str, str]:
    """Return variables that hold BLAS, OpenMP and numba to :func:`usable_cores`; empty where they see the same.

    These libraries count the cores of the machine when they are loaded, and a quota is nothing that they know: under
    ``--cpus=2`` on 64 cores each of them would begin 64 threads. To be set before numpy is imported.
    """
    cores = usable_cores()
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(cores)) if cores < _all_cores() else {}


def _all_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def interruptible(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` at each :func:`checkpoint` inside, also at those of threads that :func:`in_order` begins there.

    Several threads may call it at once. An error that it raises ends the computation.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def checkpoint() -> None:
    """Let a computation be ended or halted here; see :func:`interruptible`. It takes a tenth of a microsecond alone."""
    check = _check.get()
    if check is not None:
        check()


@contextmanager
def single_blas() -> Iterator[None]:
    """Limit BLAS to one thread while any thread of this process is inside; the limit holds for all threads."""
    global _users
    with _lock:
        if _users == 0:
            _limits.append(threadpool_limits(1, "blas"))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _limits.pop().restore_original_limits()
                if (cores := usable_cores()) < _all_cores():
                    # What BLAS had before are all cores of the machine.
                    threadpool_limits(cores, "blas")


def in_order(work: Callable[[Input], Output], items: Iterable[Input]) -> Generator[Output]:
    """Yield ``work(item)`` of each item, in their order, computed on all cores.

    A matrix product of a few milliseconds does not gain from a second thread, but two of them side by side do. At most
    two items a core are begun before they are asked for, so little work is lost if the caller stops, and little goes on
    if it waits. Close the generator if you leave it early. The checkpoints of `work` are those of the caller.
    """
    waiting: deque[Future[Output]] = deque()
    left = iter(items)
    cores = usable_cores()
    # A new thread knows nothing of its caller's context.
    with single_blas(), ThreadPoolExecutor(cores, initializer=_check.set, initargs=(_check.get(),)) as pool:
        try:
            for item in islice(left, 2 * cores):
                waiting.append(pool.submit(work, item))
            while waiting:
                output = waiting.popleft().result()
                for item in islice(left, 1):
                    waiting.append(pool.submit(work, item))
                yield output
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class _Item(Generic[T]):
    value: T


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the items of an iterable, each computed by a thread while the one before it is in use.

    At most one item is ahead: the thread begins the next item when the caller takes the last one. An exception of the
    iterable is raised in place of its item, after all items before it. When the caller closes the generator or is
    interrupted, the thread finishes its current item and ends before the caller continues, so the source of the
    iterable may be closed then.

    Parameters
    ----------
    items
        Iterable that the thread alone iterates; closed there if it is a generator.
    """
    results: queue.SimpleQueue[_Item[T] | _End] = queue.SimpleQueue()
    may_begin = threading.Semaphore(1)
    over = threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            iterator = iter(items)
            try:
                while True:
                    may_begin.acquire()
                    if over.is_set():
                        break
                    try:
                        value = next(iterator)
                    except StopIteration:
                        break
                    results.put(_Item(value))
                    del value  # the caller alone holds it
            finally:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
        except BaseException as caught:  # noqa: BLE001  the caller raises it
            error = caught
        results.put(_End(error))

    thread = threading.Thread(target=work, name="perturbscope-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = results.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            value = item.value
            del item
            may_begin.release()
            yield value
            del value
    finally:
        over.set()
        may_begin.release()
        thread.join()
