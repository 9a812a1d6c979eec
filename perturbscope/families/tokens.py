"""Parts that the tokenizers of all families share: counts by gene of a vocabulary, tokens, and padded batches.

Tokens are ragged arrays whose first axis is length; a graph takes them padded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.gene_names import explained
from perturbscope.cells.genes import GeneCoverage, GeneResolver
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import EmptyCellError, UnknownGenesError

_SHOWN = 10
"""Rows that a message names."""
_EXPLAINED = 2000
"""Unknown names that are looked at to say what they are."""
MIN_COVERAGE = 0.1
"""Least share of the columns that must be genes of the vocabulary."""
TokenizedCell = Mapping[str, NDArray[Any]]
"""Arrays of one cell by input name; the FIRST axis of those per token is the cell's length."""


def unknown_genes(coverage: GeneCoverage, others: Sequence[str]) -> UnknownGenesError:
    """Return the error of columns of which too few are genes of the vocabulary; it says what the others look like.

    Parameters
    ----------
    coverage
        Report on the matching.
    others
        Names of columns that are none; the first are enough.
    """
    some = f"Only {coverage.n_matched} of {coverage.n_genes} genes are"
    many = some if coverage.n_matched else f"None of the {coverage.n_genes} genes is"
    needed = f"; at least {MIN_COVERAGE:.0%} are needed" if coverage.share < MIN_COVERAGE else ""
    look = explained(others)
    return UnknownGenesError(
        f"{many} in the model's vocabulary{needed} (unknown: {', '.join(others[:3])}). {look}{' ' if look else ''}"
        "Give human Ensembl ids or symbols, and name the column that holds them (gene_key) if they are not the index.",
        field="gene_ids",
    )


class VocabularyCounts:
    """Raw counts with the gene of each column; columns of one gene are added up.

    Parameters
    ----------
    cells
        Raw counts of cells.
    vocabulary
        Genes that the model knows.
    resolver
        Way from the caller's identifiers to Ensembl ids.

    Attributes
    ----------
    counts
        CSR matrix, [n_cells, n_columns], in which no cell has two values of one gene of the vocabulary.
    indptr
        Bounds of the cells in `counts`, int64 [n_cells + 1].
    genes
        Row of the vocabulary for each column, or `n_genes` for a gene that is not in it; intp [n_columns].
    n_genes
        Number of genes of the vocabulary.
    n_detected
        Genes of the vocabulary that each cell expresses, int64 [n_cells]; right for the rows given to :meth:`tally`.
    known_share
        Share of each cell's counts in genes of the vocabulary, float32 [n_cells]; likewise.
    coverage
        Report on how the columns were matched to the vocabulary.

    Raises
    ------
    UnknownGenesError
        No column is a gene of the vocabulary.
    """

    def __init__(self, cells: CountMatrix, vocabulary: GeneVocabulary, resolver: GeneResolver) -> None:
        mapping = resolver.map(cells.gene_ids, vocabulary)
        self.coverage = mapping.coverage
        if self.coverage.n_matched == 0:
            raise unknown_genes(self.coverage, cells.gene_ids[:_EXPLAINED].tolist())
        self.n_genes = len(vocabulary.gene_ids)
        self.counts = cells.counts
        self.genes = np.where(mapping.rows >= 0, mapping.rows, self.n_genes).astype(np.intp)
        if self.coverage.n_merged:
            self.counts = _merged(self.counts, self.genes, self.n_genes)
        self.indptr = self.counts.indptr.astype(np.int64, copy=False)
        self.n_detected = np.diff(self.indptr)
        self.known_share = np.ones(len(cells), dtype=np.float32)
        self._first_row = cells.first_row
        self._others = functools.partial(_others, cells.gene_ids, mapping.rows)

    def tally(self, rows: slice, known: NDArray[np.bool_]) -> None:
        """Set `n_detected` and `known_share` of a run of rows.

        Parameters
        ----------
        rows
            Run of rows.
        known
            Whether each of their stored values is of a gene of the vocabulary, bool [number of values].

        Raises
        ------
        EmptyCellError
            A cell expresses no gene of the vocabulary.
        """
        if known.all():
            return
        start, stop = int(self.indptr[rows.start]), int(self.indptr[rows.stop])
        values = self.counts.data[start:stop]
        starts = self.indptr[rows] - start
        self.n_detected[rows] = np.add.reduceat(known, starts, dtype=np.int64)
        empty = np.flatnonzero(self.n_detected[rows] == 0)
        if len(empty):
            # Where the genes are the wrong ones, the cell is not at fault.
            others = self._others()
            if self.coverage.share < MIN_COVERAGE or (self.coverage.share < 0.5 and "genes of" in explained(others)):
                raise unknown_genes(self.coverage, others)
            raise EmptyCellError(
                _empty_text(self._first_row + rows.start + empty),
                field="counts",
            )
        known_counts = np.add.reduceat(values * known, starts, dtype=np.int64)
        self.known_share[rows] = known_counts / np.add.reduceat(values, starts, dtype=np.int64)


