"""Kinds of values that are no raw counts: scaled, log-transformed, normalised, or estimated counts.

Estimated counts are what alevin, RSEM, STARsolo with EM, CellBender and SoupX give: a read of several genes is divided
among them, or background is subtracted. Most of their values are whole, or near to it; they may be rounded. Normalised
values may not: the count behind a value is lost. The two are told apart by what normalisation leaves behind: all
values of a cell are multiples of its smallest, or every cell has the same sum, before the logarithm if there was one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROWS = 256
"""Cells that are looked at."""
_MOST_LOG = 20.0
"""Logarithms of counts, also of normalised ones and to base 2, stay below this."""
_WHOLE = 1e-6
_WHOLE_SHARE = 0.1
"""Share of whole values, in the median cell, from which values are estimated counts: normalisation leaves none."""
_NEAR = 0.12
"""Mean distance to the nearest whole number below which values are estimated counts; 0.25 for any values."""
_NEARLY_ALL = 0.98
_LOW, _COMPUTED = 20.0, 0.01
"""Values below the first are compared with whole numbers, from which float32 leaves them less than the second away."""
_UNDONE: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "log-normalised": np.expm1,
    "log2-normalised": lambda values: np.exp2(values) - 1,
    "log10-normalised": lambda values: np.power(10.0, values) - 1,
}
"""Ways to take the logarithm of normalised counts, and how each is undone."""
_OF_COUNTS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "log-transformed": np.expm1,
    "log2-transformed": lambda values: np.exp2(values) - 1,
    "log10-transformed": lambda values: np.power(10.0, values) - 1,
    "square-root transformed": np.square,
}
"""Transformations of raw counts, which have whole numbers behind them."""


@dataclass(frozen=True)
class Scale:
    """Description of fractional values.

    Attributes
    ----------
    what
        Text after "the data look"; None if they cannot be told.
    is_estimated
        Whether they look like estimated counts.
    """

    what: str | None
    is_estimated: bool = False


def scale_of(data: NDArray[np.floating], indptr: NDArray[np.integer]) -> Scale:
    """Tell the scale of finite values, not negative and not all whole, of a CSR matrix.

    Parameters
    ----------
    data
        Values of cells, row by row.
    indptr
        Bounds of the cells, [n_cells + 1].
    """
    rows = [
        row[row > 0]
        for start, stop in zip(indptr[:_ROWS].tolist(), indptr[1 : _ROWS + 1].tolist(), strict=False)
        if (row := data[start:stop].astype(np.float64)).any()
    ]
    values = np.concatenate(rows) if rows else np.zeros(0)
    fractional = values[~_is_whole(values)]
    if not len(fractional):
        # Later rows have them: among so many whole values they are an exception.
        return Scale("like estimated counts", is_estimated=True)
    largest = float(values.max())
    for name, undo in _OF_COUNTS.items():
        with np.errstate(over="ignore"):
            undone = undo(fractional)
        if _are_whole(undone[undone < _LOW]):
            return Scale(name)
    if float(np.median([_share(_is_whole(row)) for row in rows])) >= _WHOLE_SHARE:
        return Scale("like estimated counts", is_estimated=True)
    if total := _same_sum(rows):
        return Scale(f"normalised: each cell adds up to {total:,.0f}")
    if largest < _MOST_LOG:
        for name, undo in _UNDONE.items():
            back = [undo(row) for row in rows]
            if _same_sum(back) or _are_multiples(back):
                return Scale(name)
    if _are_multiples(rows):
        return Scale("normalised")
    if float(np.abs(fractional - np.rint(fractional)).mean()) < _NEAR:
        return Scale("like estimated counts", is_estimated=True)
    return Scale("log-normalised" if largest < _MOST_LOG else None)


def _is_whole(values: NDArray[np.float64], tolerance: float = _WHOLE) -> NDArray[np.bool_]:
    whole: NDArray[np.bool_] = np.abs(values - np.rint(values)) <= tolerance
    return whole


def _are_whole(values: NDArray[np.float64]) -> bool:
    """Return whether computed values, more than one of them different, are whole but for the error of computing."""
    return len(np.unique(np.rint(values))) > 1 and _share(_is_whole(values, _COMPUTED)) > _NEARLY_ALL


def _share(found: NDArray[np.bool_]) -> float:
    return float(found.mean()) if found.size else 0.0


def _same_sum(rows: list[NDArray[np.float64]]) -> float:
    """Return the sum that all cells have; 0 if they differ, or are too few to tell."""
    sums = np.array([row.sum() for row in rows])
    middle = float(np.median(sums))
    if len(sums) < 3 or (np.abs(sums - middle) > 2e-3 * middle).any():
        return 0.0
    return middle


def _are_multiples(rows: list[NDArray[np.float64]]) -> bool:
    """Return whether in nearly all cells nearly all values are multiples of the smallest, that of one count."""
    low = [row[row < _LOW * row.min()] / row.min() for row in rows]
    found = [_are_whole(row) for row in low if len(row) > 3 and len(np.unique(np.rint(row))) > 1]
    return len(found) > 0 and float(np.mean(found)) > 0.9
