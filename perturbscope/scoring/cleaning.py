"""Labels as scores take them: without missing ones, one spelling for each combination, one label for all controls.

Only what a caller asks for is changed. What looks like a mistake in the labels that are left is warned of by name: text
that stands for a missing value, and one combination in several spellings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneResolver
from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.labels import listing, quoted, require_control
from perturbscope.scoring.results import ScoreOptions
from perturbscope.threads import checkpoint

T = TypeVar("T")
_MISSING = """
. ? - -- _ * na n/a n.a. #n/a #na <na> nan -nan none null nil nat missing unknown unassigned unmapped unidentified
undefined undetermined <none> <null> (missing) (blank)
"""
_CONTROLS = """
control controls ctrl ctl negctrl negcontrol negativecontrol nontargeting nontarget safetargeting unperturbed scramble
scrambled vehicle dmso mock untreated
"""
MISSING = frozenset(_MISSING.split()) | {"", "not assigned", "not available", "not detected", "no call"}
"""Text that tables write in place of a missing value, in lower case."""
CONTROLS = frozenset(_CONTROLS.split())
"""Names of controls, in lower case and without digits, blanks and signs."""
_SHORT_CONTROL = re.compile(r"(nt|ntc|neg)([-_ ]?\d+)?", re.IGNORECASE)
_SIGNS = re.compile(r"\s*[+;|,&]\s*")
"""Signs that join the parts of a combination wherever they stand."""
_DOUBTFUL = re.compile(r"[_/:]+")
"""Signs that join the parts of a combination, or belong to a name: guide_1, 10 ng/ml."""
_STEP = 4096
_NAMED = 3
"""Controls that the label of all of them names."""


@dataclass(frozen=True)
class Cleaned:
    """Labels of cells as they are scored.

    Attributes
    ----------
    labels
        Label of each cell that is left; what was given, if nothing was to be done.
    control
        The one label of control cells, if there is any.
    rows
        Places of these cells among those given; None: all are left.
    renamed
        Labels that others have taken the place of -> the others.
    facts
        What was done, for the provenance of a result.
    warnings
        What was done, and which labels look like a mistake.
    """

    labels: Sequence[str]
    control: str | None
    rows: NDArray[np.intp] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def pairs(self, pairs: Sequence[tuple[str, str]] | None) -> Sequence[tuple[str, str]] | None:
        """Return pairs of labels by their new names."""
        if pairs is None or not self.renamed:
            return pairs
        return [(self.renamed.get(a, a), self.renamed.get(b, b)) for a, b in pairs]

    def kept(self, values: T) -> T:
        """Return what belongs to the cells that are left: rows of an array or of counts, entries of a list, or None."""
        if self.rows is None or values is None:
            return values
        taken: Any = values
        if isinstance(values, list | tuple):
            return type(taken)(taken[row] for row in self.rows)  # type: ignore[no-any-return]
        found: T = taken[self.rows]
        return found


def clean_labels(
    perturbations: Sequence[str],
    control: str | Sequence[str] | None,
    *,
    batches: Sequence[str] | None = None,
    missing: Collection[str] = (),
    combinations: bool = False,
) -> Cleaned:
    """Take missing labels out, make the spellings of a combination one, and give all control cells one label.

    Parameters
    ----------
    perturbations
        Label of each cell.
    control
        The label of control cells, or several: the label that they get does not depend on their order.
    batches
        Batch of each cell; one that is named in `missing` takes the cell out, too.
    missing
        Labels that stand for a missing one; an empty one stands for blank ones and for None.
    combinations
        Whether to write the parts of a combination in one order, joined by ``+``, without controls among them: ``B,A``
        becomes ``A+B``, and ``A+ctrl`` becomes ``A``. ``A_B`` is one if each part is another label, a gene or a
        control.

    Raises
    ------
    InvalidParameterError
        `control` is an empty list, or has entries that are no strings; or it is named in `missing`.
    ControlLabelMissingError
        No cell has one of several control labels.
    """
    controls = control_labels(control)
    both = sorted(set(controls) & set(missing))
    if both:
        raise InvalidParameterError(
            f"{both[0]!r} is a control label and a missing label; it can be one of them.", field="missing_labels"
        )
    codes, names = _factorized(perturbations)
    warnings, facts = list[str](), dict[str, Any]()
    rows = None
    if missing:
        left_out = _matching(codes, names, missing)
        if batches is not None:
            left_out |= _matching(*_factorized(batches), missing)
        if left_out.any():
            rows = np.flatnonzero(~left_out)
            facts["missing_labels"] = sorted(missing)
            facts["n_cells_missing_label"] = int(left_out.sum())
            warnings.append(
                f"{int(left_out.sum())} of {len(left_out)} cells have a label or batch that stands for a missing one "
                f"({listing(list(map(repr, sorted(missing))))}) and were left out."
            )
            codes = codes[rows]
            names = [name if used else None for name, used in zip(names, _used(codes, len(names)), strict=True)]
    known = {name for name in names if name is not None}
    renamed = _combined(known, controls) if combinations else {}
    if renamed:
        facts["combinations"] = len(renamed)
        shown = listing([f"{quoted(old)} as {quoted(new)}" for old, new in sorted(renamed.items())])
        warnings.append(f"{len(renamed)} labels of combinations were written in one way: {shown}.")
    one = controls[0] if controls else None
    if len(controls) > 1:
        found = known | set(renamed.values())
        for label in controls:
            require_control(label, found)
        one = _one_name(controls, {renamed.get(name, name) for name in known} - set(controls))
        facts["controls"] = list(controls)
        renamed = {old: one if new in controls else new for old, new in renamed.items()} | dict.fromkeys(controls, one)
    left = {renamed.get(name, name) for name in known}
    warnings += _suspicions(left, one)
    if rows is None and not renamed:
        return Cleaned(perturbations, one, warnings=warnings)
    if rows is not None and not renamed and isinstance(perturbations, list | tuple):
        labels: list[Any] = [perturbations[row] for row in rows]
    else:
        # Cells without a label stay as they are; the check of labels speaks of them.
        new = np.array([*(None if name is None else renamed.get(name, name) for name in names), None], dtype=object)
        labels = new[codes].tolist()
    return Cleaned(labels, one, rows, renamed, facts, warnings)


def cleaned_for(
    options: ScoreOptions,
    perturbations: Sequence[str],
    control: str | Sequence[str] | None,
    batches: Sequence[str] | None = None,
) -> Cleaned:
    """Clean labels as the options of a score say; see :func:`clean_labels`."""
    return clean_labels(
        perturbations,
        control,
        batches=batches,
        missing=options.missing_labels,
        combinations=options.normalize_combinations,
    )


def control_labels(control: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the labels of control cells, each once and in one order; none if there are none.

    Raises
    ------
    InvalidParameterError
        The list is empty, or has entries that are no strings.
    """
    if control is None:
        return ()
    if isinstance(control, str):
        return (control,)
    labels = tuple(control) if isinstance(control, Iterable) else ()
    if not labels or not all(isinstance(label, str) for label in labels):
        raise InvalidParameterError(
            f"control must be a label or a list of labels, not {control!r:.100}.", field="control"
        )
    return tuple(sorted(set(map(str, labels))))


