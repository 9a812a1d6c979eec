"""Work on many groups of cells at once: one thread a core, each with one thread of BLAS."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from perturbscope.encoder import usable_cores

Given = TypeVar("Given")
Made = TypeVar("Made")

_lock = threading.Lock()
_limits: list[Any] = []
_users = 0


@contextmanager
def single_blas() -> Iterator[None]:
    """Give BLAS one thread while any thread of this process is inside: the limit holds for all of them alike."""
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


def in_order(work: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """Yield ``work(item)`` of each item, in their order, made on all cores.

    A product of a few milliseconds does not gain from a second thread, two of them side by side do. At most two items
    a core are begun before they are asked for, so that little is in vain if the caller stops, and little goes on if
    it waits. Close the generator if you leave it early.
    """
    waiting: deque[Future[Made]] = deque()
    left = iter(items)
    cores = usable_cores()
    with single_blas(), ThreadPoolExecutor(cores) as pool:
        try:
            for item in islice(left, 2 * cores):
                waiting.append(pool.submit(work, item))
            while waiting:
                made = waiting.popleft().result()
                for item in islice(left, 1):
                    waiting.append(pool.submit(work, item))
                yield made
        finally:
            for future in waiting:
                future.cancel()
