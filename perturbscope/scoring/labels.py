"""Labelled vectors: checked, grouped by label, sampled to a bounded size, scaled."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbscope.errors import (
    ControlLabelMissingError,
    InvalidParameterError,
    MalformedMatrixError,
    TooFewCellsError,
    TooFewControlsError,
)
from perturbscope.scoring.distances import Floats, check_rows, unit_rows
from perturbscope.scoring.results import ScoreOptions
from perturbscope.scoring.statistics import generator

MIN_CONTROLS = 4
"""Cells that the null's unbiased moments need at the very least."""
_ROWS = 65_536
"""Vectors that are scaled at a time where all are needed."""
MAX_COPIES = 0.1
"""Share of cells with the vector of another cell above which copies are suspected. A few shallow cells are equal by
chance; the same cells twice, from files that were joined, are not exchangeable, and their p is too small."""


class Vectors:
    """Vectors of cells, made float64 and scaled when they are asked for: those of millions of cells are held once.

    Parameters
    ----------
    values
        float [n, width], finite; kept as they are.
    unit
        Scale each to unit length.

    Raises
    ------
    InvalidEmbeddingError
        A row is zero and has no direction.
    """

    def __init__(self, values: Floats, *, unit: bool) -> None:
        self._values, self._unit = values, unit
        if unit:
            for start in range(0, len(values), _ROWS):
                rows = values[start : start + _ROWS]
                if not rows.any(axis=1).all():
                    unit_rows(rows, numbers=np.arange(start, start + len(rows)))

    def __len__(self) -> int:
        return len(self._values)

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        return int(self._values.shape[1])

    def __getitem__(self, positions: NDArray[np.intp] | slice) -> NDArray[np.float64]:
        """The vectors at some positions, float64 [n, width]."""
        rows = self._values[positions]
        return unit_rows(rows) if self._unit else rows.astype(np.float64)

    def mean(self) -> NDArray[np.float64]:
        """Mean vector, float64 [width]."""
        total = sum(self[start : start + _ROWS].sum(axis=0) for start in range(0, len(self), _ROWS))
        mean: NDArray[np.float64] = total / len(self)
        return mean

    def scaled(self) -> Vectors:
        """The same vectors at unit length. Raises as the class."""
        return self if self._unit else Vectors(self._values, unit=True)