def looks_missing(label: str) -> bool:
    """Whether a label is a text that tables write in place of a missing value."""
    return len(label) < 20 and label.strip().casefold() in MISSING


def looks_like_control(label: str) -> bool:
    """Whether a label is a usual name of controls: ctrl, non-targeting_00012, NT-1, NegCtrl0."""
    if len(label) > 40:
        return False
    return _SHORT_CONTROL.fullmatch(label) is not None or re.sub(r"[\W\d_]+", "", label).casefold() in CONTROLS


def _factorized(labels: Sequence[str]) -> tuple[NDArray[np.intp], list[str | None]]:
    """Return the place of each label among the different ones, and these; -1 and none for a missing one."""
    codes, found = pd.factorize(np.asarray(labels, dtype=object))
    checkpoint()
    return codes, [str(name) for name in found]


def _used(codes: NDArray[np.intp], n: int) -> list[bool]:
    return list((np.bincount(codes[codes >= 0], minlength=n) > 0).tolist())


def _matching(codes: NDArray[np.intp], names: Sequence[str | None], missing: Collection[str]) -> NDArray[np.bool_]:
    """Return which cells have one of these labels."""
    blank = any(not label.strip() for label in missing)
    hit = [name in missing or (blank and not str(name).strip()) for name in names]
    found: NDArray[np.bool_] = np.array([*hit, blank], dtype=bool)[codes]
    return found


