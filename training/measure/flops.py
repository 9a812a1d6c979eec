"""How many floating-point operations a cell costs: matrix products alone, a multiplication and an addition as two.

With L tokens, width H, feed-forward width F, N blocks, M masked tokens and V words:

* a block's dense layers: 8 L H² (queries, keys, values, output) + 4 L H F
* a block's attention: 4 L² H (scores and mixture)
* the head: 2 M H² + 2 M H V

The backward pass has two products for each of the forward pass, so training is three forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.config.stages import ContrastiveConfig, PretrainConfig

TRAINING = 3
"""Forward passes that a forward and a backward pass are worth."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What decides the cost of a cell."""

    layers: int = 6
    hidden: int = 256
    feed_forward: int = 512
    vocabulary: int = 25_426


@dataclass(frozen=True, kw_only=True)
class CellCost:
    """Operations of a forward pass over one cell; means over cells where lengths differ.

    Attributes
    ----------
    linear, attention, head
        Parts of the forward pass, in FLOP.
    """

    linear: float
    attention: float
    head: float = 0.0

    @property
    def forward(self) -> float:
        """Forward pass, FLOP."""
        return self.linear + self.attention + self.head

    @property
    def training(self) -> float:
        """Forward and backward pass, FLOP."""
        return TRAINING * self.forward


def cell_cost(
    model: ModelSize, lengths: NDArray[np.integer] | int, *, masked_share: float = 0.0, layers: int | None = None
) -> CellCost:
    """Mean cost of cells of these lengths, [n_cells] or one number.

    Parameters
    ----------
    model
        Its size.
    lengths
        Tokens of each cell; padding, which is computed as well, is not counted.
    masked_share
        Share of the tokens at which the head is computed; 0 leaves it out.
    layers
        Blocks that run, where it is not all of them: an embedding needs all but the last.
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


_SIZES = ("layers", "hidden", "feed_forward")


def model_size(config: PretrainConfig | ContrastiveConfig) -> ModelSize:
    """Size of the model, from the configuration or from the checkpoint that it starts from."""
    if isinstance(config, PretrainConfig):
        return ModelSize(**{name: int(config.model[name]) for name in _SIZES if name in config.model})
    if not Path(config.checkpoint).exists():
        return ModelSize()
    from training.checkpoint import load_checkpoint  # imports torch

    saved = load_checkpoint(config.checkpoint).model_config
    return ModelSize(**{name: int(saved[name]) for name in _SIZES})
