"""Gene panels and shallow cells made from whole cells: genes are hidden from a batch before the model sees it.

A targeted panel measures some hundred genes, and a shallow cell detects a part of what it expresses. A model trained on
whole cells alone has never met such short sequences. Genes are hidden as tokens: the rest of a cell keeps its order,
just as if the other genes had not been measured. (Binomial thinning of counts would hide weak genes more often than
strong ones and change the order of the others; it needs counts, which a corpus of tokens does not have.)

Shapes: B cells, L tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.config.stages import PanelConfig

_PANEL = 31


def hide_genes(
    input_ids: Tensor, attention_mask: Tensor, config: PanelConfig, *, n_tokens: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return a batch as a panel would show it, or unchanged; a cell keeps the order of its genes and at least one gene.

    Parameters
    ----------
    input_ids, attention_mask
        A padded batch, int64 [B, L]; not modified.
    config
        Share of the batches to change, and ranges of the shares of genes to keep.
    n_tokens
        Size of the vocabulary, special tokens included.
    seed
        Seed of all random choices.

    Returns
    -------
    Ids and mask, int64 [B, L'], L' at most L.
    """
    rng = np.random.default_rng([seed, _PANEL])
    if rng.random() >= config.share:
        return input_ids, attention_mask
    kept_genes = np.exp(rng.uniform(np.log(config.genes[0]), np.log(config.genes[1])))
    on_panel = torch.from_numpy(rng.random(n_tokens) < kept_genes)
    depth_B1 = torch.from_numpy(rng.uniform(*config.depth, size=(len(input_ids), 1)))
    drawn_BL = torch.from_numpy(rng.random(tuple(input_ids.shape)))
    present_BL = attention_mask.bool()
    keep_BL = present_BL & on_panel[input_ids] & (drawn_BL < depth_B1)
    keep_BL[:, 0] |= ~keep_BL.any(dim=1)
    order_BL = torch.argsort((~keep_BL).to(torch.uint8), dim=1, stable=True)
    length = int(keep_BL.sum(dim=1).max())
    mask_BL = keep_BL.gather(1, order_BL)[:, :length].to(attention_mask.dtype)
    return input_ids.gather(1, order_BL)[:, :length] * mask_BL, mask_BL