@dataclass(frozen=True)
class Groups:
    """Vectors by label.

    Attributes
    ----------
    rows
        The vectors of all cells, of unit length if the options say so.
    members
        Positions in `rows` of each label's cells: all of them, or a seeded sample of `max_cells`.
    sizes
        Cells that carry each label.
    batches
        Batch code of each row, or None.
    similar
        Labels that differ from another only in case or white space, and that other.
    similar_batches
        The same of batches.
    copies
        Share of each label's cells whose vector is also that of another cell of the label, or of a control.
    """

    rows: Vectors
    members: dict[str, NDArray[np.intp]]
    sizes: dict[str, int]
    batches: NDArray[np.intp] | None
    similar: dict[str, str]
    similar_batches: dict[str, str]
    copies: dict[str, float]

    @classmethod
    def of(
        cls,
        embeddings: Any,
        perturbations: Sequence[str],
        batches: Sequence[str] | None,
        options: ScoreOptions,
        *,
        control: str | None = None,
    ) -> Groups:
        """Check and group.

        Raises
        ------
        InvalidEmbeddingError
            Not a finite matrix, or a zero row where unit length is asked for.
        MalformedMatrixError
            Labels or batches that are not as many as the rows.
        InvalidParameterError
            A cell without a label or batch.
        ControlLabelMissingError, TooFewControlsError
            No, or too few, cells carry the label `control` (if one is given).
        """
        values = check_rows(embeddings)
        labels = check_labels(perturbations, len(values), "perturbations")
        codes, batch_names = None, np.empty(0, dtype=np.str_)
        if batches is not None:
            batch_names, codes = np.unique(check_labels(batches, len(values), "batches"), return_inverse=True)
        rows = Vectors(values, unit=options.normalize)
        names, inverse = np.unique(labels, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        members = dict(
            zip(names.tolist(), np.split(order, np.cumsum(np.bincount(inverse))[:-1].astype(int)), strict=True)
        )
        sizes = {name: len(cells) for name, cells in members.items()}
        if control is not None:
            _check_control(control, sizes, options)
        for name, cells in members.items():
            if len(cells) > options.max_cells:
                rng = generator(options.seed, "sample", name)
                members[name] = np.sort(rng.choice(cells, options.max_cells, replace=False))
        copies = _copies(values, members, control)
        return cls(rows, members, sizes, codes, _similar(list(members)), _similar(batch_names.tolist()), copies)

    def pooled_batches(self, a: NDArray[np.intp], b: NDArray[np.intp]) -> NDArray[np.intp] | None:
        """Batches of the cells at positions `a`, then `b`."""
        return None if self.batches is None else self.batches[np.concatenate([a, b])]

    def has_copies(self, name: str) -> bool:
        """Whether more of a label's cells share their vector with others than a few equal cells explain."""
        return self.copies[name] > MAX_COPIES

    def scorable(self, names: Sequence[str], options: ScoreOptions) -> list[str]:
        """The labels with at least `min_cells` cells.

        Raises
        ------
        TooFewCellsError
            None has.
        """
        found = [name for name in names if self.sizes[name] >= options.min_cells]
        if not found:
            largest = max(names, key=lambda name: self.sizes[name], default=None)
            detail = f"the largest, {largest!r}, has {self.sizes[largest]}" if largest else "there is no label to score"
            raise TooFewCellsError(
                f"No perturbation has {options.min_cells} cells or more; {detail}. "
                "Give more cells, or lower min_cells and read the result with care.",
                field="perturbations",
            )
        return found

    def label_flags(self, name: str, options: ScoreOptions) -> list[str]:
        """Flags that hang on the label alone."""
        flags = []
        if self.sizes[name] < options.min_cells:
            flags.append("too_few_cells")
        if name in self.similar:
            flags.append("similar_label")
        if self.sizes[name] > options.max_cells:
            flags.append("cells_subsampled")
        if self.has_copies(name):
            flags.append("duplicated_vectors")
        return flags

    def warnings(self, names: Sequence[str], options: ScoreOptions) -> list[str]:
        """What a careful reader should know of the labels `names`."""
        found = []
        small = [name for name in names if self.sizes[name] < options.min_cells]
        if small:
            found.append(
                f"{len(small)} of {len(names)} perturbations have fewer than {options.min_cells} cells and were not "
                f"scored: {_listing(small)}."
            )
        pairs = sorted({tuple(sorted((name, other))) for name, other in self.similar.items()})
        if pairs:
            found.append(
                "Labels that differ only in case or white space are taken as different perturbations: "
                f"{_listing([f'{a!r} and {b!r}' for a, b in pairs])}. Merge them if they are one."
            )
        if self.similar_batches:
            pairs = sorted({tuple(sorted(pair)) for pair in self.similar_batches.items()})
            found.append(
                "Batches that differ only in case or white space are taken as different batches: "
                f"{_listing([f'{a!r} and {b!r}' for a, b in pairs])}. Merge them if they are one."
            )
        large = [name for name in self.members if self.sizes[name] > options.max_cells]
        if large:
            found.append(
                f"Groups above {options.max_cells} cells were sampled to that size (seed {options.seed}): "
                f"{_listing(large)}."
            )
        return found


def check_labels(values: Sequence[str], n: int, field: str) -> NDArray[np.str_]:
    """One label a cell, [n]; `field` is its name in messages.

    Raises
    ------
    MalformedMatrixError
        Not as many as the cells.
    InvalidParameterError
        A cell has none.
    """
    column = np.asarray(values, dtype=object)
    if column.shape != (n,):
        raise MalformedMatrixError(f"{n} cells, but {field} has shape {column.shape}; give one a cell.", field=field)
    missing = np.asarray(pd.isna(column) | np.asarray([str(value).strip() == "" for value in column]))
    if missing.any():
        raise InvalidParameterError(
            f"{int(missing.sum())} cells have no value in {field} (the first is row {int(missing.argmax())}). "
            "Leave these cells out, or give them a label of their own.",
            field=field,
        )
    return column.astype(str)


def require_control(control: str, names: Sequence[str]) -> None:
    """Refuse a control label that is none of `names`, with those that may have been meant.

    Raises
    ------
    ControlLabelMissingError
        No cell has the label.
    """
    if control in names:
        return
    key = _key(control)
    close = [name for name in names if _key(name) == key]
    close += [name for name in difflib.get_close_matches(control, list(names), n=3) if name not in close]
    usual = ("control", "ctrl", "non-targeting", "nt", "unperturbed", "vehicle", "dmso")
    close += [name for name in names if _key(name) in usual and name not in close]
    hint = f"Similar labels: {', '.join(map(repr, close))}." if close else f"Labels: {_listing(list(names))}."
    raise ControlLabelMissingError(f"No cell has the control label {control!r}. {hint}", field="control")


def _check_control(control: str, sizes: dict[str, int], options: ScoreOptions) -> None:
    require_control(control, list(sizes))
    floor = max(options.min_cells, MIN_CONTROLS)
    if sizes[control] < floor:
        raise TooFewControlsError(
            f"{sizes[control]} cells carry the control label {control!r}; at least {floor} are needed. "
            "Give more control cells, or lower min_cells and read the result with care.",
            field="control",
        )


def _key(label: str) -> str:
    return " ".join(label.split()).casefold()


def _copies(
    rows: NDArray[np.floating[Any]], members: dict[str, NDArray[np.intp]], control: str | None
) -> dict[str, float]:
    keys = np.fromiter((hash(row.tobytes()) for row in rows), dtype=np.int64, count=len(rows))
    controls = np.empty(0, dtype=np.int64) if control is None else np.unique(keys[members[control]])
    found = {}
    for name, cells in members.items():
        _, inverse, counts = np.unique(keys[cells], return_inverse=True, return_counts=True)
        shared = counts[inverse] > 1
        if name != control:
            shared |= np.isin(keys[cells], controls)
        found[name] = float(shared.mean())
    return found


def _similar(names: list[str]) -> dict[str, str]:
    by_key: dict[str, list[str]] = {}
    for name in names:
        by_key.setdefault(_key(name), []).append(name)
    return {
        name: next(other for other in same if other != name)
        for same in by_key.values()
        if len(same) > 1
        for name in same
    }


def _listing(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
