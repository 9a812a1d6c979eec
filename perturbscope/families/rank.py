"""Rank-value tokens: a cell is its expressed genes, ordered by count over median.

Theodoris et al. 2023 (Geneformer) order genes by ``count / total counts * 10,000 / median``. The first two
factors are the same for all genes of a cell, so the order is that of ``count / median``; computed that way,
multiplying a cell's counts by a constant leaves its tokens unchanged. Ties go to the lower token id, so the order
is the same on every machine.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.counts import CountMatrix
from perturbscope.errors import CorruptBundleError, EmptyCellError, UnknownGenesError, UnsupportedBundleError
from perturbscope.families import InputSpec, TokenizedCells
from perturbscope.genes import GeneResolver, GeneVocabulary

_TABLE_COUNTS = 32
"""Counts 1..32 of every gene are ranked once for a vocabulary; higher ones (a few per cent) once a chunk."""
_CHUNK_VALUES = 262_144
"""Stored counts tokenized at a time: few enough to stay in the cache."""


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
        parts = [
            self._tokenize_rows(counts, gene_of_column, rows, cells.first_row) for rows in _row_chunks(counts.indptr)
        ]
        ids, lengths, detected, known_share = (np.concatenate(part) for part in zip(*parts, strict=True))
        return TokenizedCells(
            arrays={"input_ids": ids},
            offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)]),
            known_share=known_share.astype(np.float32),
            n_detected=detected.astype(np.int32),
            coverage=mapping.coverage,
        )

    def _tokenize_rows(
        self, matrix: sparse.csr_matrix, gene_of_column: NDArray[np.intp], rows: slice, first_row: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Token ids end to end; and of each cell its length, detected genes and share of known counts."""
        start, stop = matrix.indptr[rows.start], matrix.indptr[rows.stop]
        bounds = matrix.indptr[rows.start : rows.stop + 1] - start
        counts = matrix.data[start:stop]
        genes = gene_of_column.take(matrix.indices[start:stop])
        known = genes < len(self.vocabulary.gene_ids)
        detected = np.add.reduceat(known, bounds[:-1], dtype=np.int64)
        empty = np.flatnonzero(detected == 0)
        if len(empty):
            raise EmptyCellError(
                f"The cell in row {first_row + rows.start + int(empty[0])} expresses no gene of the model's "
                "vocabulary. Remove such cells, or give more genes.",
                field="counts",
            )
        share = np.add.reduceat(counts * known, bounds[:-1], dtype=np.float64)
        share /= np.add.reduceat(counts, bounds[:-1], dtype=np.float64)
        lengths = np.minimum(detected, self.max_length)
        return self._ranking.order(genes, counts, bounds, lengths), lengths, detected, share

    @functools.cached_property
    def _ranking(self) -> _Ranking:
        return _Ranking(self.vocabulary)


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


