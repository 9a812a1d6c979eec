"""The torch half of each model family; it may import config.

The tokenizers are in :mod:`perturbscope.families`, under the same names.

To add a family, put ``<name>/model.py`` with the functions of :class:`TrainingFamily` into this folder and name it in
:data:`FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import UnsupportedBundleError

FAMILIES = ("rank",)
"""Names of the families that can be trained, and of their folders."""


class TrainingFamily(Protocol):
    """Functions of a family's module that training and export call."""

    def parse_config(self, options: Mapping[str, Any]) -> Any:
        """Return the family's frozen model configuration from the plain values of a YAML file or a checkpoint."""
        ...

    def build_model(self, config: Any, vocabulary: GeneVocabulary) -> nn.Module:
        """Make a new model; its weights come from the global generator of torch."""
        ...

    def mask_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        vocabulary: GeneVocabulary,
        generator: torch.Generator,
        probability: float = ...,
    ) -> tuple[Tensor, Tensor]:
        """Return corrupted inputs and labels of the masked-language task."""
        ...

    def masked_lm(self, model: nn.Module) -> nn.Module:
        """Return a module over `model`, from corrupted inputs, attention mask and labels to the mean loss."""
        ...


def load(name: str) -> TrainingFamily:
    """Import the torch half of the family `name`.

    Raises
    ------
    UnsupportedBundleError
        No such family can be trained.
    """
    if name not in FAMILIES:
        raise UnsupportedBundleError(
            f"The family {name!r} cannot be trained here; this version has {', '.join(FAMILIES)}.",
            field="family",
        )
    return cast("TrainingFamily", importlib.import_module(f"{__name__}.{name}.model"))
