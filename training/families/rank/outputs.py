"""All outputs of a rank model in one pass: embeddings of cells and genes, and the logits of a classifier.

Shapes: B cells in the batch, L tokens, H hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbscope.families.outputs import CELL_EMBEDDING, GENE_EMBEDDING, OutputSpec, cell_embedding
from training.families.rank.model import BertModels, RankModelConfig
from training.families.rank.pooling import PooledEncoder

CELL_LOGITS, GENE_LOGITS = "cell_logits", "gene_logits"


def output_specs(config: RankModelConfig) -> tuple[OutputSpec, ...]:
    """Return the outputs of a model."""
    gene_embedding = OutputSpec(name=GENE_EMBEDDING, per="token", width=config.hidden, meaning="embedding")
    embeddings = (cell_embedding(config.hidden), gene_embedding)
    if config.head == "masked_lm":
        return embeddings
    name, per = logits_of(config.head)
    logits = OutputSpec(name=name, per=per, width=len(config.classes), meaning="logits", names=config.classes)
    return (*embeddings, logits)


def logits_of(head: str) -> tuple[str, Literal["cell", "token"]]:
    """Return name and kind of the logits of a classifier."""
    return (CELL_LOGITS, "cell") if head == "cell_classes" else (GENE_LOGITS, "token")


class RankOutputs(PooledEncoder):
    """A pooled encoder with further outputs: states of its layer, and logits of the head after the last block.

    Parameters
    ----------
    model
        Model with the head that the outputs need.
    names
        Outputs, in order.
    **options
        See :class:`PooledEncoder`.
    """

    def __init__(self, model: BertModels, names: Sequence[str], **options: Any) -> None:
        super().__init__(model, **options)
        self._names = tuple(names)
        self.last_blocks = nn.ModuleList()
        self.pooler: Any = None
        self.classifier: Any = None
        if CELL_LOGITS in names or GENE_LOGITS in names:
            self.last_blocks.extend(list(model.bert.encoder.layer)[len(self.blocks) :])
            self.pooler = model.bert.pooler if CELL_LOGITS in names else None
            self.classifier = getattr(model, "classifier")  # noqa: B009  not every network has one

    def outputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return all outputs by name; see :meth:`forward`."""
        hidden_BLH, attention = self.states(input_ids, attention_mask)
        values = {
            CELL_EMBEDDING: self.pooled(hidden_BLH, input_ids, attention_mask),
            GENE_EMBEDDING: hidden_BLH.to(torch.float32),
        }
        if self.classifier is not None:
            for block in self.last_blocks:
                hidden_BLH = block(hidden_BLH, attention)
            if self.pooler is None:
                values[GENE_LOGITS] = self.classifier(hidden_BLH)
            else:
                values[CELL_LOGITS] = self.classifier(self.pooler(hidden_BLH))
        return values

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Compute the outputs of a batch of cells, both inputs int64 [B, L], padded on the right.

        Returns
        -------
        Tuple of the outputs in order, float32: [B, H] or [B, C] per cell, [B, L, H] or [B, L, C] per token.
        """
        values = self.outputs(input_ids, attention_mask)
        return tuple(values[name] for name in self._names)


class RankReference(nn.Module):
    """The outputs by their definition: from all hidden states and the logits that transformers returns, cell by cell.

    Parameters
    ----------
    model
        Model in evaluation mode.
    config
        Its configuration.
    names
        Outputs, in order.
    special
        Ids of start and end tokens.
    """

    def __init__(
        self, model: BertModels, config: RankModelConfig, names: Sequence[str], special: Sequence[int]
    ) -> None:
        super().__init__()
        self.model = model
        self._config = config
        self._names = tuple(names)
        self._special = frozenset(special)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in order; see :meth:`RankOutputs.forward`."""
        found: Any = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states_BLH = found.hidden_states[-2 if self._config.layer == "penultimate" else -1]
        values = {CELL_EMBEDDING: self._pooled(states_BLH, input_ids, attention_mask), GENE_EMBEDDING: states_BLH}
        if self._config.head != "masked_lm":
            values[logits_of(self._config.head)[0]] = found.logits
        return tuple(values[name].float() for name in self._names)

    def _pooled(self, states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self._config.pooling == "cls":
            return states[:, 0]
        pooled = []
        for cell, ids, mask in zip(states, input_ids.tolist(), attention_mask.tolist(), strict=True):
            places = [i for i, (token, is_real) in enumerate(zip(ids, mask, strict=True)) if is_real]
            pooled.append(cell[[i for i in places if ids[i] not in self._special]].mean(dim=0))
        return torch.stack(pooled)
