"""The label columns of an uploaded screen, so that its sender can choose from a list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perturbscope.cells.readers import CellSource

MAX_LABELS = 500
"""Most labels that are listed for a column, the most frequent first."""
_KEYS = ("perturbation", "target", "gene", "guide", "condition", "knockout", "treatment")
_CONTROLS = ("control", "ctrl", "nontargeting", "nt", "unperturbed", "safetargeting", "vehicle", "dmso", "neg")


@dataclass(frozen=True)
class LabelColumn:
    """A column of obs with labels.

    Attributes
    ----------
    name
        Name of the column.
    n_labels
        Number of different labels.
    labels
        Pairs of a label and its number of cells, the most frequent first, at most :data:`MAX_LABELS`.
    control
        Label that is likely that of control cells; None if none looks like it.
    """

    name: str
    n_labels: int
    labels: tuple[tuple[str, int], ...]
    control: str | None


@dataclass(frozen=True)
class Columns:
    """The label columns of a screen; the likely column of perturbations first."""

    n_cells: int
    n_genes: int
    columns: tuple[LabelColumn, ...]
    representations: tuple[str, ...]


def read_columns(source: CellSource) -> Columns:
    """Read the columns with at least two labels, and at most half as many labels as cells; fractions are no labels."""
    found = []
    for name in source.columns:
        if source.column(name).dtype.kind == "f":
            continue
        given = [label for label in source.labels(name) if label is not None and label.strip()]
        labels, counts = np.unique(np.asarray(given, dtype=str), return_counts=True)
        if not 2 <= len(labels) <= max(2, source.n_cells // 2):
            continue
        order = np.lexsort((labels, -counts))[:MAX_LABELS]
        listed = tuple((str(labels[i]), int(counts[i])) for i in order)
        found.append(LabelColumn(name, len(labels), listed, likely_control([label for label, _ in listed])))
    found.sort(key=lambda column: (_rank(column.name, _KEYS), column.control is None))
    return Columns(source.n_cells, len(source.gene_ids), tuple(found), tuple(source.representations))


def likely_control(labels: Sequence[str]) -> str | None:
    """Return the label that looks most like that of control cells; None if none does."""
    ranked = sorted(labels, key=lambda label: _rank(label, _CONTROLS))
    return ranked[0] if ranked and _rank(ranked[0], _CONTROLS) < len(_CONTROLS) else None


def columns_to_json(columns: Columns) -> bytes:
    """Encode the answer as JSON."""
    answer: dict[str, Any] = {
        "n_cells": columns.n_cells,
        "n_genes": columns.n_genes,
        "columns": [
            {
                "name": column.name,
                "n_labels": column.n_labels,
                "labels": [{"label": label, "n_cells": count} for label, count in column.labels],
                "control": column.control,
            }
            for column in columns.columns
        ],
        "representations": list(columns.representations),
    }
    return json.dumps(answer).encode()


def _rank(name: str, known: Sequence[str]) -> int:
    """Return the position of the first word of `known` that the letters of the name begin with; else ``len(known)``."""
    letters = "".join(letter for letter in name.casefold() if letter.isalpha())
    return next((i for i, word in enumerate(known) if letters.startswith(word)), len(known))
