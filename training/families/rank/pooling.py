"""Cell embeddings: the mean of the penultimate hidden state over a cell's tokens.

The penultimate state is the output of block N-1 of N (``hidden_states[-2]``, with which Theodoris et al. 2023 embed
cells). So the last block and the language-model head are not computed, trained by the contrastive loss, or exported.
Fine-tuning and export share this module.

Shapes: B cells in the batch, L tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM
from transformers.masking_utils import create_bidirectional_mask

LAYER = "hidden_states[-2]"
"""Name of the pooled state in a manifest."""
POOLING = "mean over tokens, padding excluded"
"""Name of the pooling in a manifest."""


def masked_mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean of states [B, L, H] over the real tokens, float32 [B, H]; it is summed in float32."""
    mask_BL1 = attention_mask.unsqueeze(-1).to(torch.float32)
    return (hidden.to(torch.float32) * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)


class MaskedMean(nn.Module):
    """:func:`masked_mean` as a module, so that its part of an exported graph has a name."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean of states [B, L, H] under a mask [B, L], float32 [B, H]."""
        return masked_mean(hidden, attention_mask)


class PooledEncoder(nn.Module):
    """Embeddings, all blocks but the last, and the masked mean.

    The modules belong to the model and are not copied: training this module trains `model`. The last block and the
    head, which get no gradient from a cell embedding, are not among its parameters.

    Parameters
    ----------
    model
        Masked-language model of at least two blocks.
    """

    def __init__(self, model: BertForMaskedLM) -> None:
        super().__init__()
        self.config = model.config
        self.embeddings = model.bert.embeddings
        self.blocks = nn.ModuleList(model.bert.encoder.layer[:-1])
        self.pooling = MaskedMean()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed a batch of cells.

        Parameters
        ----------
        input_ids
            Token ids, int64 [B, L], padded on the right.
        attention_mask
            1 on tokens, 0 on padding, int64 [B, L]; every row has at least one token.

        Returns
        -------
        Embeddings, float32 [B, H].
        """
        hidden_BLH = self.embeddings(input_ids=input_ids)
        attention = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_BLH, attention_mask=attention_mask
        )
        for block in self.blocks:
            hidden_BLH = block(hidden_BLH, attention)
        pooled_BH: Tensor = self.pooling(hidden_BLH, attention_mask)
        return pooled_BH
