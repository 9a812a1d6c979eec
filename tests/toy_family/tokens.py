"""The torch-free half of the toy family: genes with bins of their counts, and the depth of the cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneResolver
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import EmptyCellError, InvalidParameterError, UnsupportedBundleError
from perturbscope.families.edits import EditKind, TokenEdit
from perturbscope.families.tokens import InputSpec, TokenizedCells, VocabularyCounts


@dataclass(frozen=True, eq=False)
class ToyFamily:
    """Genes in the order of the vocabulary, the highest counts first to be kept."""

    vocabulary: GeneVocabulary
    max_length: int = 64
    n_bins: int = 8

    name = "toy"

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Two values a token, of which padding has one that tokens have too, and one a cell."""
        pad_value = self.vocabulary.special_tokens["<pad>"]
        return (
            InputSpec("genes", "int64", pad_value, n_values=len(self.vocabulary)),
            InputSpec("bins", "int64", 0, n_values=self.n_bins, pad_is_a_value=True),
            InputSpec("depth", "float32", 0.0, per="cell"),
        )

    def tokenize(self, cells: CountMatrix) -> TokenizedCells:
        """See :meth:`perturbscope.families.Family.tokenize`."""
        known = VocabularyCounts(cells, self.vocabulary, GeneResolver.default())
        genes = known.genes[known.counts.indices]
        known.tally(slice(0, len(cells)), genes < known.n_genes)
        kept = []
        for start, stop in zip(known.indptr, known.indptr[1:], strict=False):
            places = start + np.flatnonzero(genes[start:stop] < known.n_genes)
            highest = np.lexsort((genes[places], -known.counts.data[places]))[: self.max_length]
            kept.append(places[highest][np.argsort(genes[places[highest]])])
        places = np.concatenate(kept)
        return TokenizedCells(
            arrays={
                "genes": self.vocabulary.tokens[genes[places]],
                "bins": np.minimum(np.log2(known.counts.data[places]), self.n_bins - 1).astype(np.int32),
            },
            offsets=np.cumsum([0, *map(len, kept)]),
            known_share=known.known_share,
            n_detected=known.n_detected.astype(np.int32),
            coverage=known.coverage,
            per_cell={"depth": np.log1p(cells.totals).astype(np.float32)},
        )

    def bound(self, cells: CountMatrix) -> NDArray[np.int64]:
        """See :meth:`perturbscope.families.Family.bound`."""
        return np.minimum(np.diff(cells.counts.indptr).astype(np.int64), self.max_length)

    def cost(self, length: int) -> int:
        """Two inputs a token cost twice as much."""
        return 2 * length

    def gene_rows(self, tokens: TokenizedCells) -> NDArray[np.int32]:
        """See :meth:`perturbscope.families.Family.gene_rows`."""
        rows = np.full(len(self.vocabulary), -1, dtype=np.int32)
        rows[self.vocabulary.tokens] = np.arange(len(self.vocabulary.gene_ids))
        found: NDArray[np.int32] = rows[tokens.arrays["genes"]]
        return found

    @property
    def edits(self) -> frozenset[EditKind]:
        """Genes have no order, so they cannot be moved."""
        return frozenset({"delete"})

    def edit(self, tokens: TokenizedCells, edit: TokenEdit) -> TokenizedCells:
        """See :meth:`perturbscope.families.Family.edit`."""
        if edit.kind != "delete":
            raise InvalidParameterError(f"The toy family cannot {edit.kind} a gene; it can delete one.", field="kind")
        places = np.flatnonzero(self.gene_rows(tokens) == edit.gene)
        offsets = tokens.offsets - np.searchsorted(places, tokens.offsets)
        if (np.diff(offsets) == 0).any():
            raise EmptyCellError("A cell has no other gene.", field="gene")
        arrays = {name: np.delete(array, places) for name, array in tokens.arrays.items()}
        return replace(tokens, arrays=arrays, offsets=offsets)


def build(config: Mapping[str, Any], vocabulary: GeneVocabulary) -> ToyFamily:
    """Build the family that a manifest describes."""
    try:
        return ToyFamily(vocabulary, **config)
    except TypeError as error:
        raise UnsupportedBundleError(f"The toy family has other options: {error}.", field="family") from error
