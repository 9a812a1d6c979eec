"""Model families, which turn a cell into the input of a network; the folder imports cells only.

A family is the torch-free half of a model. It turns raw counts into ragged arrays whose first axis is length (batching
needs to know nothing else), and it declares the inputs of the exported graph. To add one, put a module with a
``build(config, vocabulary) -> Family`` into this folder and name it in :data:`FAMILIES`; gene mapping, coverage and the
check of empty cells are in :mod:`perturbscope.families.tokens`. What comes out of a graph is a matter of the model, not
of its family: see :mod:`perturbscope.families.outputs`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import UnsupportedBundleError
from perturbscope.families.edits import EditKind, TokenEdit
from perturbscope.families.tokens import InputSpec, TokenizedCells

FAMILIES: dict[str, str] = {"rank": "perturbscope.families.rank"}
"""Module of each family by the family's name, as a manifest has it."""


class Family(Protocol):
    """The torch-free half of a model."""

    @property
    def name(self) -> str:
        """Name of the family in :data:`FAMILIES`."""
        ...

    @property
    def vocabulary(self) -> GeneVocabulary:
        """Genes that the family knows."""
        ...

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The graph's inputs, per token or per cell. Every graph also takes ``attention_mask``."""
        ...

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest cell that the family returns."""
        ...

    def tokenize(self, cells: CountMatrix) -> TokenizedCells:
        """Tokenize raw counts.

        Raises
        ------
        UnknownGenesError
            No column is a gene of the vocabulary.
        EmptyCellError
            A cell expresses no gene of the vocabulary.
        """
        ...

    def bound(self, cells: CountMatrix) -> NDArray[np.int64]:
        """Return the most tokens that each cell can have, before it is tokenized, int64 [n_cells]."""
        ...

    def cost(self, length: int) -> int:
        """Return what a cell padded to `length` counts in the budget of tokens of a batch, at least 1."""
        ...

    def gene_rows(self, tokens: TokenizedCells) -> NDArray[np.int32]:
        """Return the row of the vocabulary behind each token, -1 for a special token, int32 [sum of lengths]."""
        ...

    @property
    def edits(self) -> frozenset[EditKind]:
        """Kinds of edits that the family can make."""
        ...

    def edit(self, tokens: TokenizedCells, edit: TokenEdit) -> TokenizedCells:
        """Return tokens after an edit; those of cells without the gene are equal to before.

        Raises
        ------
        InvalidParameterError
            The family cannot make edits of this kind.
        EmptyCellError
            A cell would have no gene left.
        """
        ...


def load_family(name: str, config: Mapping[str, Any], vocabulary: GeneVocabulary) -> Family:
    """Build the family that a manifest names.

    Raises
    ------
    UnsupportedBundleError
        The family is not installed.
    """
    if name not in FAMILIES:
        raise UnsupportedBundleError(
            f"The family {name!r} is not installed; this version has {', '.join(FAMILIES)}. Upgrade perturbscope.",
            field="family",
        )
    module = importlib.import_module(FAMILIES[name])
    family: Family = module.build(config, vocabulary)
    return family
