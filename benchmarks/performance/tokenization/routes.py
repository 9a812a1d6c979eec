"""Other ways to the same rank tokens: the published one, lean loops, and one global sort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.families.rank import RankFamily

Tokens = list[NDArray[np.int32]]
PUBLISHED_CHUNK = 512
"""Cells that Geneformer normalises at a time."""


@dataclass(frozen=True)
class Columns:
    """Token and median of each column of a matrix; -1 and NaN where the vocabulary has no such gene."""

    tokens: NDArray[np.int32]
    medians: NDArray[np.float64]
    max_length: int

    @classmethod
    def of(cls, cells: CountMatrix, family: RankFamily) -> Columns:
        """Look the columns up once, outside of all timings."""
        rows = family.resolver.map(cells.gene_ids, family.vocabulary).rows
        known = rows >= 0
        tokens = np.where(known, family.vocabulary.tokens[rows], np.int32(-1))
        return cls(tokens, np.where(known, family.vocabulary.medians[rows], np.nan), family.max_length)


def published(cells: CountMatrix, columns: Columns) -> Tokens:
    """Tokenize as in Theodoris et al. 2023, in Geneformer's implementation.

    The columns of the vocabulary are cut out, normalised to 10,000 counts a cell and divided by the medians as one
    sparse matrix, 512 cells at a time; then each cell's row is taken out of that matrix, and its values sorted with
    numpy's default ``argsort``, which leaves ties in any order.
    """
    inside = np.flatnonzero(columns.tokens >= 0)
    tokens, medians = columns.tokens[inside], columns.medians[inside]
    found: Tokens = []
    for start in range(0, len(cells), PUBLISHED_CHUNK):
        rows = slice(start, start + PUBLISHED_CHUNK)
        scale = sparse.diags_array(10_000 / cells.totals[rows])
        scaled = sparse.csr_matrix(scale @ cells.counts[rows][:, inside] @ sparse.diags_array(1 / medians))
        for cell in range(scaled.shape[0]):
            row = scaled[cell]
            order = np.argsort(-row.data)
            found.append(tokens[row.indices][order][: columns.max_length])
    return found


def loop(cells: CountMatrix, columns: Columns, *, ties: bool = False) -> Tokens:
    """Tokenize without a matrix in between, by slices of the three CSR arrays, cell by cell.

    With `ties`, equal values stand in the order of their tokens, which is what PerturbScope promises.
    """
    data, indices, indptr = cells.counts.data, cells.counts.indices, cells.counts.indptr
    found: Tokens = []
    for cell in range(len(cells)):
        entries = slice(indptr[cell], indptr[cell + 1])
        place = indices[entries]
        known = columns.tokens[place] >= 0
        place = place[known]
        values = data[entries][known] / cells.totals[cell] * 10_000 / columns.medians[place]
        token = columns.tokens[place]
        order = np.lexsort((token, -values)) if ties else np.argsort(-values)
        found.append(token[order][: columns.max_length])
    return found


def one_sort(cells: CountMatrix, columns: Columns) -> Tokens:
    """Tokenize without a loop: one ``lexsort`` of all values by cell, value and token."""
    counts = cells.counts
    cell_of = np.repeat(np.arange(len(cells)), np.diff(counts.indptr))
    known = columns.tokens[counts.indices] >= 0
    cell_of, place = cell_of[known], counts.indices[known]
    values = counts.data[known] / columns.medians[place]
    token = columns.tokens[place]
    token = token[np.lexsort((token, -values, cell_of))]
    ends = np.cumsum(np.bincount(cell_of, minlength=len(cells)))
    return [part[: columns.max_length] for part in np.split(token, ends[:-1])]


def routes(cells: CountMatrix, family: RankFamily) -> dict[str, Callable[[], Any]]:
    """Return every route by its name, PerturbScope first."""
    columns = Columns.of(cells, family)
    return {
        "PerturbScope": lambda: family.tokenize(cells),
        "published": lambda: published(cells, columns),
        "loop": lambda: loop(cells, columns),
        "loop, ties": lambda: loop(cells, columns, ties=True),
        "one sort": lambda: one_sort(cells, columns),
    }


def check_equal(cells: CountMatrix, family: RankFamily) -> int:
    """Check that all routes give the same tokens, and return their number."""
    ours = family.tokenize(cells).arrays["input_ids"]
    for name, route in routes(cells, family).items():
        if name != "PerturbScope":
            np.testing.assert_array_equal(ours, np.concatenate(route()), err_msg=name)
    return len(ours)