def _row_chunks(indptr: NDArray[np.integer[Any]]) -> list[slice]:
    """Runs of rows with about `_CHUNK_VALUES` stored values each."""
    marks = np.arange(0, int(indptr[-1]), _CHUNK_VALUES)
    starts = np.unique(np.searchsorted(indptr, marks, side="left"))
    starts = starts[starts < len(indptr) - 1]
    stops = np.append(starts[1:], len(indptr) - 1)
    return [slice(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]


class _Ranking:
    """Gives every (gene, count) an integer that sorts as ``(-count / median, gene)`` does.

    Sorting integers is several times faster than a two-key sort of floats, needs no stable sort, and has the order of
    ties built in. Pairs with a count up to `_TABLE_COUNTS` are ranked once, in a table; entry number r of that ranking
    has the key ``r << bits``. The others are placed between the table's entries, chunk by chunk: the pair that comes
    n-th among those behind entry r gets ``(r << bits) + n``.
    """

    def __init__(self, vocabulary: GeneVocabulary) -> None:
        self._medians = vocabulary.medians
        n_genes = len(self._medians)
        counts = np.arange(1, _TABLE_COUNTS + 1)
        values = (counts[None, :] / self._medians[:, None]).ravel()
        # Stable, and laid out gene by gene: equal values stay in the order of genes.
        order = np.argsort(-values, kind="stable")
        self._sorted_values = -values[order]
        self._sorted_genes = (order // _TABLE_COUNTS).astype(np.int32)
        # Entries are numbered from 1; 0 is what comes before the first.
        self._sorted_tokens = np.concatenate([vocabulary.tokens[:1], vocabulary.tokens[self._sorted_genes]])
        self._tokens = vocabulary.tokens
        # Count by count, since nearly all counts are small: the part of the table in use fits a cache.
        # Row 0 is never looked up; the last column is that of unknown genes, which sort behind all others.
        self._keys = np.full((_TABLE_COUNTS + 1, n_genes + 1), len(order) + 1, dtype=np.int32)
        self._keys[order % _TABLE_COUNTS + 1, self._sorted_genes] = np.arange(1, len(order) + 1)
        self._bits = 31 - (len(order) + 1).bit_length()
        self._keys <<= self._bits

    def order(
        self,
        genes: NDArray[np.intp],
        counts: NDArray[np.integer[Any]],
        bounds: NDArray[np.integer[Any]],
        lengths: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """Tokens of the first ``lengths[i]`` genes in order of each row i, ``bounds[i]:bounds[i + 1]``; end to end."""
        keys, bits, rare_keys, rare_tokens = self._rank(genes, counts)
        best = np.empty(int(lengths.sum()), dtype=keys.dtype)
        end = 0
        for (start, stop), length in zip(itertools.pairwise(bounds.tolist()), lengths.tolist(), strict=True):
            row = keys[start:stop]
            row.sort()
            best[end : end + length] = row[:length]
            end += length
        tokens: NDArray[np.int32] = self._sorted_tokens.take(best >> bits)
        if len(rare_keys):
            rare = np.flatnonzero(best & ((1 << bits) - 1))
            tokens[rare] = rare_tokens[np.searchsorted(rare_keys, best[rare])]
        return tokens

    def _rank(
        self, genes: NDArray[np.intp], counts: NDArray[np.integer[Any]]
    ) -> tuple[NDArray[np.integer[Any]], int, NDArray[np.integer[Any]], NDArray[np.int32]]:
        """Keys, their lower bits, and the keys that stand outside the table, ascending, with their tokens."""
        n_genes = len(self._medians)
        keys = self._keys.take(np.minimum(counts, _TABLE_COUNTS) * np.intp(n_genes + 1) + genes)
        high = np.flatnonzero((counts > _TABLE_COUNTS) & (genes < n_genes))
        if not len(high):
            return keys, self._bits, keys[:0], self._tokens[:0]
        pairs, inverse = np.unique((genes[high] << 40) | counts[high], return_inverse=True)
        pair_genes = pairs >> 40
        values = -((pairs & ((1 << 40) - 1)) / self._medians[pair_genes])
        order = np.lexsort((pair_genes, values))
        entry = self._entry_before(pair_genes[order], values[order])
        place = np.arange(1, len(order) + 1) - np.searchsorted(entry, entry)
        bits = self._bits
        if place.max() >> bits:
            keys = keys.astype(np.int64) << 32
            bits += 32
        rare_keys = ((entry << bits) + place).astype(keys.dtype)
        key_of_pair = np.empty_like(rare_keys)
        key_of_pair[order] = rare_keys
        keys[high] = key_of_pair[inverse]
        return keys, bits, rare_keys, self._tokens[pair_genes[order]]

    def _entry_before(self, genes: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.intp]:
        """The table's last entry before each (gene, value); ties lie in the order of genes there as well."""
        entry = np.searchsorted(self._sorted_values, values, side="left")
        upto = np.searchsorted(self._sorted_values, values, side="right")
        for tied in np.flatnonzero(upto > entry):
            entry[tied] += np.searchsorted(self._sorted_genes[entry[tied] : upto[tied]], genes[tied])
        return entry
