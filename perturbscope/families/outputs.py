"""Outputs of a model by name: what a graph returns for each cell or each token, and the values of a batch of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError

CELL_EMBEDDING = "cell_embedding"
"""Name of the output that every model has: one vector a cell."""
GENE_EMBEDDING = "gene_embedding"
"""Name of the vectors of tokens, in models that have them."""
Per = Literal["cell", "token"]
Meaning = Literal["embedding", "logits", "value"]


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """One output of a model's graph, float32.

    Attributes
    ----------
    name
        Name of the graph's output, of ASCII letters, digits and ``_``: files and columns are called after it.
    per
        ``cell``: the graph returns [batch, width]. ``token``: it returns [batch, length, width].
    width
        Number of values for a cell or token.
    meaning
        ``embedding``: vectors whose distances matter. ``logits``: scores of classes before the softmax. ``value``: a
        quantity, such as an expression.
    names
        Names of the columns (the classes of logits); None: the columns have no names.

    Raises
    ------
    ValueError
        A field is out of range, or there is not one name a column.
    """

    name: str
    per: Per
    width: int
    meaning: Meaning
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not (self.name.isascii() and self.name.isidentifier()):
            raise ValueError(f"an output has the name {self.name!r}, which is not made of letters, digits and _")
        if self.per not in ("cell", "token") or self.meaning not in ("embedding", "logits", "value"):
            raise ValueError(f"the output {self.name!r} is per {self.per!r} and means {self.meaning!r}")
        if type(self.width) is not int or self.width < 1:
            raise ValueError(f"the output {self.name!r} has the width {self.width!r}")
        if self.names is not None and len(self.names) != self.width:
            raise ValueError(f"the output {self.name!r} has {self.width} columns and {len(self.names)} names")


def cell_embedding(width: int) -> OutputSpec:
    """Return the specification of the output that every model has."""
    return OutputSpec(name=CELL_EMBEDDING, per="cell", width=width, meaning="embedding")


def selected(specs: Sequence[OutputSpec], names: Sequence[str] | None) -> tuple[OutputSpec, ...]:
    """Return the outputs that a caller asks for, in the order of the model; the cell embedding is always among them.

    Parameters
    ----------
    specs
        Outputs of the model.
    names
        Names that the caller gave; None: the cell embedding alone.

    Raises
    ------
    InvalidParameterError
        The model has no output of a name.
    """
    wanted = {CELL_EMBEDDING, *(names or ())}
    for name in names or ():
        if name not in {spec.name for spec in specs}:
            raise InvalidParameterError(
                f"The model has no output {name!r}; it has {', '.join(spec.name for spec in specs)}.", field="outputs"
            )
    return tuple(spec for spec in specs if spec.name in wanted)


@dataclass(frozen=True, eq=False)
class Outputs:
    """Values of some outputs for many cells.

    Attributes
    ----------
    specs
        The outputs, in the order of the model.
    values
        Values by name, float32: [n_cells, width] per cell, [sum of lengths, width] per token.
    offsets
        Bounds of the cells in the values per token, int64 [n_cells + 1].
    """

    specs: tuple[OutputSpec, ...]
    values: Mapping[str, NDArray[np.float32]]
    offsets: NDArray[np.int64]

    @classmethod
    def empty(cls, specs: Sequence[OutputSpec], offsets: NDArray[np.int64]) -> Outputs:
        """Make room for the values of the cells with these bounds."""
        rows = {"cell": len(offsets) - 1, "token": int(offsets[-1])}
        values = {spec.name: np.empty((rows[spec.per], spec.width), dtype=np.float32) for spec in specs}
        return cls(tuple(specs), values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.values[name]

    @property
    def cell_embedding(self) -> NDArray[np.float32]:
        """Vectors of the cells, float32 [n_cells, width]."""
        return self.values[CELL_EMBEDDING]

    def put(self, cells: NDArray[np.integer[Any]], batch: Outputs, first: int = 0) -> None:
        """Copy the values of some cells of a batch.

        Parameters
        ----------
        cells
            Numbers of the cells here, [n].
        batch
            Outputs of a batch, which may have more outputs than these.
        first
            Number of the first of them in the batch; the others follow it.
        """
        last = first + len(cells)
        starts, stop = batch.offsets[first:last], int(batch.offsets[last])
        for spec in self.specs:
            values = batch.values[spec.name]
            if spec.per == "cell":
                self.values[spec.name][cells] = values[first:last]
            else:
                lengths = np.diff(batch.offsets[first : last + 1])
                rows = np.repeat(self.offsets[cells] - starts, lengths) + np.arange(batch.offsets[first], stop)
                self.values[spec.name][rows] = values[int(batch.offsets[first]) : stop]
