"""The torch half of each model family; it may import config.

The tokenizers are in :mod:`perturbscope.families`, under the same names.

To add a family, write a module with the functions of :class:`TrainingFamily` and name it in :data:`FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import UnsupportedBundleError
from perturbscope.families import Family
from perturbscope.families.outputs import OutputSpec
from training.families.specs import Embedding, ExportSpec, ModelSize

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FAMILIES: dict[str, str] = {"rank": "training.families.rank.family"}
"""Module of each family that can be trained, by the family's name."""

Batch = Mapping[str, "Tensor"]
"""Inputs of the family by name, [B, L, ...] or per cell [B, ...], and ``attention_mask``, int64 [B, L]."""


class Restorer(Protocol):
    """A model that tells which gene stands at a place whose gene is hidden."""

    def hide(self, batch: Batch, masked: Tensor) -> dict[str, Tensor]:
        """Return a batch in which the genes at `masked`, bool [B, L], are hidden."""
        ...

    def states(self, batch: Batch) -> Tensor:
        """Return the states before the head, [B, L, H]."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Return scores of all tokens of the vocabulary, [R, V], from states [R, H]."""
        ...


class TrainingFamily(Protocol):
    """Functions of a family's module that training and export call.

    `config` is what :meth:`parse_config` returned, `family` the torch-free half with the options of the tokenizer, and
    `model` what :meth:`build_model` returned for both.
    """

    def parse_config(self, options: Mapping[str, Any]) -> Any:
        """Return the family's frozen model configuration from the plain values of a YAML file or a checkpoint.

        It has ``max_length``, the most tokens of a cell that the network takes.

        Raises
        ------
        InvalidParameterError
            An option is unknown, has another type or is out of its range.
        """
        ...

    def build_model(self, config: Any, vocabulary: GeneVocabulary) -> nn.Module:
        """Make a new model; its weights come from the global generator of torch."""
        ...

    def mask(
        self, batch: Batch, *, family: Family, generator: torch.Generator, probability: float = ...
    ) -> dict[str, Tensor]:
        """Return a batch for the loss of :meth:`pretraining`: corrupted inputs, and the targets under other names.

        Padding and special tokens are left alone, and `batch` is not changed.
        """
        ...

    def n_targets(self, batch: Batch) -> int:
        """Return how many targets a batch of :meth:`mask` has, over which its loss is a mean."""
        ...

    def measures(self, loss: float) -> dict[str, float]:
        """Return what else a mean loss of pre-training says, such as the perplexity, by name; may be empty."""
        ...

    def pretraining(self, model: nn.Module) -> nn.Module:
        """Return a module over `model`, from a batch of :meth:`mask` by name to the mean loss over its targets.

        Raises
        ------
        InvalidParameterError
            The model has no head for it.
        """
        ...

    def encoder(self, model: nn.Module, config: Any, *, family: Family) -> nn.Module:
        """Return a module over `model`, from inputs by name to cell embeddings, float32 [B, H].

        Its parameters are those that the embedding depends on, so that every one of them gets a gradient.

        Raises
        ------
        InvalidParameterError
            The tokens do not suit the configured embedding.
        """
        ...

    def restorer(self, model: nn.Module, *, family: Family) -> Restorer:
        """Return the model as a restorer of hidden genes.

        Raises
        ------
        UnsupportedBundleError
            The model has no head over genes.
        """
        ...

    def outputs(self, config: Any) -> tuple[OutputSpec, ...]:
        """Return all outputs that a model can have; the first is the cell embedding."""
        ...

    def embedding(self, config: Any) -> Embedding:
        """Describe the cell embedding in words."""
        ...

    def size(self, config: Any, vocabulary: GeneVocabulary) -> ModelSize:
        """Return the sizes that decide the cost of a cell."""
        ...

    def export_spec(self, config: Any, *, family: Family, outputs: Sequence[str] | None = None) -> ExportSpec:
        """Return all that an exporter needs.

        Parameters
        ----------
        config, family
            Both halves of the model.
        outputs
            Names of the outputs that the graph shall have; all by default. The cell embedding is always among them.

        Raises
        ------
        InvalidParameterError
            There is no output of a name, or the tokens do not suit the configured embedding.
        """
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
    return cast("TrainingFamily", importlib.import_module(FAMILIES[name]))
