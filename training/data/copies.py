"""Cells that occur twice: equal tokens in equal order. A copy of a training cell tells nothing when it is held out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from perturbscope.families.tokens import TokenizedCells

MAX_COPIES = 0.1
"""Share of copies above which cells were given twice. Below, shallow cells of a panel are equal by chance."""
_AT_ONCE = 2**16
"""Tokens that are mixed at a time."""
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def digests(cells: TokenizedCells) -> NDArray[np.uint64]:
    """Return a digest of the inputs of each cell, uint64 [n]; equal for equal cells, and else all but never.

    A digest is the sum of a mixed value (the finaliser of splitmix64, Steele et al. 2014) for each token, its place and
    its input, so it does not depend on how cells are cut into chunks.
    """
    total = np.zeros(len(cells), dtype=np.uint64)
    # Pieces of some cells stay in the cache, where mixing takes half the time.
    bounds = np.unique(np.searchsorted(cells.offsets, np.arange(0, cells.offsets[-1] + _AT_ONCE, _AT_ONCE)))
    for first, last in pairwise([*bounds[bounds < len(cells)].tolist(), len(cells)]):
        offsets = cells.offsets[first : last + 1]
        piece = slice(int(offsets[0]), int(offsets[-1]))
        lengths = np.diff(offsets)
        places = np.arange(piece.stop - piece.start, dtype=np.int64) - np.repeat(offsets[:-1] - piece.start, lengths)
        filled = np.flatnonzero(lengths)
        for number, name in enumerate(sorted(cells.arrays)):
            mixed = _mixed(cells.arrays[name][piece], places, number)
            if len(filled):
                total[first + filled] += np.add.reduceat(mixed, offsets[filled] - piece.start)
    for number, name in enumerate(sorted(cells.per_cell), len(cells.arrays)):
        values = cells.per_cell[name].reshape(len(cells), -1)
        columns = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        total += _mixed(values, columns, number).sum(axis=1, dtype=np.uint64)
    return total


def without_copies(digest_of: NDArray[np.uint64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return cells without those that equal an earlier one among them, if more than :data:`MAX_COPIES` of them do."""
    first = np.sort(np.unique(digest_of[cells], return_index=True)[1])
    return cells[first] if len(cells) - len(first) > MAX_COPIES * len(cells) else cells


def in_both(digest_of: NDArray[np.uint64], held: NDArray[np.int64], trained: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the held-out cells equal a cell that is trained on."""
    return np.isin(digest_of[held], digest_of[trained])


def shared_sources(
    digest_of: NDArray[np.uint64],
    source_of: NDArray[np.int32],
    held: NDArray[np.int64],
    trained: NDArray[np.int64],
    names: Sequence[str],
) -> tuple[str, str]:
    """Return the two data sets (one twice, if its own cells are copied) that most of the shared cells are in."""
    order = trained[np.argsort(digest_of[trained], kind="stable")]
    at = np.minimum(np.searchsorted(digest_of[order], digest_of[held]), len(order) - 1)
    twins = digest_of[order[at]] == digest_of[held]
    pairs, counts = np.unique(
        np.stack([source_of[held[twins]], source_of[order[at[twins]]]]), axis=1, return_counts=True
    )
    held_source, train_source = pairs[:, counts.argmax()].tolist()
    return names[train_source], names[held_source]


def _mixed(values: NDArray[np.generic], places: NDArray[np.int64], number: int) -> NDArray[np.uint64]:
    if np.issubdtype(values.dtype, np.floating):
        bits = values.astype(np.float64).copy().view(np.uint64)
    else:
        bits = values.astype(np.uint64)
    x = places.astype(np.uint64)
    x *= np.uint64(64)
    x += np.uint64(number + 1)
    x *= _MIX[0]
    bits *= _MIX[1]
    x += bits
    for shift, factor in zip(_SHIFTS, (*_MIX, None), strict=True):
        np.right_shift(x, shift, out=bits)
        x ^= bits
        if factor is not None:
            x *= factor
    return x
