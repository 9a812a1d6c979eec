"""Floating-point operations for a cell: those of matrix products, a multiplication and an addition counted as two.

With L tokens, width H, feed-forward width F, N blocks, M masked tokens and V words:

* the dense layers of a block: 8 L H² (queries, keys, values, output) + 4 L H F
* the attention of a block: 4 L² H (scores and mixture)
* the head: 2 M H² + 2 M H V

The backward pass has two products for each product of the forward pass, so training costs three forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.vocabulary import GeneVocabulary
from training import families
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.data.corpus import read_vocabulary
from training.families import TrainingFamily
from training.families.specs import ModelSize

TRAINING = 3
"""Forward passes that cost as much as a forward and a backward pass."""


@dataclass(frozen=True, kw_only=True)
class CellCost:
    """Operations of a forward pass over one cell, or their mean over cells of several lengths.

    Attributes
    ----------
    linear, attention, head
        Dense layers, attention, and the head at masked tokens, in FLOP.
    """

    linear: float
    attention: float
    head: float = 0.0

    @property
    def forward(self) -> float:
        """Operations of a forward pass, FLOP."""
        return self.linear + self.attention + self.head

    @property
    def training(self) -> float:
        """Operations of a forward and a backward pass, FLOP."""
        return TRAINING * self.forward


def cell_cost(
    model: ModelSize, lengths: NDArray[np.integer] | int, *, masked_share: float = 0.0, layers: int | None = None
) -> CellCost:
    """Return the mean cost of a cell.

    Parameters
    ----------
    model
        Size of the model.
    lengths
        Tokens of each cell, [n_cells], or of every cell; padding, which is computed as well, is not counted.
    masked_share
        Share of the tokens at which the head is computed; 0 leaves it out.
    layers
        Blocks that run; all by default.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    mean, square = float(tokens.mean()), float((tokens**2).mean())
    H, F = model.hidden, model.feed_forward
    n_blocks = model.layers if layers is None else layers
    return CellCost(
        linear=n_blocks * mean * (8 * H * H + 4 * H * F),
        attention=n_blocks * 4 * square * H,
        head=masked_share * mean * (2 * H * H + 2 * H * model.vocabulary),
    )


def model_of(config: PretrainConfig | ContrastiveConfig) -> tuple[TrainingFamily, Any, GeneVocabulary]:
    """Return family, configuration and genes of the model, from the stage or the checkpoint that it starts from.

    A checkpoint that is not there yet is replaced by the family's default model.

    Raises
    ------
    UnreadableFileError
        The vocabulary that the configuration names cannot be read.
    """
    if isinstance(config, ContrastiveConfig) and Path(config.checkpoint).exists():
        from training.checkpoint import load_checkpoint  # imports torch

        checkpoint = load_checkpoint(config.checkpoint)
        half = families.load(checkpoint.family)
        return half, half.parse_config(checkpoint.model_config), checkpoint.vocabulary
    half = families.load(config.corpus.family)
    options = {"max_length": config.corpus.max_length, **(config.model if isinstance(config, PretrainConfig) else {})}
    return half, half.parse_config(options), read_vocabulary(config.corpus.vocabulary)


def model_size(config: PretrainConfig | ContrastiveConfig) -> ModelSize:
    """Return the size of the model of a stage. Raises as :func:`model_of`."""
    half, model, vocabulary = model_of(config)
    return half.size(model, vocabulary)


def stage_cost(
    config: PretrainConfig | ContrastiveConfig,
    lengths: NDArray[np.integer] | int,
    *,
    size: ModelSize | None = None,
    masked_share: float | None = None,
) -> CellCost:
    """Return the mean cost of a cell in a stage: with the head for pre-training, else as far as the embedding goes.

    Parameters
    ----------
    config
        Configuration of the stage.
    lengths
        Tokens of each cell, [n_cells], or of every cell.
    size
        Size of the model; that of the configuration by default.
    masked_share
        Share of masked tokens in pre-training; the configured probability by default.
    """
    size = size or model_size(config)
    if isinstance(config, PretrainConfig):
        return cell_cost(size, lengths, masked_share=config.mask_probability if masked_share is None else masked_share)
    layers = size.layers - 1 if size.embedding_layers is None else size.embedding_layers
    return cell_cost(size, lengths, layers=layers)
