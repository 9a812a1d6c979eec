"""Rank-value tokens: a cell is its expressed genes, ordered by count over median.

Theodoris et al. 2023 (Geneformer) order genes by ``count / total counts * 10,000 / median``. The first two
factors are the same for all genes of a cell, so the order is that of ``count / median``; computed that way,
multiplying a cell's counts by a constant leaves its tokens unchanged. Ties go to the lower token id, so the order
is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage, GeneResolver, GeneVocabulary
from perturbscope.errors import CorruptBundleError, EmptyCellError, UnknownGenesError, UnsupportedBundleError
from perturbscope.families._ragged import BLOCK_VALUES, row_blocks, smallest
from perturbscope.families._rank_order import RankedCounts, Ranking
from perturbscope.families.tokens import InputSpec, TokenizedCells

_CHUNK_VALUES = BLOCK_VALUES


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Options of the family, as a manifest stores them."""

    max_length: int = 2048
    """Tokens kept of a cell, highest rank first."""

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

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """One sequence of token ids."""
        pad_value, n_values = self.vocabulary.special_tokens["<pad>"], len(self.vocabulary)
        return (InputSpec("input_ids", "int64", pad_value, n_values=n_values),)

    @property
    def max_length(self) -> int:
        """Longest sequence that the family emits."""
        return self.config.max_length

    def tokenize(self, cells: CountMatrix) -> TokenizedCells:
        """Token ids of each cell, int32, best rank first. See :meth:`Family.tokenize`."""
        mapping = self.resolver.map(cells.gene_ids, self.vocabulary)
        if mapping.coverage.n_matched == 0:
            raise UnknownGenesError(
                f"None of the {cells.n_genes} genes is in the model's vocabulary (first: "
                f"{', '.join(mapping.coverage.unmatched[:3])}). Give human Ensembl ids or symbols, "
                "and name the column that holds them (gene_key) if they are not the index.",
                field="gene_ids",
            )
        unknown = len(self.vocabulary.gene_ids)
        gene_of_column = np.where(mapping.rows >= 0, mapping.rows, unknown).astype(np.intp)
        counts = cells.counts
        if mapping.coverage.n_merged:
            counts, gene_of_column = _merged(counts, gene_of_column, unknown + 1)
        return self._tokenize(counts, gene_of_column, cells.first_row, mapping.coverage)

    def _tokenize(
        self, counts: sparse.csr_matrix, genes: NDArray[np.intp], first_row: int, coverage: GeneCoverage
    ) -> TokenizedCells:
        """In two passes over blocks of rows: how many tokens each cell has, and which."""
        ranked = RankedCounts(Ranking.of(self.vocabulary), counts, genes)
        indptr = counts.indptr.astype(np.int64, copy=False)
        blocks = row_blocks(indptr, _CHUNK_VALUES)
        keys = np.empty(counts.nnz, dtype=np.int32)
        detected = np.diff(indptr)
        share = np.ones(len(detected), dtype=np.float32)

        for rows in blocks:
            start, stop = int(indptr[rows.start]), int(indptr[rows.stop])
            ranked.keys(start, stop, out=keys[start:stop])
            known = keys[start:stop] != ranked.unknown
            if known.all():
                continue
            starts = indptr[rows] - start
            detected[rows] = np.add.reduceat(known, starts, dtype=np.int64)
            empty = np.flatnonzero(detected[rows] == 0)
            if len(empty):
                raise EmptyCellError(
                    f"The cell in row {first_row + rows.start + int(empty[0])} expresses no gene of the model's "
                    "vocabulary. Remove such cells, or give more genes.",
                    field="counts",
                )
            values = counts.data[start:stop]
            share[rows] = np.add.reduceat(values * known, starts, dtype=np.int64) / np.add.reduceat(
                values, starts, dtype=np.int64
            )

        lengths = np.minimum(detected, self.max_length)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        ids = np.empty(int(offsets[-1]), dtype=np.int32)

        for rows in blocks:
            bounds = indptr[rows.start : rows.stop + 1]
            best = smallest(keys[bounds[0] : bounds[-1]], bounds - bounds[0], lengths[rows])
            ranked.tokens(best, rows, lengths[rows], out=ids[offsets[rows.start] : offsets[rows.stop]])

        return TokenizedCells({"input_ids": ids}, offsets, share, detected.astype(np.int32), coverage)


def build(config: Mapping[str, Any], vocabulary: GeneVocabulary) -> RankFamily:
    """The family as a manifest describes it."""
    unknown = set(config) - {field.name for field in fields(RankConfig)}
    if unknown:
        raise UnsupportedBundleError(
            f"The rank family has no option {min(unknown)!r}; the bundle may need a newer perturbscope.",
            field="family",
        )
    return RankFamily(RankConfig(**config), vocabulary, GeneResolver.default())


def _merged(
    counts: sparse.csr_matrix, gene_of_column: NDArray[np.intp], n_columns: int
) -> tuple[sparse.csr_matrix, NDArray[np.intp]]:
    """The matrix with one column a gene, columns of one gene added up; and the gene of each new column."""
    merged = sparse.csr_matrix(
        (counts.data.astype(np.int64), gene_of_column[counts.indices], counts.indptr),
        shape=(counts.shape[0], n_columns),
    )
    merged.sum_duplicates()
    return merged, np.arange(n_columns)
