"""Gene panels and shallow cells made from whole cells: genes are hidden from a batch before the model sees it.

A targeted panel measures some hundred genes, and a shallow cell detects a part of what it expresses. A model trained on
whole cells alone has never met such short sequences. Genes are hidden as tokens: the rest of a cell keeps its order,
just as if the other genes had not been measured. (Binomial thinning of counts would hide weak genes more often than
strong ones and change the order of the others; it needs counts, which a corpus of tokens does not have.) Inputs per
cell stay as they are.

Shapes: B cells, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from perturbscope.errors import InvalidParameterError
from perturbscope.families import Family
from training.config.stages import PanelConfig
from training.data.batches import gene_tokens, keep_tokens

_PANEL = 31


def check_hiding(config: PanelConfig, family: Family, *, field: str = "panel.share") -> None:
    """Check that genes can be hidden from cells of a family, if the configuration asks for it.

    Raises
    ------
    InvalidParameterError
        An input of the family holds positions in the cell's own sequence, which would point at other tokens.
    """
    fixed = [spec.name for spec in family.inputs if spec.within_length]
    if config.share and fixed:
        raise InvalidParameterError(
            f"{field} is {config.share}, but the family {family.name} cannot hide genes: its input {fixed[0]} holds "
            "positions in the cell. Set it to 0.",
            field=field,
        )


def hide_genes(batch: Mapping[str, Tensor], family: Family, config: PanelConfig, *, seed: int) -> Mapping[str, Tensor]:
    """Return a batch as a panel would show it, or unchanged.

    A cell keeps the order of its genes, at least one of them, and all its special tokens.

    Parameters
    ----------
    batch
        A padded batch; not modified.
    family
        Family of the inputs; see :func:`check_hiding`.
    config
        Share of the batches to change, and ranges of the shares of genes to keep.
    seed
        Seed of all random choices.
    """
    rng = np.random.default_rng([seed, _PANEL])
    if rng.random() >= config.share:
        return batch
    present_BL = batch["attention_mask"].bool()
    genes_BL = gene_tokens(batch, family)
    kept_genes = np.exp(rng.uniform(np.log(config.genes[0]), np.log(config.genes[1])))
    on_panel = torch.from_numpy(rng.random(len(family.vocabulary)) < kept_genes)
    depth_B1 = torch.from_numpy(rng.uniform(*config.depth, size=(len(present_BL), 1)))
    drawn_BL = torch.from_numpy(rng.random(tuple(present_BL.shape)))
    is_gene_BL = genes_BL >= 0
    shown_BL = is_gene_BL & on_panel[genes_BL.clamp_min(0)] & (drawn_BL < depth_B1)
    first_BL = is_gene_BL & (is_gene_BL.cumsum(dim=1) == 1)
    shown_BL |= first_BL & ~shown_BL.any(dim=1, keepdim=True)
    return keep_tokens(batch, shown_BL | (present_BL & ~is_gene_BL), family.inputs)
