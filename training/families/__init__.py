"""The torch half of each model family; the tokenizers are in :mod:`perturbscope.families`, under the same names.

To add a family, put ``<name>/model.py`` with the functions of :class:`TrainingFamily` into this folder and name it in
:data:`FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from perturbscope.cells.genes import GeneVocabulary
from perturbscope.errors import UnsupportedBundleError

FAMILIES = ("rank",)
"""Names of the families that can be trained, which are those of their folders."""


class TrainingFamily(Protocol):
    """What a family's module offers to training and export."""

    def parse_config(self, options: Mapping[str, Any]) -> Any:
        """The family's frozen model configuration from plain values, as a YAML file or a checkpoint holds them."""
        ...

    def build_model(self, config: Any, vocabulary: GeneVocabulary) -> nn.Module:
        """A new model; its weights come from torch's global generator."""
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
        """Corrupted inputs and labels of the masked-language task."""
        ...

    def masked_lm(self, model: nn.Module) -> nn.Module:
        """Module over `model`: (corrupted inputs, attention mask, labels) -> mean loss."""
        ...


def load(name: str) -> TrainingFamily:
    """The torch half of the family `name`.

    Raises
    ------
    UnsupportedBundleError
        No such family is installed.
    """
    if name not in FAMILIES:
        raise UnsupportedBundleError(
            f"The family {name!r} cannot be trained here; this version has {', '.join(FAMILIES)}.",
            field="family",
        )
    return cast("TrainingFamily", importlib.import_module(f"{__name__}.{name}.model"))
