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
from perturbscope.threads import checkpoint

MIN_CONTROLS = 4
"""Fewest controls from which the null's unbiased moments can be estimated."""
_ROWS = 65_536
"""Vectors that are scaled at a time when all are needed."""
MAX_COPIES = 0.1
"""Share of cells with the vector of another cell above which copies are suspected. A few shallow cells are equal by
chance; cells that occur twice, in files that were joined, are not exchangeable, and their p is too small."""
_LENGTHS = 10_000
"""Vectors whose lengths are looked at."""
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
    about
        What is taken from each vector before it is scaled, [batches, width], and the batch of each, [n]. A vector of
        which nothing is left stays zero.

    Raises
    ------
    InvalidEmbeddingError
        A row is zero and has no direction.
    """

    def __init__(
        self, values: Floats, *, unit: bool, about: tuple[NDArray[np.float64], NDArray[np.intp]] | None = None
    ) -> None:
        self._values, self._unit, self._about = values, unit, about
        if unit and about is None:
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
        codes = None if self._about is None else self._about[1][positions]
        step = max(1, STEP_VALUES // self.width)
        if len(rows) <= step:
            checkpoint()
            return self._prepared(rows, codes)
        prepared = np.empty(rows.shape)
        for start in range(0, len(rows), step):
            checkpoint()
            part = slice(start, start + step)
            prepared[part] = self._prepared(rows[part], None if codes is None else codes[part])
        return prepared

    def _prepared(self, rows: Floats, codes: NDArray[np.intp] | None) -> NDArray[np.float64]:
        if self._about is None or codes is None:
            return unit_rows(rows) if self._unit else rows.astype(np.float64)
        left = less(rows, self._about[0][codes])
        some = left.any(axis=1)
        if self._unit and some.any():
            left[some] = unit_rows(left[some])
        return left

    def given(self, positions: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the vectors at some positions as they were given, neither scaled nor moved."""
        return self._values[positions].astype(np.float64)

    def is_constant(self, cells: NDArray[np.intp]) -> bool:
        """Whether these cells have one vector, up to the rounding of the values that were given."""
        first = self._values[cells[0]].astype(np.float64)
        step = max(1, STEP_VALUES // self.width)
        for start in range(0, len(cells), step):
            checkpoint()
            part = self._values[cells[start : start + step]]
            single = part.dtype != np.float64 or bool((part == part.astype(np.float32)).all())
            rounding = 16 * np.finfo(np.float32 if single else np.float64).eps
            if float(np.abs(part - first).max()) > rounding * float(np.abs(first).max()):
                return False
        return True

    def scaled(self) -> Vectors:
        """Return the same vectors at unit length; raises the same errors as the class."""
        return self if self._unit else Vectors(self._values, unit=True, about=self._about)


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
        Positions in `rows` of each label's cells, all of them or a seeded sample of `max_cells`, by batch and then by
        key: in an order that depends on the cells and not on the rows that they stand in.
    sizes
        Number of cells with each label.
    batches
        Batch code of each row, or None. Codes follow the cells of a batch, and not its name.
    similar
        Each label that differs from another only in case or white space -> that other label.
    similar_batches
        The same for batches.
    copies
        Share of each label's cells whose vector another cell of the label, or a control, has too.
    keys
        A number made of each row's values (:func:`content_keys`), uint64 [n].
    """

    rows: Vectors
    members: dict[str, NDArray[np.intp]]
    sizes: dict[str, int]
    batches: NDArray[np.intp] | None
    similar: dict[str, str]
    similar_batches: dict[str, str]
    copies: dict[str, float]
    keys: NDArray[np.uint64]

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
        keys = content_keys(values)
        codes = None if codes is None else _by_content(codes, keys)
        about = None
        if options.centre:
            batch = np.zeros(len(values), dtype=np.intp) if codes is None else codes
            about = _means(Vectors(values, unit=False), keys, batch), batch
        rows = Vectors(values, unit=options.normalize, about=about)
        names, inverse = codes_of(labels)
        checkpoint()
        order = np.lexsort((keys, inverse) if codes is None else (keys, codes, inverse))
        checkpoint()
        ends = np.cumsum(np.bincount(inverse)).tolist()
        members = {name: order[i:j] for name, (i, j) in zip(names, pairwise([0, *ends]), strict=True)}
        sizes = {name: len(cells) for name, cells in members.items()}
        if control is not None:
            _check_control(control, sizes, options)
        for name, cells in members.items():
            if len(cells) > options.max_cells:
                checkpoint()
                chance = mixed(keys[cells] ^ mixed(np.array([options.seed + 1], dtype=np.uint64)))
                members[name] = cells[np.sort(np.argsort(chance, kind="stable")[: options.max_cells])]
        copies = _copies(keys, members, control)
        return cls(rows, members, sizes, codes, _similar(list(members)), _similar(batch_names), copies, keys)

    def stream(self, cells: NDArray[np.intp]) -> str:
        """Return a name for random draws that belong to these cells, whatever they are called and in any order."""
        return f"{int(self.keys[cells].sum(dtype=np.uint64)):016x}"

    def is_constant(self, cells: NDArray[np.intp]) -> bool:
        """Whether these cells have one vector, up to the rounding of the values that were given.

        A model's vectors of copies of a cell differ by a few units in the last place, depending on the batch they were
        in. So the values may differ from their mean by that much, in the precision that they have.
        """
        return self.rows.is_constant(cells)

    def centres(self, rows: Vectors) -> NDArray[np.float64]:
        """Return the mean of `rows` over ALL cells of each batch, whatever their labels, [batches or 1, width].

        Exchanges of labels do not change such a mean, so vectors from which it was taken are as exchangeable as before;
        the mean of a batch's controls would not do.
        """
        codes = np.zeros(len(rows), dtype=np.intp) if self.batches is None else self.batches
        return _means(rows, self.keys, codes)

    def length_share(self) -> float:
        """Return the share of the variance of the vectors, as given, that is one of their lengths."""
        order = np.argsort(self.keys, kind="stable")
        some = order[np.linspace(0, len(order) - 1, min(len(order), _LENGTHS)).round().astype(np.intp)]
        rows = self.rows.given(some)
        squares = np.einsum("nw,nw->n", rows, rows)
        whole = float(squares.mean()) - float((rows.mean(axis=0) ** 2).sum())
        of_length = float(np.sqrt(squares).var())
        return of_length / whole if whole > 1e-12 * float(squares.mean()) else 0.0

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
                f"scored: {listing(small)}."
            )
        pairs = sorted({tuple(sorted((name, other))) for name, other in self.similar.items()})
        if pairs:
            warnings.append(
                "Labels that differ only in case or white space are taken as different perturbations: "
                f"{listing([f'{a!r} and {b!r}' for a, b in pairs])}. Merge them if they are one."
            )
        if self.similar_batches:
            pairs = sorted({tuple(sorted(pair)) for pair in self.similar_batches.items()})
            warnings.append(
                "Batches that differ only in case or white space are taken as different batches: "
                f"{listing([f'{a!r} and {b!r}' for a, b in pairs])}. Merge them if they are one."
            )
        large = [name for name in self.members if self.sizes[name] > options.max_cells]
        if large:
            warnings.append(
                f"Groups above {options.max_cells} cells were sampled to that size (seed {options.seed}): "
                f"{listing(large)}."
            )
        return warnings


def _means(rows: Vectors, keys: NDArray[np.uint64], codes: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the mean of the rows with each code, [codes, width], the same in any order of the rows."""
    order = np.argsort(keys, kind="stable")
    totals = np.zeros((int(codes.max()) + 1, rows.width))
    for start in range(0, len(order), _ROWS):
        cells = order[start : start + _ROWS]
        part = rows[cells]
        for code in np.unique(codes[cells]):
            checkpoint()
            totals[code] += part[codes[cells] == code].sum(axis=0)
    means: NDArray[np.float64] = totals / np.bincount(codes)[:, None]
    return means


def less(rows: Floats, centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows about their centres; what is left of a row that is its centre is rounding, and set to 0."""
    left: NDArray[np.float64] = rows - centres
    left[np.abs(left) <= 8 * np.finfo(np.float64).eps * np.abs(centres)] = 0.0
    return left


def content_keys(values: Floats) -> NDArray[np.uint64]:
    """Return a number for each row [n] that depends on its values alone: equal rows have equal keys, in any process.

    Two different rows of a million share a key with a probability of 3e-8. Values of another type of float have the
    keys of the same values in float64.
    """
    scales = np.random.default_rng(0x9E3779B9).integers(0, 2**63, values.shape[1], dtype=np.uint64) * 2 + 1
    keys = np.empty(len(values), dtype=np.uint64)
    step = max(1, STEP_VALUES // values.shape[1])
    for start in range(0, len(values), step):
        checkpoint()
        # 0.0 is added since it turns -0.0, which equals it and has other bits, into 0.0.
        bits = (values[start : start + step].astype(np.float64) + 0.0).view(np.uint64)
        bits ^= bits >> np.uint64(32)
        bits *= scales
        bits ^= bits >> np.uint64(29)
        keys[start : start + step] = mixed(bits.sum(axis=1, dtype=np.uint64))
    return keys


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers whose bits all depend on all bits of the given ones, one to one (the finisher of SplitMix64)."""
    found: NDArray[np.uint64] = values ^ (values >> np.uint64(30))
    found = found * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found ^= found >> np.uint64(31)
    return found


def _by_content(codes: NDArray[np.intp], keys: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Return batch codes in the order of the sum of their cells' keys."""
    order = np.argsort(codes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes))[:-1]])
    sums = np.add.reduceat(keys[order], starts)
    rank = np.empty(len(sums), dtype=np.intp)
    rank[np.argsort(sums, kind="stable")] = np.arange(len(sums))
    return rank[codes]


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
    hint = f"Similar labels: {', '.join(map(repr, close))}." if close else f"Labels: {listing(list(names))}."
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


def _copies(keys: NDArray[np.uint64], members: dict[str, NDArray[np.intp]], control: str | None) -> dict[str, float]:
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


def listing(names: list[str], limit: int = 5) -> str:
    """Return the first names of a list as a message shows them, and how many more there are."""
    return ", ".join(name if len(name) <= _SHOWN else quoted(name) for name in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
