"""Model families: how a cell becomes the input of a network.

A family is the torch-free half of a model. It turns raw counts into ragged arrays whose first axis is length
(the only thing that batching needs to know), and it declares the inputs of the exported graph. To add one, put a module
with a ``build(config, vocabulary) -> Family`` into this folder and name it in :data:`FAMILIES`. The folder imports
cells only.
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
"""Names of the families, which are those of their modules."""


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
        """Longest sequence that the family emits."""
        ...

    def tokenize(self, cells: CountMatrix) -> TokenizedCells:
        """Turn raw counts into tokens.

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
        No such family is installed.
    """
    if name not in FAMILIES:
        raise UnsupportedBundleError(
            f"The family {name!r} is not installed; this version has {', '.join(FAMILIES)}. Upgrade perturbscope.",
            field="family",
        )
    module = importlib.import_module(f"{__name__}.{name}")
    family: Family = module.build(config, vocabulary)
    return family
