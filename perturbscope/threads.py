"""Threads: the number of cores, work on all of them, work that one thread does ahead of another, and its early end.

A computation that may take long calls :func:`checkpoint` between steps of less than a tenth of a second. Alone that
does nothing. Within :func:`interruptible` it calls a function that may raise, and so end the computation, or wait, and
so halt it: a server ends a score that nobody waits for, and lets short ones pass long ones.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from threadpoolctl import threadpool_limits

Input = TypeVar("Input")
Output = TypeVar("Output")
T = TypeVar("T")

_lock = threading.Lock()
_limits: list[Any] = []
_users = 0
_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


def usable_cores() -> int:
    """Return the number of cores that this process may use; on macOS, which does not tell, all of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def in_order(work: Callable[[Input], Output], items: Iterable[Input]) -> Iterator[Output]:
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
