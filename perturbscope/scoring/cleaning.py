"""Labels as scores take them: several labels of control cells become one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.labels import require_control

_NAMED = 3
"""Controls that the label of all of them names."""


@dataclass(frozen=True)
class Cleaned:
    """Labels of cells with one label for all controls.

    Attributes
    ----------
    labels
        Label of each cell; what was given, if nothing was to be done.
    control
        The one label of control cells, if there is any.
    renamed
        Labels that others have taken the place of -> the others.
    facts
        What was done, for the provenance of a result.
    """

    labels: Sequence[str]
    control: str | None
    renamed: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def pairs(self, pairs: Sequence[tuple[str, str]] | None) -> Sequence[tuple[str, str]] | None:
        """Return pairs of labels by their new names."""
        if pairs is None or not self.renamed:
            return pairs
        return [(self.renamed.get(a, a), self.renamed.get(b, b)) for a, b in pairs]


def clean_labels(perturbations: Sequence[str], control: str | Sequence[str] | None) -> Cleaned:
    """Give all control cells one label.

    Of one control label nothing changes. The label of several does not depend on their order.

    Parameters
    ----------
    perturbations
        Label of each cell.
    control
        The label of control cells, or several.

    Raises
    ------
    InvalidParameterError
        `control` is an empty list, or has entries that are no strings.
    ControlLabelMissingError
        No cell has one of several control labels.
    """
    controls = control_labels(control)
    if len(controls) < 2:
        return Cleaned(perturbations, controls[0] if controls else None)
    column = np.asarray(perturbations, dtype=object)
    codes, names = pd.factorize(column)
    known = [str(name) for name in names]
    for label in controls:
        require_control(label, known)
    merged = _one_name(controls, set(known) - set(controls))
    renamed = dict.fromkeys(controls, merged)
    # Cells without a label (code -1) stay as they are; the check of labels speaks of them.
    new = np.array([renamed.get(name, name) for name in known], dtype=object)
    labels = np.where(codes < 0, column, new[codes]) if len(new) else column
    return Cleaned(labels.tolist(), merged, renamed, {"controls": list(controls)})


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
    labels = tuple(control) if isinstance(control, Collection) else ()
    if not labels or not all(isinstance(label, str) for label in labels):
        raise InvalidParameterError(
            f"control must be a label or a list of labels, not {control!r:.100}.", field="control"
        )
    return tuple(sorted(set(map(str, labels))))


def _one_name(controls: Sequence[str], others: Collection[str]) -> str:
    """Return a name for several controls that no other label has."""
    more = len(controls) - _NAMED
    name = ", ".join(controls) if more < 2 else f"{', '.join(controls[:_NAMED])} and {more} more"
    while name in others:
        name += " (controls)"
    return name
