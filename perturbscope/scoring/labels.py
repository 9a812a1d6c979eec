"""Vectors and labels of cells: checked, scaled, grouped by label and sampled to a bounded size."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbscope.errors import (
    ControlLabelMissingError,
    InvalidParameterError,
    MalformedMatrixError,
    TooFewCellsError,
    TooFewControlsError,
    near,
)
from perturbscope.scoring.distances import STEP_VALUES, Floats, check_rows, unit_rows
from perturbscope.scoring.results import ScoreOptions
from perturbscope.scoring.statistics import generator
from perturbscope.threads import checkpoint

MIN_CONTROLS = 4
"""Fewest controls from which the null's unbiased moments can be estimated."""
_ROWS = 65_536
"""Vectors that are scaled at a time when all are needed."""
MAX_COPIES = 0.1
"""Share of cells with the vector of another cell above which copies are suspected. A few shallow cells are equal by
chance; cells that occur twice, in files that were joined, are not exchangeable, and their p is too small."""
_STEP = 4096
"""Labels or rows that are worked on between two checkpoints, a few milliseconds."""
_MANY = 20_000
"""Labels up to which all are looked through for one that is spelled like a missing one."""
_SHOWN = 100
"""Characters of a label that a message quotes."""


class Vectors:
    """Vectors of cells that become float64, and are scaled, only when they are read: millions of them are held once.

    Parameters
    ----------
    values
        Vectors, float [n, width] and finite; they are not copied.
    unit
        Whether to scale each vector to unit length.

    Raises
    ------
    InvalidEmbeddingError
        A row is zero and has no direction.
    """

    def __init__(self, values: Floats, *, unit: bool) -> None:
        self._values, self._unit = values, unit
        if unit:
            for start in range(0, len(values), _ROWS):
                checkpoint()
                rows = values[start : start + _ROWS]
                if not rows.any(axis=1).all():
                    unit_rows(rows, numbers=np.arange(start, start + len(rows)))

    def __len__(self) -> int:
        return len(self._values)

    @property
    def width(self) -> int:
        """Number of dimensions of a vector."""
        return int(self._values.shape[1])

    def __getitem__(self, positions: NDArray[np.intp] | slice) -> NDArray[np.float64]:
        """Return the vectors at some positions, float64 [n, width]."""
        rows = self._values[positions]
        step = max(1, STEP_VALUES // self.width)
        if len(rows) <= step:
            checkpoint()
            return self._prepared(rows)
        prepared = np.empty(rows.shape)
        for start in range(0, len(rows), step):
            checkpoint()
            prepared[start : start + step] = self._prepared(rows[start : start + step])
        return prepared

    def _prepared(self, rows: Floats) -> NDArray[np.float64]:
        return unit_rows(rows) if self._unit else rows.astype(np.float64)

    def mean(self) -> NDArray[np.float64]:
        """Return the mean vector, float64 [width]."""
        total = sum(self[start : start + _ROWS].sum(axis=0) for start in range(0, len(self), _ROWS))
        mean: NDArray[np.float64] = total / len(self)
        return mean

    def scaled(self) -> Vectors:
        """Return the same vectors at unit length; raises the same errors as the class."""
        return self if self._unit else Vectors(self._values, unit=True)


class Facts(TypedDict):
    """Facts of labelled vectors for :func:`perturbscope.scoring.results.provenance`."""

    n_cells: int
    width: int
    batches: int | None


@dataclass(frozen=True)
class Groups:
    """Vectors of cells, grouped by label.

    Attributes
    ----------
    rows
        Vectors of all cells, of unit length if the options say so.
    members
        Positions in `rows` of each label's cells: all of them, or a seeded sample of `max_cells`.
    sizes
        Number of cells with each label.
    batches
        Batch code of each row, or None.
    similar
        Each label that differs from another only in case or white space -> that other label.
    similar_batches
        The same for batches.
    copies
        Share of each label's cells whose vector another cell of the label, or a control, has too.
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
        """Check vectors and labels, and group the cells.

        Raises
        ------
        InvalidEmbeddingError
            The embeddings are not a finite matrix, or a row is zero and unit length is asked for.
        MalformedMatrixError
            The number of labels or batches differs from the number of rows.
        InvalidParameterError
            A cell has no label or batch.
        ControlLabelMissingError, TooFewControlsError
            No, or too few, cells carry the label `control` (if one is given).
        """
        values = check_rows(embeddings)
        labels = check_labels(perturbations, len(values), "perturbations")
        codes, batch_names = None, list[str]()
        if batches is not None:
            batch_names, codes = codes_of(check_labels(batches, len(values), "batches"))
        rows = Vectors(values, unit=options.normalize)
        names, inverse = codes_of(labels)
        order = np.argsort(inverse, kind="stable")
        ends = np.cumsum(np.bincount(inverse)).tolist()
        members = {name: order[i:j] for name, (i, j) in zip(names, pairwise([0, *ends]), strict=True)}
        sizes = {name: len(cells) for name, cells in members.items()}
        if control is not None:
            _check_control(control, sizes, options)
        for name, cells in members.items():
            if len(cells) > options.max_cells:
                rng = generator(options.seed, "sample", name)
                members[name] = np.sort(rng.choice(cells, options.max_cells, replace=False))
        copies = _copies(values, members, control)
        return cls(rows, members, sizes, codes, _similar(list(members)), _similar(batch_names), copies)

    def pooled_batches(self, a: NDArray[np.intp], b: NDArray[np.intp]) -> NDArray[np.intp] | None:
        """Return the batches of the cells at positions `a`, then `b`; None without batches."""
        return None if self.batches is None else self.batches[np.concatenate([a, b])]

    @property
    def facts(self) -> Facts:
        """Number of cells, their width, and the number of batches."""
        batches = None if self.batches is None else int(self.batches.max()) + 1
        return {"n_cells": len(self.rows), "width": self.rows.width, "batches": batches}

    def has_copies(self, name: str) -> bool:
        """Whether more of a label's cells share their vector with other cells than chance explains."""
        return self.copies[name] > MAX_COPIES

    def scorable(self, names: Sequence[str], options: ScoreOptions) -> list[str]:
        """Return the labels with at least `min_cells` cells.

        Raises
        ------
        TooFewCellsError
            No label has that many.
        """
        large = [name for name in names if self.sizes[name] >= options.min_cells]
        if not large:
            largest = max(names, key=lambda name: self.sizes[name], default=None)
            detail = "there is no label to score"
            if largest:
                detail = f"the largest, {quoted(largest)}, has {self.sizes[largest]}"
            raise TooFewCellsError(
                f"No perturbation has {options.min_cells} cells or more; {detail}. "
                "Give more cells, or lower min_cells and read the result with care.",
                field="perturbations",
            )
        return large

    def label_flags(self, name: str, options: ScoreOptions) -> list[str]:
        """Return the flags that depend on the label alone."""
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
        """Return warnings about the labels `names` and about batches."""
        warnings = []
        small = [name for name in names if self.sizes[name] < options.min_cells]
        if small:
            warnings.append(
                f"{len(small)} of {len(names)} perturbations have fewer than {options.min_cells} cells and were not "
                f"scored: {_listing(small)}."
            )
        pairs = sorted({tuple(sorted((name, other))) for name, other in self.similar.items()})
        if pairs:
            warnings.append(
                "Labels that differ only in case or white space are taken as different perturbations: "
                f"{_listing([f'{a!r} and {b!r}' for a, b in pairs])}. Merge them if they are one."
            )
        if self.similar_batches:
            pairs = sorted({tuple(sorted(pair)) for pair in self.similar_batches.items()})
            warnings.append(
                "Batches that differ only in case or white space are taken as different batches: "
                f"{_listing([f'{a!r} and {b!r}' for a, b in pairs])}. Merge them if they are one."
            )
        large = [name for name in self.members if self.sizes[name] > options.max_cells]
        if large:
            warnings.append(
                f"Groups above {options.max_cells} cells were sampled to that size (seed {options.seed}): "
                f"{_listing(large)}."
            )
        return warnings


def check_labels(values: Sequence[str], n: int, field: str) -> NDArray[np.object_]:
    """Return one label a cell as strings, objects [n]; `field` names the argument in messages.

    Cells with the same label may share its string: an array of numpy's strings would take the room of the longest label
    for each cell.

    Raises
    ------
    MalformedMatrixError
        The number of labels is not `n`.
    InvalidParameterError
        A cell has no label.
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
    labels = np.empty(n, dtype=object)
    for start in range(0, n, _STEP):
        checkpoint()
        labels[start : start + _STEP] = [str(value) for value in column[start : start + _STEP]]
    return labels


def codes_of(labels: NDArray[np.object_]) -> tuple[list[str], NDArray[np.intp]]:
    """Return the different labels, sorted, and the position among them of each: as ``np.unique``, in linear time."""
    codes, found = pd.factorize(labels)
    checkpoint()
    names = found.tolist()
    order = sorted(range(len(names)), key=names.__getitem__)
    checkpoint()
    rank = np.empty(len(names), dtype=np.intp)
    rank[order] = np.arange(len(names))
    return [names[i] for i in order], rank[codes]


def require_control(control: str, names: Collection[str]) -> None:
    """Refuse a control label that is none of `names`, and suggest similar ones.

    Raises
    ------
    ControlLabelMissingError
        No cell has the label.
    """
    if control in names:
        return
    alike = _spelled_like([*([control] if len(control) <= _SHOWN else []), *_USUAL], names)
    key = _key(control)
    close = dict.fromkeys([*(name for name in alike if _key(name) == key), *near(control, names), *alike])
    hint = f"Similar labels: {', '.join(map(repr, close))}." if close else f"Labels: {_listing(list(names))}."
    raise ControlLabelMissingError(f"No cell has the control label {quoted(control)}. {hint}", field="control")


_USUAL = ("control", "ctrl", "non-targeting", "nt", "unperturbed", "vehicle", "dmso")


def _spelled_like(labels: Sequence[str], names: Collection[str]) -> list[str]:
    """Return at most ten of the names that differ from a label only in case or white space."""
    keys = set(map(_key, labels))
    if len(names) > _MANY:
        known = set(names)
        forms = (str.lower, str.upper, str.title, str.capitalize)
        return sorted({form(key) for key in keys for form in forms} & known)[:10]
    longest = 2 * max(map(len, keys)) + 8
    return [name for name in names if len(name) <= longest and _key(name) in keys][:10]


def quoted(label: str) -> str:
    """Return a label as a message shows it: in quotes, and cut if it is long."""
    return repr(label) if len(label) <= _SHOWN else f"{label[:_SHOWN]!r}... ({len(label):,} characters)"


def _check_control(control: str, sizes: dict[str, int], options: ScoreOptions) -> None:
    require_control(control, sizes)
    floor = max(options.min_cells, MIN_CONTROLS)
    if sizes[control] < floor:
        raise TooFewControlsError(
            f"{sizes[control]} cells carry the control label {quoted(control)}; at least {floor} are needed. "
            "Give more control cells, or lower min_cells and read the result with care.",
            field="control",
        )


def _key(label: str) -> str:
    return " ".join(label.split()).casefold()


def _copies(
    rows: NDArray[np.floating[Any]], members: dict[str, NDArray[np.intp]], control: str | None
) -> dict[str, float]:
    keys = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), _STEP):
        checkpoint()
        keys[start : start + _STEP] = [hash(row.tobytes()) for row in rows[start : start + _STEP]]
    cells = np.concatenate(list(members.values()))
    sizes = np.array([len(part) for part in members.values()])
    label = np.repeat(np.arange(len(members)), sizes)
    keys = keys[cells]
    checkpoint()
    # Cells of one label with one key are neighbours in this order.
    order = np.lexsort((keys, label))
    checkpoint()
    same = (np.diff(label[order]) == 0) & (np.diff(keys[order]) == 0)
    shared = np.zeros(len(cells), dtype=bool)
    shared[order[1:][same]] = shared[order[:-1][same]] = True
    if control is not None:
        of_control = label == list(members).index(control)
        shared |= np.isin(keys, keys[of_control]) & ~of_control
    counts = np.bincount(label[shared], minlength=len(members))
    return dict(zip(members, (counts / sizes).tolist(), strict=True))


def _similar(names: list[str]) -> dict[str, str]:
    by_key: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        if number % _STEP == 0:
            checkpoint()
        by_key.setdefault(_key(name), []).append(name)
    return {
        name: next(other for other in same if other != name)
        for same in by_key.values()
        if len(same) > 1
        for name in same
    }


def _listing(names: list[str], limit: int = 5) -> str:
    return ", ".join(name if len(name) <= _SHOWN else quoted(name) for name in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
