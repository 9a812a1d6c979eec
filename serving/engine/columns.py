"""The label columns of an uploaded screen, so that its sender can choose from a list."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perturbscope.cells.readers import CellSource
from perturbscope.scoring.cleaning import looks_like_control

MAX_LABELS = 500
"""Most labels that are listed for a column, the most frequent first."""
_KEYS = ("perturbation", "target", "gene", "guide", "grna", "sgrna", "condition", "knockout", "treatment", "drug")
"""Words of the names of columns that hold perturbations, the likeliest first."""
_BESIDE = ("key", "name", "label", "id", "identity", "call", "symbol", "assigned", "assignment")


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
    controls
        All labels that look like it.
    recognised
        Whether the column is likely that of the perturbations: its name or a label of controls says so.
    """

    name: str
    n_labels: int
    labels: tuple[tuple[str, int], ...]
    control: str | None
    controls: tuple[str, ...]
    recognised: bool


@dataclass(frozen=True)
class Columns:
    """The label columns of a screen, the likely column of perturbations first; and where else its counts may be.

    Attributes
    ----------
    layers
        Names that the parameter ``layer`` takes.
    gene_columns
        Names that the parameter ``gene_key`` takes.
    """

    n_cells: int
    n_genes: int
    columns: tuple[LabelColumn, ...]
    representations: tuple[str, ...]
    layers: tuple[str, ...] = ()
    gene_columns: tuple[str, ...] = ()


def read_columns(source: CellSource) -> Columns:
    """Read the columns with at least two labels, and at most half as many labels as cells; fractions are no labels."""
    found = []
    for name in source.columns:
        if source.column(name).dtype.kind == "f":
            continue
        # Not with numpy, in whose arrays all labels are as long as the longest.
        counts = Counter(label for label in source.labels(name) if label is not None and label.strip())
        if not 2 <= len(counts) <= max(2, source.n_cells // 2):
            continue
        listed = tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_LABELS])
        controls = likely_controls(sorted(counts))
        recognised = bool(controls) or _rank(name) < len(_KEYS)
        first = controls[0] if controls else None
        found.append(LabelColumn(name, len(counts), listed, first, controls[:MAX_LABELS], recognised))
    found.sort(key=lambda column: (_rank(column.name), column.control is None))
    return Columns(
        source.n_cells,
        len(source.gene_ids),
        tuple(found),
        tuple(source.representations),
        tuple(source.layers),
        tuple(source.gene_columns),
    )


def likely_controls(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels that look like those of control cells, plain ``control`` first."""
    found = [label for label in labels if looks_like_control(label)]
    return tuple(sorted(found, key=lambda label: label.strip().casefold() not in ("control", "ctrl")))


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
                "controls": list(column.controls),
                "recognised": column.recognised,
            }
            for column in columns.columns
        ],
        "representations": list(columns.representations),
        "layers": list(columns.layers),
        "gene_columns": list(columns.gene_columns),
    }
    return json.dumps(answer).encode()


def _rank(name: str) -> int:
    """Return the position of the first word of :data:`_KEYS` that the name is made of; their number if it is none.

    Beside it there may be words that add nothing: ``target_gene``, ``sgRNA_id``, and not ``genes_of_interest``.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name)
    words = {word.casefold().removesuffix("s") for word in re.findall(r"[^\W\d_]+", spaced)}
    if not words <= {*_KEYS, *_BESIDE}:
        return len(_KEYS)
    return next((i for i, word in enumerate(_KEYS) if word in words), len(_KEYS))