def _others(gene_ids: NDArray[np.str_], rows: NDArray[np.int32]) -> list[str]:
    found: list[str] = gene_ids[rows < 0][:_EXPLAINED].tolist()
    return found


def _empty_text(rows: NDArray[np.intp]) -> str:
    """Name the rows of cells that express no gene of a vocabulary."""
    if len(rows) == 1:
        what = f"The cell in row {int(rows[0])} expresses"
    else:
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        what = f"{len(rows)} cells (rows {', '.join(map(str, rows[:_SHOWN].tolist()))}{more}) express"
    return f"{what} no gene of the model's vocabulary. Remove such cells, or give more genes."


def _merged(counts: sparse.csr_matrix, genes: NDArray[np.intp], n_genes: int) -> sparse.csr_matrix:
    """Return counts in which each cell has one value a gene: the sum, in the column of the first of them.

    Few columns share a gene, so the other values are not touched.

    Parameters
    ----------
    counts
        Counts, [n_cells, n_columns].
    genes
        Gene of each column, or `n_genes` for an unknown gene, of which columns stay apart; [n_columns].
    n_genes
        Number of genes.
    """
    shared = np.bincount(genes, minlength=n_genes + 1) > 1
    shared[n_genes] = False
    places = np.flatnonzero(shared[genes].take(counts.indices))
    cells = np.searchsorted(counts.indptr, places, side="right") - 1
    _, first, of_value = np.unique(
        cells * n_genes + genes[counts.indices[places]], return_index=True, return_inverse=True
    )
    sums = np.zeros(len(first), dtype=np.int64)
    np.add.at(sums, of_value, counts.data[places])
    wide = np.int64 if len(sums) and sums.max() > np.iinfo(np.int32).max else counts.data.dtype
    data = counts.data.astype(wide)
    data[places[first]] = sums
    dropped = np.delete(places, first)
    indptr = counts.indptr - np.searchsorted(dropped, counts.indptr)
    return sparse.csr_matrix((np.delete(data, dropped), np.delete(counts.indices, dropped), indptr), counts.shape)


@dataclass(frozen=True)
class InputSpec:
    """One input of a family's graph.

    Attributes
    ----------
    name
        Name of the graph input.
    dtype
        Element type that the graph takes.
    pad_value
        Value of the slots behind a cell's last token.
    trailing
        Shape behind the length axis, or for an input per cell behind the batch axis; () for one value.
    n_values
        Number of different ids, 0 to ``n_values - 1``, of an input of ids; None for other numbers.
    per
        ``token``: the graph takes [batch, length, ...], padded. ``cell``: it takes [batch, ...], such as a label of the
        cell's batch.
    within_length
        Whether the values are positions in the cell's own sequence, and so below its length.
    pad_is_a_value
        Whether a token may have the value `pad_value` too; false where padding has an id of its own.
    """

    name: str
    dtype: str
    pad_value: float
    trailing: tuple[int, ...] = ()
    n_values: int | None = None
    per: Literal["token", "cell"] = "token"
    within_length: bool = False
    pad_is_a_value: bool = False


