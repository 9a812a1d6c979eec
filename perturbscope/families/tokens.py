"""Tokens of cells: ragged arrays whose first axis is length, and the padded arrays that a graph takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneCoverage

TokenizedCell = Mapping[str, NDArray[Any]]
"""Arrays of one cell by input name; the FIRST axis of each is the cell's length."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a family's graph that is padded along its length.

    Attributes
    ----------
    name
        Name of the graph input.
    dtype
        Element type that the graph takes.
    pad_value
        What fills the slots behind a cell's last token.
    trailing
        Shape behind the length axis; () for a plain token sequence.
    n_values
        Number of different ids, 0 to ``n_values - 1``, where the input is ids; None where it is real numbers.
    """

    name: str
    dtype: str
    pad_value: float
    trailing: tuple[int, ...] = ()
    n_values: int | None = None


@dataclass(frozen=True)
class TokenizedCells:
    """Tokens of many cells, stored end to end.

    Attributes
    ----------
    arrays
        By input name, the cells' arrays joined along the first axis, [sum of lengths, ...].
    offsets
        Cell i owns rows ``offsets[i]:offsets[i + 1]``; int64 [n_cells + 1].
    known_share
        Share of each cell's own counts (those in the matrix) that lie in genes of the vocabulary, float32 [n_cells].
    n_detected
        Genes of the vocabulary that each cell expresses, before truncation, int32 [n_cells].
    coverage
        How the columns met the vocabulary.
    """

    arrays: Mapping[str, NDArray[Any]]
    offsets: NDArray[np.int64]
    known_share: NDArray[np.float32]
    n_detected: NDArray[np.int32]
    coverage: GeneCoverage

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, cell: int) -> TokenizedCell:
        rows = slice(int(self.offsets[cell]), int(self.offsets[cell + 1]))
        return {name: array[rows] for name, array in self.arrays.items()}

    def __iter__(self) -> Iterator[TokenizedCell]:
        return (self[cell] for cell in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each cell, int64 [n_cells]."""
        return np.diff(self.offsets)


def concatenate(parts: Sequence[TokenizedCells]) -> TokenizedCells:
    """Join the cells of several callers; coverage is that of the first."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([part.lengths for part in parts])
    return TokenizedCells(
        arrays={name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays},
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        known_share=np.concatenate([part.known_share for part in parts]),
        n_detected=np.concatenate([part.n_detected for part in parts]),
        coverage=parts[0].coverage,
    )


def pad(
    cells: TokenizedCells,
    rows: NDArray[np.integer[Any]],
    inputs: Sequence[InputSpec],
    *,
    length: int | None = None,
) -> dict[str, NDArray[Any]]:
    """The graph inputs of one batch.

    Parameters
    ----------
    cells
        Where the tokens are.
    rows
        Which cells, in the order of the batch, [batch].
    inputs
        The family's inputs.
    length
        What to pad to, at least the longest cell; None: the longest cell.

    Returns
    -------
    Each input [batch, longest, ...] and ``attention_mask``, int64 [batch, longest], 1 on tokens.
    """
    starts, lengths = cells.offsets[rows], cells.lengths[rows]
    longest = int(lengths.max()) if length is None else length
    mask = np.arange(longest) < lengths[:, None]
    take = (starts[:, None] + np.arange(longest))[mask]
    batch: dict[str, NDArray[Any]] = {}
    for spec in inputs:
        padded = np.full((len(rows), longest, *spec.trailing), spec.pad_value, dtype=spec.dtype)
        padded[mask] = cells.arrays[spec.name][take]
        batch[spec.name] = padded
    batch["attention_mask"] = mask.astype(np.int64)
    return batch
