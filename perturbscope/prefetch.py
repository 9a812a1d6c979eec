"""Work that one thread does ahead of another."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Item(Generic[T]):
    value: T


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items of an iterable, each computed by a thread while the one before it is in use.

    At most one item is ahead: the thread begins the next one when the caller takes the last. What the iterable raises,
    the caller gets where the item would have been, after all items before it. When the caller closes the generator or
    is interrupted, the thread finishes the item that it is at and ends, before the caller goes on; so what the iterable
    reads from may be closed then.

    Parameters
    ----------
    items
        Iterated in the thread alone; closed there if it is a generator.
    """
    found: queue.SimpleQueue[_Item[T] | _End] = queue.SimpleQueue()
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
                    found.put(_Item(value))
                    del value  # the caller alone holds it
            finally:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
        except BaseException as caught:  # noqa: BLE001  the caller raises it
            error = caught
        found.put(_End(error))

    thread = threading.Thread(target=work, name="perturbscope-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = found.get()
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