@dataclass(frozen=True)
class TokenizedCells:
    """Tokens of many cells, stored end to end.

    Attributes
    ----------
    arrays
        Arrays of all cells by input name, joined along the first axis, [sum of lengths, ...].
    offsets
        Bounds of the cells, int64 [n_cells + 1]: cell i owns rows ``offsets[i]:offsets[i + 1]``.
    known_share
        Share of each cell's own counts (those in the matrix) in genes of the vocabulary, float32 [n_cells].
    n_detected
        Genes of the vocabulary that each cell expresses, before truncation, int32 [n_cells].
    coverage
        Report on how the columns were matched to the vocabulary.
    per_cell
        Arrays of the inputs per cell by name, [n_cells, ...].
    """

    arrays: Mapping[str, NDArray[Any]]
    offsets: NDArray[np.int64]
    known_share: NDArray[np.float32]
    n_detected: NDArray[np.int32]
    coverage: GeneCoverage
    per_cell: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, cell: int) -> TokenizedCell:
        rows = slice(int(self.offsets[cell]), int(self.offsets[cell + 1]))
        return {name: array[rows] for name, array in self.arrays.items()} | {
            name: array[cell] for name, array in self.per_cell.items()
        }

    def __iter__(self) -> Iterator[TokenizedCell]:
        return (self[cell] for cell in range(len(self)))

    @functools.cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each cell, int64 [n_cells]."""
        return np.diff(self.offsets)

    def take(self, rows: NDArray[np.integer[Any]]) -> TokenizedCells:
        """Return a copy of some cells, in the order of `rows`."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        take = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenizedCells(
            arrays={name: array[take] for name, array in self.arrays.items()},
            offsets=offsets,
            known_share=self.known_share[rows],
            n_detected=self.n_detected[rows],
            coverage=self.coverage,
            per_cell={name: array[rows] for name, array in self.per_cell.items()},
        )


def concatenate(parts: Sequence[TokenizedCells]) -> TokenizedCells:
    """Join the cells of several callers; the coverage is that of the first."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([part.lengths for part in parts])
    return TokenizedCells(
        arrays={name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays},
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        known_share=np.concatenate([part.known_share for part in parts]),
        n_detected=np.concatenate([part.n_detected for part in parts]),
        coverage=parts[0].coverage,
        per_cell={name: np.concatenate([part.per_cell[name] for part in parts]) for name in parts[0].per_cell},
    )


def pad(
    cells: TokenizedCells,
    rows: NDArray[np.integer[Any]],
    inputs: Sequence[InputSpec],
    *,
    length: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the graph inputs of one batch.

    Parameters
    ----------
    cells
        Tokens of all cells.
    rows
        Numbers of the batch's cells, in order, [batch].
    inputs
        The family's inputs.
    length
        Length to pad to, at least that of the longest cell; None: that of the longest cell.

    Returns
    -------
    Each input, [batch, length, ...] or per cell [batch, ...], and ``attention_mask``, int64 [batch, length], 1 on
    tokens.
    """
    starts, lengths = cells.offsets[rows], cells.lengths[rows]
    longest = int(lengths.max()) if length is None else length
    mask = np.arange(longest) < lengths[:, None]
    take = (starts[:, None] + np.arange(longest))[mask]
    batch: dict[str, NDArray[Any]] = {}
    for spec in inputs:
        if spec.per == "cell":
            batch[spec.name] = cells.per_cell[spec.name][rows].astype(spec.dtype, copy=False)
            continue
        padded = np.full((len(rows), longest, *spec.trailing), spec.pad_value, dtype=spec.dtype)
        padded[mask] = cells.arrays[spec.name][take]
        batch[spec.name] = padded
    batch["attention_mask"] = mask.astype(np.int64)
    return batch
