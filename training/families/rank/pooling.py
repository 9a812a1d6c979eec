"""Cell embeddings: the mean hidden state over a cell's genes, or the state of its start token.

By default the penultimate state is pooled, the output of block N-1 of N (``hidden_states[-2]``, with which Theodoris et
al. 2023 embed cells). Then the last block and the head are not computed, trained by the contrastive loss, or exported.
Fine-tuning and export share this module.

Shapes: B cells in the batch, L tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from training.families.rank.model import BertModels

LAYER = "hidden_states[-2]"
"""Name of the pooled state in a manifest, by default."""
POOLING = "mean over tokens, padding excluded"
"""Name of the pooling in a manifest, by default."""
GENE_POOLING = "mean over genes, special tokens and padding excluded"
"""Name of the same pooling if a cell has tokens that are not genes."""


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of states [B, L, H] over the tokens under a mask, float32 [B, H]; it is summed in float32."""
    mask_BL1 = mask.unsqueeze(-1).to(torch.float32)
    return (hidden.to(torch.float32) * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)


class MaskedMean(nn.Module):
    """:func:`masked_mean` as a module, so that its part of an exported graph has a name."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of states [B, L, H] under a mask [B, L], float32 [B, H]."""
        return masked_mean(hidden, mask)


class FirstState(nn.Module):
    """The state of the start token."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the states [B, L, H] at position 0, float32 [B, H]; `mask` is not used."""
        return hidden[:, 0].to(torch.float32)


class GeneMask(nn.Module):
    """The mask of the genes of a cell: its tokens without those of `special`."""

    def __init__(self, special: Sequence[int]) -> None:
        super().__init__()
        self._special = tuple(special)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return 1 on genes, 0 on special tokens and padding, int64 [B, L]."""
        for token in self._special:
            attention_mask = attention_mask * (input_ids != token).to(attention_mask.dtype)
        return attention_mask


class PooledEncoder(nn.Module):
    """Embeddings, the blocks up to the pooled layer, and the pooling.

    The modules belong to the model and are not copied: training this module trains `model`. Later blocks and the head,
    which get no gradient from a cell embedding, are not among its parameters.

    Parameters
    ----------
    model
        Model of at least two blocks, with any head.
    layer
        ``penultimate``: the state before the last block is pooled. ``last``: the state after it.
    pooling
        ``mean``: over the tokens but those of `special`. ``cls``: the state of the first token.
    special
        Ids of start and end tokens.
    """

    def __init__(
        self,
        model: BertModels,
        *,
        layer: Literal["penultimate", "last"] = "penultimate",
        pooling: Literal["mean", "cls"] = "mean",
        special: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.config = model.config
        self.embeddings = model.bert.embeddings
        blocks = list(model.bert.encoder.layer)
        self.blocks = nn.ModuleList(blocks[:-1] if layer == "penultimate" else blocks)
        self.genes = GeneMask(special) if special and pooling == "mean" else None
        self.pooling = MaskedMean() if pooling == "mean" else FirstState()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed a batch of cells.

        Parameters
        ----------
        input_ids
            Token ids, int64 [B, L], padded on the right.
        attention_mask
            1 on tokens, 0 on padding, int64 [B, L]; every row has at least one gene.

        Returns
        -------
        Embeddings, float32 [B, H].
        """
        hidden_BLH, _ = self.states(input_ids, attention_mask)
        return self.pooled(hidden_BLH, input_ids, attention_mask)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Any]:
        """Return the states of the pooled layer, [B, L, H], and the mask of the blocks' attention."""
        hidden_BLH = self.embeddings(input_ids=input_ids)
        attention = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_BLH, attention_mask=attention_mask
        )
        for block in self.blocks:
            hidden_BLH = block(hidden_BLH, attention)
        return hidden_BLH, attention

    def pooled(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the embeddings of states [B, L, H], float32 [B, H]."""
        mask_BL = attention_mask if self.genes is None else self.genes(input_ids, attention_mask)
        pooled_BH: Tensor = self.pooling(hidden, mask_BL)
        return pooled_BH
