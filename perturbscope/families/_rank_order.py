"""Integer keys that sort the genes of a cell by count over median, ties in the order of the vocabulary.

Sorting integers is several times faster than a two-key sort of floats, and needs no stable sort. (gene, count) pairs
with a count up to `_TABLE_COUNTS` are ranked once for a vocabulary, in a table; entry number r of that ranking, from 1,
has the key ``2 r``. Pairs with higher counts (a few in a thousand) get the odd key behind the table's last entry before
them. Several such pairs of one cell may share a key: they are sorted among themselves, and then take the places of the
odd keys in the sorted row.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.vocabulary import GeneVocabulary

_TABLE_COUNTS = 32
"""Counts 1..32 of every gene are in the table."""


class Ranking:
    """The order of (gene, count) pairs under one vocabulary."""

    def __init__(self, vocabulary: GeneVocabulary) -> None:
        self.medians = vocabulary.medians
        n_genes = len(self.medians)
        counts = np.arange(1, _TABLE_COUNTS + 1)
        values = (counts[None, :] / self.medians[:, None]).ravel()
        # Stable, and laid out gene by gene: equal values stay in the order of genes.
        order = np.argsort(-values, kind="stable")
        self._values = -values[order]
        self._genes = (order // _TABLE_COUNTS).astype(np.int32)
        self.tokens_of_genes = vocabulary.tokens
        # Entry number 0 stands before the first.
        self.tokens = np.concatenate([vocabulary.tokens[:1], vocabulary.tokens[self._genes]])
        self.unknown = np.int32(2 * (len(order) + 1))
        # One row a count, since nearly all counts are small: the part of the table in use fits a cache.
        # Row 0 is never looked up; the last column is for unknown genes.
        self.table = np.full((_TABLE_COUNTS + 1, n_genes + 1), self.unknown, dtype=np.int32)
        self.table[order % _TABLE_COUNTS + 1, self._genes] = 2 * np.arange(1, len(order) + 1)

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of(vocabulary: GeneVocabulary) -> Ranking:
        """Return the ranking of a vocabulary, which is made once."""
        return Ranking(vocabulary)

    def entries_before(self, genes: NDArray[np.intp], values: NDArray[np.float64]) -> NDArray[np.intp]:
        """Return the table's last entry before each (gene, -count / median); ties are in the order of genes."""
        entries = np.searchsorted(self._values, values, side="left")
        met = self._values[np.minimum(entries, len(self._values) - 1)] == values
        for tied in np.flatnonzero(met):
            upto = np.searchsorted(self._values, values[tied], side="right")
            entries[tied] += np.searchsorted(self._genes[entries[tied] : upto], genes[tied])
        return entries


class RankedCounts:
    """The keys and tokens of one matrix; threads may share it.

    Parameters
    ----------
    ranking
        Ranking of the vocabulary.
    matrix
        Counts, cells x genes, one column a gene.
    genes
        Row of the vocabulary for each column, or the vocabulary's number of genes for an unknown gene.
    """

    def __init__(self, ranking: Ranking, matrix: sparse.csr_matrix, genes: NDArray[np.intp]) -> None:
        self._ranking, self._matrix, self._genes = ranking, matrix, genes
        self.unknown = ranking.unknown
        # For many values, a table of the matrix's own columns is faster.
        self._own = matrix.nnz > 4 * (_TABLE_COUNTS + 1) * len(genes)
        self._table = ranking.table.take(genes, axis=1) if self._own else ranking.table
        high = np.flatnonzero(matrix.data > _TABLE_COUNTS)
        self._high = high[genes.take(matrix.indices[high]) < len(ranking.medians)]
        self._rank_high()

    def _rank_high(self) -> None:
        """Set the keys of counts that are not in the table, and the tokens behind odd keys, row by row."""
        ranking, matrix, high = self._ranking, self._matrix, self._high
        pairs = self._genes.take(matrix.indices[high]) << 40 | matrix.data[high]
        order = np.argsort(pairs)
        fresh = np.diff(pairs[order], prepend=-1) != 0
        distinct = pairs[order][fresh]
        genes = distinct >> 40
        values = -((distinct & (1 << 40) - 1) / ranking.medians[genes])
        by_value = np.argsort(values)
        if np.any(np.diff(values[by_value]) == 0):
            by_value = np.lexsort((genes, values))
        genes, values = genes[by_value], values[by_value]
        places = np.empty(len(genes), dtype=np.int64)
        places[by_value] = np.arange(len(genes))
        place_of = np.empty(len(high), dtype=np.int64)
        place_of[order] = places[np.cumsum(fresh) - 1]
        self._high_keys = (2 * ranking.entries_before(genes, values) + 1).astype(np.int32)[place_of]
        rows = np.searchsorted(matrix.indptr, high, side="right") - 1
        in_order = np.sort(rows << 32 | place_of)
        self._high_rows = in_order >> 32
        self._high_tokens = ranking.tokens_of_genes[genes][in_order & (1 << 32) - 1]

    def keys(self, start: int, stop: int, out: NDArray[np.int32]) -> None:
        """Write the keys of the values `start` to `stop` of the matrix."""
        counts, indices = self._matrix.data[start:stop], self._matrix.indices[start:stop]
        places = np.minimum(counts, _TABLE_COUNTS).astype(np.int32, copy=False)
        places *= np.int32(self._table.shape[1])
        places += indices if self._own else self._genes.take(indices).astype(np.int32)
        self._table.take(places, out=out, mode="clip")
        first, last = np.searchsorted(self._high, (start, stop))
        out[self._high[first:last] - start] = self._high_keys[first:last]

    def tokens(self, keys: NDArray[np.int32], rows: slice, lengths: NDArray[np.int64], out: NDArray[np.int32]) -> None:
        """Write the tokens of sorted keys, the first ``lengths[i]`` of each of `rows`, end to end."""
        self._ranking.tokens.take(keys >> 1, out=out, mode="clip")
        first, last = np.searchsorted(self._high_rows, (rows.start, rows.stop))
        if first == last:
            return
        tokens = self._high_tokens[first:last]
        odd = np.flatnonzero((keys & 1).astype(bool))
        if len(odd) < len(tokens):  # rows were cut: only the first odd keys of each are left
            high_rows = self._high_rows[first:last] - rows.start
            left = np.bincount(np.searchsorted(np.cumsum(lengths), odd, side="right"), minlength=len(lengths))
            tokens = tokens[np.arange(len(tokens)) - np.searchsorted(high_rows, high_rows) < left[high_rows]]
        out[odd] = tokens
