"""Model families, which turn a cell into the input of a network; the folder imports cells only.

A family is the torch-free half of a model. It turns raw counts into ragged arrays whose first axis is length (batching
needs to know nothing else), and it declares the inputs of the exported graph. To add one, put a module with a
``build(config, vocabulary) -> Family`` into this folder and name it in :data:`FAMILIES`; gene mapping, coverage and the
check of empty cells are in :mod:`perturbscope.families.tokens`. What comes out of a graph is a matter of the model, not
of its family: see :mod:`perturbscope.families.outputs`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import PerturbScopeError, UnsupportedBundleError
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
        The family is not installed, does not take the options, or does not keep the contract of :class:`Family`.
    BundleError
        As the family raises for options that are wrong.
    """
    if name not in FAMILIES:
        raise UnsupportedBundleError(
            f"The family {name!r} is not installed; this version has {', '.join(FAMILIES)}. Upgrade perturbscope.",
            field="family",
        )
    try:
        family: Family = importlib.import_module(FAMILIES[name]).build(config, vocabulary)
        broken = _broken_promises(family)
    except PerturbScopeError:
        raise
    except Exception as error:
        raise _unusable(name, f"cannot be built ({type(error).__name__}: {' '.join(str(error).split())})") from error
    if broken:
        raise _unusable(name, f"does not keep the contract of perturbscope.families.Family: {', '.join(broken)}")
    return family


def _broken_promises(family: Any) -> list[str]:
    """Return what an object lacks to be a :class:`Family`, as far as can be told without cells."""
    missing = [f"it has no {name}" for name in sorted({*_VALUES, *_METHODS}) if not hasattr(family, name)]
    if missing:
        return missing
    broken = [
        f"its {name} is {getattr(family, name)!r:.80}" for name, is_right in _VALUES.items() if not is_right(family)
    ]
    return broken + [f"its {name} is no method" for name in _METHODS if not callable(getattr(family, name))]


_VALUES: Mapping[str, Callable[[Any], bool]] = {
    "name": lambda family: isinstance(family.name, str),
    "vocabulary": lambda family: isinstance(family.vocabulary, GeneVocabulary),
    "inputs": lambda family: bool(family.inputs) and all(isinstance(spec, InputSpec) for spec in family.inputs),
    "max_length": lambda family: isinstance(family.max_length, int) and family.max_length > 0,
    "edits": lambda family: isinstance(family.edits, frozenset),
}
_METHODS = ("tokenize", "bound", "cost", "gene_rows", "edit")


def _unusable(name: str, reason: str) -> UnsupportedBundleError:
    return UnsupportedBundleError(
        f"The family {name!r} ({FAMILIES[name]}) {reason}. Correct that module, or install the perturbscope that the "
        "bundle was made with.",
        field="family",
    )
