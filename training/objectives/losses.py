"""The margin contrastive loss.

Shapes: P pairs, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.config.stages import LossConfig

_UNDER_ROOT = 1e-12
"""Keeps the gradient of the root finite where two cells have the same vector."""


def squared_distances(first: Tensor, second: Tensor, *, normalize: bool = False) -> Tensor:
    """Return the squared Euclidean distance of each pair, float32 [P].

    Parameters
    ----------
    first, second
        Cell embeddings, [P, H] each.
    normalize
        Whether to scale them to unit length first.
    """
    first_PH, second_PH = first.float(), second.float()
    if normalize:
        first_PH, second_PH = nn.functional.normalize(first_PH), nn.functional.normalize(second_PH)
    return (first_PH - second_PH).square().sum(dim=-1)


def contrastive_loss(
    squared: Tensor,
    similar: Tensor,
    *,
    margin: float = 20.0,
    half: bool = False,
    squared_hinge: bool = True,
) -> Tensor:
    """Pull similar pairs together, push dissimilar ones apart up to a margin.

    ``mean over pairs of  y d^2 + (1 - y) max(0, margin - d)^2``, with d the Euclidean distance and y = 1 for similar
    pairs (Hadsell et al. 2006, eq. 4; Zhao et al. 2025, eq. 1). Similar pairs use the square itself, and dissimilar
    pairs the root of (square + a tiny number), so the gradient is finite at d = 0.

    Parameters
    ----------
    squared
        d^2 of each pair, [P].
    similar
        y of each pair: 1 or 0, [P].
    margin
        Distance beyond which dissimilar pairs cost nothing.
    half
        Whether to halve both terms, as Hadsell et al. do; under AdamW this only changes the norm that is clipped.
    squared_hinge
        Whether to square the hinge.

    Returns
    -------
    Loss, a scalar.
    """
    hinge_P = torch.clamp(margin - torch.sqrt(squared + _UNDER_ROOT), min=0)
    apart_P = hinge_P.square() if squared_hinge else hinge_P
    y_P = similar.to(squared.dtype)
    loss = (y_P * squared + (1 - y_P) * apart_P).mean()
    return loss / 2 if half else loss


class ContrastiveModule(nn.Module):
    """The loss of a batch of pairs, over an encoder of cells.

    Parameters
    ----------
    encoder
        Module from the inputs of a family by name to embeddings.
    config
        Margin and variants of the loss.
    """

    def __init__(self, encoder: nn.Module, config: LossConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self._config = config

    def forward(self, similar: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Return the mean loss of a batch of pairs; without `similar`, the embeddings.

        Parameters
        ----------
        similar
            1 for similar pairs, 0 for dissimilar ones, [P].
        **inputs
            Inputs of the encoder for 2P cells: the first cell of each pair, then the second of each.
        """
        config = self._config
        embeddings: Tensor = self.encoder(**inputs)
        if similar is None:
            return embeddings
        first, second = embeddings.chunk(2)
        squared = squared_distances(first, second, normalize=config.normalize)
        return contrastive_loss(
            squared, similar, margin=config.margin, half=config.half, squared_hinge=config.squared_hinge
        )
