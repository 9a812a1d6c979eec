"""Model families, which turn a cell into the input of a network; the folder imports cells only.

A family is the torch-free half of a model. It turns raw counts into ragged arrays whose first axis is length (batching
needs to know nothing else), and it declares the inputs of the exported graph. To add one, put a module with a
``build(config, vocabulary) -> Family`` into this folder and name it in :data:`FAMILIES`; gene mapping, coverage and the
check of empty cells are in :mod:`perturbscope.families.tokens`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import UnsupportedBundleError
from perturbscope.families.tokens import InputSpec, TokenizedCells

FAMILIES = ("rank",)
"""Names of the families, which are also the names of their modules."""


class Family(Protocol):
    """The torch-free half of a model."""

    @property
    def name(self) -> str:
        """Name of the family, which is the name of its module."""
        ...

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The graph's ragged inputs. Every graph also takes ``attention_mask``."""
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
    module = importlib.import_module(f"{__name__}.{name}")
    family: Family = module.build(config, vocabulary)
    return family
