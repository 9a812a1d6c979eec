"""The masked-language task of Devlin et al. 2019 on ranked genes, except that random replacements are genes only.

Shapes: B cells in the batch, L tokens, H hidden, M masked tokens of the batch, R rows, V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from perturbscope.cells.vocabulary import GeneVocabulary
from training.families import Batch
from training.families.rank.head import summed_cross_entropy
from training.families.rank.packed import Layout, can_pack, states

IGNORED = -100
"""Label of a token that is not predicted; torch's cross-entropy ignores it."""
_MASKED, _RANDOM = 0.8, 0.1
"""Shares of the selected tokens that become <mask>, and that become a random gene."""


def mask_batch(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    vocabulary: GeneVocabulary,
    generator: torch.Generator,
    probability: float = 0.15,
    special: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Mask tokens for the model to restore.

    Each real token is selected independently with `probability` (so a short cell may have none). Of the selected tokens
    80 % become ``<mask>``, 10 % a gene drawn uniformly, and 10 % stay.

    Parameters
    ----------
    input_ids, attention_mask
        A padded batch, int64 [B, L], on the generator's device; not modified.
    vocabulary
        Vocabulary with the mask token and the genes to draw from.
    generator
        Source of all randomness; the number of its draws depends on the shape of the batch only.
    probability
        Share of tokens to select.
    special
        Ids that are never selected.

    Returns
    -------
    Corrupted ids, and labels: the true id of a selected token, :data:`IGNORED` elsewhere; both int64 [B, L].
    """
    shape, device = input_ids.shape, input_ids.device
    genes = torch.tensor(vocabulary.tokens, dtype=torch.int64, device=device)
    select = torch.rand(shape, generator=generator, device=device) < probability
    fate = torch.rand(shape, generator=generator, device=device)
    drawn = genes[torch.randint(len(genes), shape, generator=generator, device=device)]
    select &= attention_mask.bool() & ~among(input_ids, special)
    labels_BL = input_ids.masked_fill(~select, IGNORED)
    corrupted_BL = input_ids.masked_fill(select & (fate < _MASKED), vocabulary.special_tokens["<mask>"])
    replace = select & (fate >= _MASKED) & (fate < _MASKED + _RANDOM)
    return torch.where(replace, drawn, corrupted_BL), labels_BL


def among(input_ids: Tensor, special: Sequence[int]) -> Tensor:
    """Return where the ids of a batch are among `special`, bool [B, L]."""
    return torch.isin(input_ids, torch.tensor(special, dtype=input_ids.dtype, device=input_ids.device))


class MaskedLM(nn.Module):
    """The masked-language loss, with the head and the output of the last block computed at the masked tokens only.

    At 6 x 256 and a vocabulary of 25,000, a head at all tokens is two fifths of the forward pass, and 85 % of it would
    be thrown away. If :func:`training.families.rank.packed.can_pack` allows, padding is not computed either, and the
    loss is summed piece by piece; it is the same.

    Parameters
    ----------
    model
        Model to train; its modules are shared, not copied.
    """

    def __init__(self, model: BertForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over the labelled tokens, float32 scalar; inputs are int64 [B, L].

        A batch without labelled tokens has the loss 0 and a zero gradient for every parameter, so that a distributed
        step still has all gradients.
        """
        labelled_BL = labels != IGNORED
        labels_M = labels[labelled_BL]
        bert, head = self.model.bert, self.model.cls
        if can_pack(self.model.config, head.predictions.decoder.weight, training=self.training):
            layout = Layout.of(attention_mask)
            selected_T = layout.pack(labelled_BL)
            hidden_MH = states(bert.embeddings, bert.encoder.layer, input_ids, layout, selected=selected_T)
            words = head.predictions.decoder
            total = summed_cross_entropy(head.predictions.transform(hidden_MH), words.weight, words.bias, labels_M)
        else:
            hidden_BLH = bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            logits_MV = head(hidden_BLH[labelled_BL])
            total = nn.functional.cross_entropy(logits_MV.float(), labels_M, reduction="sum")
        return total / max(len(labels_M), 1)


class MaskedLMRestorer:
    """A masked-language model as a restorer of hidden genes; see :class:`training.families.Restorer`."""

    def __init__(self, model: BertForMaskedLM, vocabulary: GeneVocabulary) -> None:
        self._model = model
        self._mask = vocabulary.special_tokens["<mask>"]

    def hide(self, batch: Batch, masked: Tensor) -> dict[str, Tensor]:
        """Put ``<mask>`` at the places `masked`, bool [B, L]."""
        return {**batch, "input_ids": batch["input_ids"].masked_fill(masked, self._mask)}

    def states(self, batch: Batch) -> Tensor:
        """Return the output of the last block, [B, L, H]."""
        hidden_BLH: Tensor = self._model.bert(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        return hidden_BLH

    def logits(self, states: Tensor) -> Tensor:
        """Return scores of all tokens, [R, V]."""
        logits_RV: Tensor = self._model.cls(states)
        return logits_RV
