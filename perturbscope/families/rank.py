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
from perturbscope.genes import GeneMapping, GeneResolver, GeneVocabulary

_TABLE_COUNTS = 32
"""Counts 1..32 of every gene are ranked once for a vocabulary; higher ones (a few per cent) once a chunk."""
_SUBRANK_BITS = 22
_CHUNK_VALUES = 262_144
"""Stored counts tokenized at a time: they stay in the cache, and subranks within their bits."""


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
        return (InputSpec("input_ids", "int64", self.vocabulary.special_tokens["<pad>"]),)

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
        parts = [
            self._tokenize_chunk(cells.counts[rows], mapping, cells.first_row + rows.start)
            for rows in _row_chunks(cells.counts.indptr)
        ]
        ids, detected, in_vocabulary = (np.concatenate(part) for part in zip(*parts, strict=True))
        lengths = np.minimum(detected, self.max_length)
        own = np.asarray(cells.counts.sum(axis=1, dtype=np.float64)).ravel()
        return TokenizedCells(
            arrays={"input_ids": ids},
            offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)]),
            known_share=(in_vocabulary / own).astype(np.float32),
            n_detected=detected.astype(np.int32),
            coverage=mapping.coverage,
        )

    def _tokenize_chunk(
        self, counts: sparse.csr_matrix, mapping: GeneMapping, first_row: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float64]]:
        """Token ids end to end, and each cell's detected genes and counts in the vocabulary."""
        known = _known_counts(counts, mapping)
        detected = np.diff(known.indptr).astype(np.int64)
        empty = np.flatnonzero(detected == 0)
        if len(empty):
            raise EmptyCellError(
                f"The cell in row {first_row + int(empty[0])} expresses no gene of the model's vocabulary. "
                "Remove such cells, or give more genes.",
                field="counts",
            )
        ranked = self._ranking.order(known.indices, known.data, known.indptr, self.max_length)
        in_vocabulary = np.add.reduceat(known.data, known.indptr[:-1], dtype=np.float64)
        return self.vocabulary.tokens[ranked], detected, in_vocabulary

    @functools.cached_property
    def _ranking(self) -> _Ranking:
        return _Ranking(self.vocabulary.medians)


def build(config: Mapping[str, Any], vocabulary: GeneVocabulary) -> RankFamily:
    """The family as a manifest describes it."""
    unknown = set(config) - {field.name for field in fields(RankConfig)}
    if unknown:
        raise UnsupportedBundleError(
            f"The rank family has no option {min(unknown)!r}; the bundle may need a newer perturbscope.",
            field="family",
        )
    return RankFamily(RankConfig(**config), vocabulary, GeneResolver.default())


def _known_counts(counts: sparse.csr_matrix, mapping: GeneMapping) -> sparse.csr_matrix:
    """Counts of cells x vocabulary rows; columns of one gene added up."""
    columns = mapping.rows[counts.indices]
    keep = columns >= 0
    kept_before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(keep, dtype=np.int64)])
    known = sparse.csr_matrix(
        (counts.data[keep], columns[keep], kept_before[counts.indptr]),
        shape=(counts.shape[0], int(mapping.rows.max()) + 1),
    )
    if mapping.coverage.n_merged:
        known.sum_duplicates()
    return known


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
    ties built in. Pairs with a count up to `_TABLE_COUNTS` are looked up in a table that is made once; the others are
    placed between the table's entries, chunk by chunk.
    """

    def __init__(self, medians: NDArray[np.float64]) -> None:
        self._medians = medians
        counts = np.arange(1, _TABLE_COUNTS + 1)
        values = (counts[None, :] / medians[:, None]).ravel()
        # Stable, and laid out gene by gene: equal values stay in the order of genes.
        order = np.argsort(-values, kind="stable")
        self._sorted_values = -values[order]
        self._sorted_genes = (order // _TABLE_COUNTS).astype(np.int32)
        keys = np.empty(len(order), dtype=np.int64)
        keys[order] = np.arange(1, len(order) + 1, dtype=np.int64) << _SUBRANK_BITS
        self._keys = keys

    def order(
        self,
        genes: NDArray[np.integer[Any]],
        counts: NDArray[np.integer[Any]],
        indptr: NDArray[np.integer[Any]],
        keep: int,
    ) -> NDArray[np.int32]:
        """Each row's genes in order, the first `keep` of them, rows end to end."""
        best, rare_genes = self._rank(genes, counts)
        bounds = indptr.tolist()
        for start, stop in itertools.pairwise(bounds):
            best[start:stop].sort()
        lengths = np.diff(indptr)
        if len(lengths) and lengths.max() > keep:
            place = np.arange(len(best)) - np.repeat(indptr[:-1], lengths)
            best = best[place < keep]
        subrank = best & ((1 << _SUBRANK_BITS) - 1)
        ranked: NDArray[np.int32] = self._sorted_genes[np.maximum((best >> _SUBRANK_BITS) - 1, 0)]
        if len(rare_genes):
            ranked = np.where(subrank > 0, rare_genes[np.maximum(subrank - 1, 0)], ranked)
        return ranked

    def _rank(
        self, genes: NDArray[np.integer[Any]], counts: NDArray[np.integer[Any]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Sort keys, and the genes that subranks 1.. stand for."""
        keys = self._keys[genes.astype(np.int64) * _TABLE_COUNTS + np.minimum(counts, _TABLE_COUNTS) - 1]
        high = np.flatnonzero(counts > _TABLE_COUNTS)
        if not len(high):
            return keys, np.zeros(0, dtype=np.int32)
        pairs, inverse = np.unique((genes[high].astype(np.int64) << 32) | counts[high], return_inverse=True)
        pair_genes = (pairs >> 32).astype(np.int32)
        values = -((pairs & 0xFFFFFFFF) / self._medians[pair_genes])
        order = np.lexsort((pair_genes, values))
        before = np.searchsorted(self._sorted_values, values, side="left")
        upto = np.searchsorted(self._sorted_values, values, side="right")
        for tied in np.flatnonzero(upto > before):
            equal = self._sorted_genes[before[tied] : upto[tied]]
            before[tied] += np.searchsorted(equal, pair_genes[tied])
        subrank = np.empty(len(pairs), dtype=np.int64)
        subrank[order] = np.arange(1, len(pairs) + 1)
        keys[high] = ((before.astype(np.int64) << _SUBRANK_BITS) | subrank)[inverse]
        return keys, pair_genes[order]
