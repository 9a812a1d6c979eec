"""Lists of gene identifiers that come again and again: checked once, mapped to a vocabulary once.

Every request names all columns of its file, tens of thousands of strings of which one cell expresses hundreds. To check
and to look them up takes several times as long as to tokenize that cell, and gives the same each time.

A list is known again by all of its text, never by a digest or a part of it, so one caller cannot change what another's
list means. What is kept is bounded in number and in bytes.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

V = TypeVar("V")
MAX_LISTS = 64
"""Lists, and as many spellings of lists, that are kept."""
MAX_BYTES = 32 * 2**20
"""Memory that lists, and as much that spellings, may take; a list of 20,000 symbols takes 2 MiB."""
LARGEST = 4 * 2**20
"""What is larger is not kept."""
_BETWEEN = "\0"


class PerArray(Generic[V]):
    """Values by array, for arrays that nobody can write to; an entry lives as long as its array."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[NDArray[Any]], V]] = {}

    def get(self, array: NDArray[Any]) -> V | None:
        """The value of this very array, not of an equal one; None if there is none."""
        found = self._found.get(id(array))
        return found[1] if found is not None and found[0]() is array and not array.flags.writeable else None

    def put(self, array: NDArray[Any], value: V) -> None:
        """Keep a value; not that of an array that can be written to."""
        if not array.flags.writeable:
            key = id(array)
            self._found[key] = weakref.ref(array, lambda _: self._found.pop(key, None)), value


CHECKED: PerArray[bool] = PerArray()
"""Arrays of identifiers, all different, that were checked."""


class GeneLists:
    """Checked lists by their text; the ones used last are kept. May be used by several threads.

    Parameters
    ----------
    max_lists, max_bytes
        What is kept at most.
    """

    def __init__(self, max_lists: int = MAX_LISTS, max_bytes: int = MAX_BYTES) -> None:
        self._by_names = _Recent(max_lists, max_bytes)
        self._by_spelling = _Recent(max_lists, max_bytes)

    def find(self, names: object) -> NDArray[np.str_] | None:
        """The checked array of these names, if they are a list of strings that is known."""
        key = _key(names)
        return None if key is None else self._by_names.get(key)

    def keep(self, names: object, genes: NDArray[np.str_]) -> None:
        """Know these names again. `genes` is what they became, read-only."""
        key = _key(names)
        if key is not None:
            self._by_names.put(key, genes, 4 * len(key[1]) + genes.nbytes)

    def spelled(self, text: bytes) -> NDArray[np.str_] | None:
        """The checked array that this JSON text stands for, if that is known."""
        return self._by_spelling.get(text)

    def keep_spelling(self, text: bytes, genes: NDArray[np.str_]) -> None:
        """Know a JSON text again, of which the caller has made sure that it stands for `genes`."""
        self._by_spelling.put(text, genes, len(text) + genes.nbytes)


class _Recent:
    """The arrays that were used last."""

    def __init__(self, most: int, max_bytes: int) -> None:
        self._most, self._max_bytes, self._bytes = most, max_bytes, 0
        self._found: OrderedDict[Hashable, tuple[NDArray[np.str_], int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> NDArray[np.str_] | None:
        with self._lock:
            found = self._found.get(key)
            if found is None:
                return None
            self._found.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, genes: NDArray[np.str_], n_bytes: int) -> None:
        if n_bytes > LARGEST:
            return
        with self._lock:
            if key in self._found:
                return
            self._found[key] = genes, n_bytes
            self._bytes += n_bytes
            while len(self._found) > self._most or self._bytes > self._max_bytes:
                _, (_, freed) = self._found.popitem(last=False)
                self._bytes -= freed


def _key(names: object) -> tuple[int, str] | None:
    """What two lists have in common only if they are equal; None for what is no list of strings, or has odd ones."""
    if not isinstance(names, (list, tuple)) or not names:
        return None
    try:
        text = _BETWEEN.join(names)
    except TypeError:
        return None
    # With one separator more, a name would hold one, and ["a\0b", "c"] would look like ["a", "b\0c"].
    return (len(names), text) if text.count(_BETWEEN) == len(names) - 1 else None


RECENT = GeneLists()
"""Those of this process."""