def _combined(known: Collection[str], controls: Sequence[str]) -> dict[str, str]:
    """Return the one spelling of each label that is a combination and has another."""
    renamed = {}
    for name, parts in _combinations(known, known, controls).items():
        spelled = "+".join(parts) or (controls[0] if controls else _parts(name)[0])
        if spelled != name:
            renamed[name] = spelled
    return renamed


def _combinations(names: Iterable[str], known: Collection[str], controls: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the names that are combinations, each with its parts in order, but without controls."""
    found = {}
    for number, name in enumerate(names):
        if number % _STEP == 0:
            checkpoint()
        parts = _parts(name)
        if len(parts) > 1 and all(parts) and (_SIGNS.search(name) or _are_labels(name, parts, known, controls)):
            found[name] = _others(parts, controls)
    return found


def _parts(name: str) -> list[str]:
    return (_SIGNS if _SIGNS.search(name) else _DOUBTFUL).split(name.strip())


def _others(parts: Iterable[str], controls: Sequence[str]) -> tuple[str, ...]:
    """Return the parts that are no controls, in one order."""
    return tuple(sorted(part for part in parts if part not in controls and not looks_like_control(part)))


def _are_labels(name: str, parts: Sequence[str], known: Collection[str], controls: Sequence[str]) -> bool:
    """Whether each part of a name is another label, a control or a gene, and the whole is no control and no gene."""
    resolve = GeneResolver.default().resolve
    if name in controls or looks_like_control(name) or resolve(name)[0] is not None:
        return False
    return all(
        part in known
        or part in controls
        or looks_like_control(part)
        or (len(part) > 1 and resolve(part)[0] is not None)
        for part in parts
    )


def _suspicions(known: set[str], control: str | None) -> list[str]:
    """Return warnings about labels that look like a mistake."""
    warnings = []
    missing = sorted(name for name in known if name != control and looks_missing(name))
    if missing:
        warnings.append(
            f"Labels that look like a missing label are taken as perturbations: {listing(list(map(repr, missing)))}. "
            f"missing_labels={missing[:3]} (--missing-label {missing[0]}) leaves their cells out."
        )
    same = _spelled_twice(known, control)
    if same:
        pairs = listing([" and ".join(map(quoted, names[:3])) for names in same])
        warnings.append(
            f"Labels that seem to name one combination are taken as different perturbations: {pairs}. "
            "normalize_combinations=True (--normalize-combinations) makes them one."
        )
    return warnings


def _spelled_twice(known: Collection[str], control: str | None) -> list[list[str]]:
    """Return the labels of each combination that has several."""
    controls = () if control is None else (control,)
    joined = [name for name in known if _SIGNS.search(name) or _DOUBTFUL.search(name)]
    by_parts: dict[tuple[str, ...], list[str]] = {}
    for number, name in enumerate(joined):
        if number % _STEP == 0:
            checkpoint()
        by_parts.setdefault(_others(_parts(name), controls), []).append(name)
    found = []
    for parts, names in by_parts.items():
        alone = [parts[0]] if len(parts) == 1 and parts[0] in known else []
        # Genes are looked up only where the same parts stand in another label too.
        if parts and len(names) + len(alone) > 1:
            alike = [*_combinations(names, known, controls), *alone]
            if len(alike) > 1:
                found.append(sorted(alike))
    return sorted(found)


def _one_name(controls: Sequence[str], others: Collection[str]) -> str:
    """Return a name for several controls that no other label has."""
    more = len(controls) - _NAMED
    name = ", ".join(controls) if more < 2 else f"{', '.join(controls[:_NAMED])} and {more} more"
    while name in others:
        name += " (controls)"
    return name
