"""Rank-value tokens: a cell is its expressed genes, ordered by count over median.

Theodoris et al. 2023 (Geneformer) order genes by ``count / total counts * 10,000 / median``. The first two
factors are the same for all genes of a cell, so the order is that of ``count / median``; computed that way,
multiplying a cell's counts by a constant leaves its tokens unchanged. Ties go to the lower token id, so the order
is the same on every machine.

Geneformer's second version puts a special token before the genes (``<cls>``) and one behind them (``<eos>``): the
options `start` and `end`. They count in the length of a cell, and are no genes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneResolver
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import (
    CorruptBundleError,
    EmptyCellError,
    InvalidParameterError,
    UnsupportedBundleError,
    VocabularyMismatchError,
)
from perturbscope.families._ragged import BLOCK_VALUES, row_blocks, smallest
from perturbscope.families._rank_order import RankedCounts, Ranking
from perturbscope.families.edits import EDIT_KINDS, EditKind, TokenEdit
from perturbscope.families.tokens import InputSpec, TokenizedCells, VocabularyCounts

_CHUNK_VALUES = BLOCK_VALUES


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Options of the family, as a manifest stores them."""

    max_length: int = 2048
    """Number of tokens of the longest cell, `start` and `end` included; genes are kept best rank first."""
    start: str | None = None
    """Special token before the genes of each cell; None: there is none."""
    end: str | None = None
    """Special token behind the genes of each cell; None: there is none."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise CorruptBundleError(
                f"The rank family's max_length is {self.max_length!r}; a positive number is needed.", field="family"
            )
        if self.max_length <= self.n_special:
            raise CorruptBundleError(
                f"The rank family's max_length is {self.max_length}, which leaves no room for a gene beside "
                f"{self.n_special} special tokens.",
                field="family",
            )

    @property
    def n_special(self) -> int:
        """Number of special tokens of each cell."""
        return (self.start is not None) + (self.end is not None)


@dataclass(frozen=True, eq=False)
class RankFamily:
    """Genes in the order of their count relative to the gene's median."""

    config: RankConfig
    vocabulary: GeneVocabulary
    resolver: GeneResolver

    name = "rank"

    @functools.cached_property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The only input, a sequence of token ids."""
        pad_value, n_values = self.vocabulary.special_tokens["<pad>"], len(self.vocabulary)
        return (InputSpec("input_ids", "int64", pad_value, n_values=n_values),)

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest cell that the family returns."""
        return self.config.max_length

    def tokenize(self, cells: CountMatrix) -> TokenizedCells:
        """Return the token ids of each cell, int32, best rank first. See :meth:`Family.tokenize`."""
        known = VocabularyCounts(cells, self.vocabulary, self.resolver)
        counts = known.counts
        ranked = RankedCounts(Ranking.of(self.vocabulary), counts, known.genes)
        indptr = known.indptr
        blocks = row_blocks(indptr, _CHUNK_VALUES)
        keys = np.empty(counts.nnz, dtype=np.int32)

        # In two passes over blocks of rows: how many tokens each cell has, and then which.
        for rows in blocks:
            start, stop = int(indptr[rows.start]), int(indptr[rows.stop])
            ranked.keys(start, stop, out=keys[start:stop])
            known.tally(rows, keys[start:stop] != ranked.unknown)

        n_genes = np.minimum(known.n_detected, self.max_length - self.config.n_special)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(n_genes)])
        ids = np.empty(int(offsets[-1]), dtype=np.int32)

        for rows in blocks:
            bounds = indptr[rows.start : rows.stop + 1]
            best = smallest(keys[bounds[0] : bounds[-1]], bounds - bounds[0], n_genes[rows])
            ranked.tokens(best, rows, n_genes[rows], out=ids[offsets[rows.start] : offsets[rows.stop]])

        if self.config.n_special:
            ids, offsets = self._framed(ids, offsets)
        return TokenizedCells(
            {"input_ids": ids}, offsets, known.known_share, known.n_detected.astype(np.int32), known.coverage
        )

    def _framed(
        self, genes: NDArray[np.int32], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the tokens of genes with the special tokens around each cell, and the new bounds of the cells."""
        start, end = self.config.start, self.config.end
        offsets = offsets + self.config.n_special * np.arange(len(offsets))
        ids = np.empty(int(offsets[-1]), dtype=np.int32)
        is_gene = np.ones(len(ids), dtype=bool)
        for name, places in ((start, offsets[:-1]), (end, offsets[1:] - 1)):
            if name is not None:
                ids[places] = self.vocabulary.special_tokens[name]
                is_gene[places] = False
        ids[is_gene] = genes
        return ids, offsets

    def bound(self, cells: CountMatrix) -> NDArray[np.int64]:
        """See :meth:`Family.bound`: a token for each stored count and each special token, up to the longest cell."""
        stored = np.diff(cells.counts.indptr).astype(np.int64)
        return np.minimum(stored + self.config.n_special, self.max_length)

    def cost(self, length: int) -> int:
        """See :meth:`Family.cost`: its tokens."""
        return length

    @functools.cached_property
    def _rows_of_tokens(self) -> NDArray[np.int32]:
        rows = np.full(len(self.vocabulary), -1, dtype=np.int32)
        rows[self.vocabulary.tokens] = np.arange(len(self.vocabulary.gene_ids), dtype=np.int32)
        return rows

    def gene_rows(self, tokens: TokenizedCells) -> NDArray[np.int32]:
        """See :meth:`Family.gene_rows`; a masked gene is a special token."""
        return self._rows_of_tokens.take(tokens.arrays["input_ids"])

    @property
    def edits(self) -> frozenset[EditKind]:
        """All kinds."""
        return frozenset(EDIT_KINDS)

    def edit(self, tokens: TokenizedCells, edit: TokenEdit) -> TokenizedCells:
        """Return tokens after an edit. See :meth:`Family.edit`.

        Genes that did not fit into a cell do not come back when another one is deleted: they are not in the tokens.

        Raises
        ------
        InvalidParameterError
            The vocabulary has no such row.
        EmptyCellError
            A cell would have no gene left.
        """
        n_genes = len(self.vocabulary.gene_ids)
        if edit.gene >= n_genes:
            raise InvalidParameterError(
                f"gene is {edit.gene}; the vocabulary has {n_genes} genes, so it must be below that.", field="gene"
            )
        ids, offsets = tokens.arrays["input_ids"], tokens.offsets
        places = np.flatnonzero(ids == self.vocabulary.tokens[edit.gene])
        cells = np.searchsorted(offsets, places, side="right") - 1
        if edit.kind == "delete":
            n_left = np.diff(offsets)[cells] - self.config.n_special - 1
            if (n_left == 0).any():
                raise EmptyCellError(
                    f"Cell {cells[int(np.argmin(n_left))]} (from 0) has no other gene than "
                    f"{self.vocabulary.gene_ids[edit.gene]}, so nothing is left when it is deleted. "
                    "Leave such cells out.",
                    field="gene",
                )
            ids = np.delete(ids, places)
            offsets = offsets - np.searchsorted(places, offsets)
        elif edit.kind == "mask":
            ids = ids.copy()
            ids[places] = self.vocabulary.special_tokens["<mask>"]
        else:
            first = offsets[cells] + (self.config.start is not None)
            last = offsets[cells + 1] - 1 - (self.config.end is not None)
            ids = _moved(ids, places, np.minimum(first + min(edit.position, self.max_length), last))
        return replace(tokens, arrays={**tokens.arrays, "input_ids": ids}, offsets=offsets)


def _moved(ids: NDArray[np.int32], places: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return `ids` with the values at `places` at `targets`, and all between the two a step nearer to the place.

    Places, ascending, and their targets lie in different cells, so that the stretches between them do not overlap.
    """
    steps = np.zeros(len(ids) + 1, dtype=np.int64)
    up, down = targets < places, targets > places
    np.add.at(steps, targets[up] + 1, -1)
    np.add.at(steps, places[up] + 1, 1)
    np.add.at(steps, places[down], 1)
    np.add.at(steps, targets[down], -1)
    sources = np.arange(len(ids)) + np.cumsum(steps[:-1])
    sources[targets] = places
    return ids.take(sources)


def build(config: Mapping[str, Any], vocabulary: GeneVocabulary) -> RankFamily:
    """Build the family that a manifest describes. Raises BundleError for an option that is unknown or wrong."""
    unknown = set(config) - {field.name for field in fields(RankConfig)}
    if unknown:
        raise UnsupportedBundleError(
            f"The rank family has no option {min(unknown)!r}; the bundle may need a newer perturbscope.",
            field="family",
        )
    options = RankConfig(**config)
    for name, token in (("start", options.start), ("end", options.end)):
        if token is not None and not (isinstance(token, str) and token in vocabulary.special_tokens):
            raise VocabularyMismatchError(
                f"The rank family's {name} is {token!r}, but the vocabulary's special tokens are "
                f"{', '.join(vocabulary.special_tokens)}. Give the vocabulary that the model was trained with.",
                field="family",
            )
    return RankFamily(options, vocabulary, GeneResolver.default())
