"""Fast work on rows of unequal length that lie end to end in one array, for the tokenizers of all families.

Rows are cut into blocks that fit the cache, and many rows are sorted in one call.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_VALUES = 262_144
"""Values of a block, few enough to stay in the cache."""
_SHORT_ROW = 192
"""Length below which rows are sorted faster together than one by one."""
_STEPS_PER_OCTAVE = 6
"""Steps of length between powers of two: rows sorted together differ in length by 2 ** (1 / 6) = 1.12 at most."""


def row_blocks(indptr: NDArray[np.integer[Any]], values: int = BLOCK_VALUES) -> list[slice]:
    """Cut rows into runs of about `values` values each, in order; row i is ``indptr[i]:indptr[i + 1]``."""
    marks = np.arange(0, int(indptr[-1]), values)
    starts = np.unique(np.searchsorted(indptr, marks, side="left"))
    starts = starts[starts < len(indptr) - 1]
    stops = np.append(starts[1:], len(indptr) - 1)
    return [slice(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]


def smallest(
    keys: NDArray[np.int32], bounds: NDArray[np.int64], lengths: NDArray[np.int64], *, together: bool | None = None
) -> NDArray[np.int32]:
    """Return the ``lengths[i]`` smallest keys of each row ``bounds[i]:bounds[i + 1]``, ascending, end to end.

    Parameters
    ----------
    keys
        Keys of all rows; the array is reordered.
    bounds
        Start of each row, and the end of the last, [n_rows + 1].
    lengths
        Number of keys of each row to keep, at most all of them, [n_rows].
    together
        Sort rows of about the same length in one call, which costs 2 to 3 ns a key and saves half a microsecond a row;
        the default depends on the mean length.
    """
    sizes = np.diff(bounds)
    if together is None:
        together = len(keys) < _SHORT_ROW * len(sizes)
    return _sorted_together(keys, bounds, sizes, lengths) if together else _sorted_singly(keys, bounds, sizes, lengths)


def _sorted_singly(
    keys: NDArray[np.int32], bounds: NDArray[np.int64], sizes: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int32]:
    ends = bounds.tolist()
    if np.array_equal(sizes, lengths):
        for start, stop in itertools.pairwise(ends):
            keys[start:stop].sort()
        return keys
    found = np.empty(int(lengths.sum()), dtype=keys.dtype)
    filled = 0
    for (start, stop), length in zip(itertools.pairwise(ends), lengths.tolist(), strict=True):
        row = keys[start:stop]
        row.sort()
        found[filled : filled + length] = row[:length]
        filled += length
    return found


def _sorted_together(
    keys: NDArray[np.int32], bounds: NDArray[np.int64], sizes: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Sort rows of about one length as one array, [rows, longest], padded with the largest integer."""
    group = np.ceil(np.log2(np.maximum(sizes, 1)) * _STEPS_PER_OCTAVE).astype(np.int16)
    order = np.argsort(group, kind="stable")
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    last = np.append(first[1:], len(order))
    widths = np.maximum.reduceat(sizes[order], first)
    begins = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths * (last - first))])
    padded = np.full(int(begins[-1]), np.iinfo(keys.dtype).max, dtype=keys.dtype)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.repeat(begins[:-1] - first * widths, last - first) + np.arange(len(order)) * np.repeat(
        widths, last - first
    )
    padded[_spread(place, sizes)] = keys
    for start, stop, width in zip(begins.tolist(), begins[1:].tolist(), widths.tolist(), strict=False):
        padded[start:stop].reshape(-1, max(width, 1)).sort(axis=1)
    return padded.take(_spread(place, lengths))


def _spread(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``starts[i], starts[i] + 1, ...``, `lengths[i]` numbers for each i, end to end."""
    ends = np.cumsum(lengths)
    places = np.arange(int(ends[-1]))
    places += np.repeat(starts - (ends - lengths), lengths)
    return places
