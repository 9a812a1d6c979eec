"""Rank-value tokens: a cell is its expressed genes, ordered by count over median.

Theodoris et al. 2023 (Geneformer) order genes by ``count / total counts * 10,000 / median``. The first two
factors are the same for all genes of a cell, so the order is that of ``count / median``; computed that way,
multiplying a cell's counts by a constant leaves its tokens unchanged. Ties go to the lower token id, so the order
is the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneResolver
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import CorruptBundleError, InvalidParameterError, UnsupportedBundleError
from perturbscope.families._ragged import BLOCK_VALUES, row_blocks, smallest
from perturbscope.families._rank_order import RankedCounts, Ranking
from perturbscope.families.edits import EditKind, TokenEdit
from perturbscope.families.tokens import InputSpec, TokenizedCells, VocabularyCounts

_CHUNK_VALUES = BLOCK_VALUES


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Options of the family, as a manifest stores them."""

    max_length: int = 2048
    """Number of tokens of a cell that are kept, best rank first."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise CorruptBundleError(
                f"The rank family's max_length is {self.max_length!r}; a positive number is needed.", field="family"
            )


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

        lengths = np.minimum(known.n_detected, self.max_length)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        ids = np.empty(int(offsets[-1]), dtype=np.int32)

        for rows in blocks:
            bounds = indptr[rows.start : rows.stop + 1]
            best = smallest(keys[bounds[0] : bounds[-1]], bounds - bounds[0], lengths[rows])
            ranked.tokens(best, rows, lengths[rows], out=ids[offsets[rows.start] : offsets[rows.stop]])

        return TokenizedCells(
            {"input_ids": ids}, offsets, known.known_share, known.n_detected.astype(np.int32), known.coverage
        )

    def bound(self, cells: CountMatrix) -> NDArray[np.int64]:
        """See :meth:`Family.bound`: a token for each stored count, up to the longest cell."""
        return np.minimum(np.diff(cells.counts.indptr).astype(np.int64), self.max_length)

    def cost(self, length: int) -> int:
        """See :meth:`Family.cost`: its tokens."""
        return length

    def gene_rows(self, tokens: TokenizedCells) -> NDArray[np.int32]:
        """See :meth:`Family.gene_rows`."""
        rows = np.full(len(self.vocabulary), -1, dtype=np.int32)
        rows[self.vocabulary.tokens] = np.arange(len(self.vocabulary.gene_ids), dtype=np.int32)
        found: NDArray[np.int32] = rows[tokens.arrays["input_ids"]]
        return found

    @property
    def edits(self) -> frozenset[EditKind]:
        """No edits yet."""
        return frozenset()

    def edit(self, tokens: TokenizedCells, edit: TokenEdit) -> TokenizedCells:
        """See :meth:`Family.edit`."""
        raise InvalidParameterError(f"The rank family cannot {edit.kind} a gene.", field="kind")


def build(config: Mapping[str, Any], vocabulary: GeneVocabulary) -> RankFamily:
    """Build the family that a manifest describes. Raises BundleError for an option that is unknown or wrong."""
    unknown = set(config) - {field.name for field in fields(RankConfig)}
    if unknown:
        raise UnsupportedBundleError(
            f"The rank family has no option {min(unknown)!r}; the bundle may need a newer perturbscope.",
            field="family",
        )
    return RankFamily(RankConfig(**config), vocabulary, GeneResolver.default())
