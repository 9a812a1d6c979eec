"""The rank model: a BERT over the ranked genes of a cell, trained to restore masked genes or to name classes.

The architecture is that of Geneformer (Theodoris et al. 2023): post-LN blocks, learned absolute positions (the position
of a gene is its rank), a head tied to the input embeddings. The masked-language task is that of Devlin et al. 2019,
except that random replacements are drawn from genes only. A classifier of cells or of genes has the layers, and the
names of weights, of transformers' classes, so that published weights fit.

Shapes: B cells in the batch, L tokens, H hidden, M masked tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

from perturbscope.cells.vocabulary import GeneVocabulary
from training.config.strict import SectionError, configuration, later, parse, within
from training.families.rank.head import summed_cross_entropy
from training.families.rank.packed import Layout, can_pack, states

IGNORED = -100
"""Label of a token that is not predicted; torch's cross-entropy ignores it."""
_MASKED, _RANDOM = 0.8, 0.1
"""Shares of the selected tokens that become <mask>, and that become a random gene."""

BertModels = BertForMaskedLM | BertForSequenceClassification | BertForTokenClassification
"""Networks with each of the heads."""
_NETWORKS: Mapping[str, type[BertModels]] = {
    "masked_lm": BertForMaskedLM,
    "cell_classes": BertForSequenceClassification,
    "gene_classes": BertForTokenClassification,
}


@configuration
class RankModelConfig:
    """Size and behaviour of the network; the defaults are those of Geneformer's 6-layer model of 10 M parameters.

    Raises
    ------
    InvalidParameterError
        A value is outside its range.
    """

    layers: Annotated[int, within(2, 1000)] = 6
    """Number of transformer blocks; the last one serves pre-training only."""
    hidden: Annotated[int, within(1, 2**16)] = 256
    """Width of a token and of a cell embedding."""
    heads: Annotated[int, within(1, 2**10)] = 4
    """Number of attention heads; divides `hidden`."""
    feed_forward: Annotated[int, within(1, 2**18)] = 512
    """Width of the layer between a block's two dense layers."""
    activation: Literal["relu", "gelu"] = "relu"
    """Non-linearity of the dense layers."""
    dropout: Annotated[float, within(0, 0.99)] = 0.02
    """Dropout of embeddings and dense layers."""
    attention_dropout: Annotated[float, within(0, 0.99)] = 0.02
    """Dropout of attention weights."""
    init_sd: Annotated[float, within(1e-9, 10)] = 0.02
    """Standard deviation of the initial weights."""
    layer_norm_eps: Annotated[float, within(0, 1)] = 1e-12
    """Constant added to the variance in each layer normalisation."""
    max_length: Annotated[int, within(1, 2**16)] = 2048
    """Number of learned positions, and so the longest cell in tokens."""
    token_types: Annotated[int, within(1, 2**10)] = 2
    """Rows of the token-type table; only row 0 is used, and 2 is the shape of published BERT weights."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation: torch's fused kernel, or plain matrix products."""
    head: Literal["masked_lm", "cell_classes", "gene_classes"] = later("masked_lm")
    """Head: restores masked genes, names the class of a cell, or names the class of each gene of a cell."""
    classes: tuple[str, ...] = later(())
    """Names of the classes, in the order of the outputs of the head; none for masked_lm."""

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise SectionError(
                f"hidden is {self.hidden}, which {self.heads} heads do not divide. Choose a multiple of heads.",
                field="hidden",
            )
        if self.head == "masked_lm" and self.classes:
            raise SectionError(
                f"classes holds {len(self.classes)} names, but the head masked_lm has no classes. "
                "Set head to cell_classes or gene_classes.",
                field="classes",
            )
        if self.head != "masked_lm" and len(set(self.classes)) < 2:
            raise SectionError(
                f"classes holds {len(set(self.classes))} names; the head {self.head} needs at least 2.", field="classes"
            )
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise SectionError(f"classes names {twice!r} twice. Give each class a name of its own.", field="classes")


def parse_config(options: Mapping[str, Any]) -> RankModelConfig:
    """Return the configuration from plain values.

    Raises
    ------
    InvalidParameterError
        An option is unknown, has another type or is out of its range.
    """
    return parse(RankModelConfig, options, where="model")


def build_model(config: RankModelConfig, vocabulary: GeneVocabulary) -> BertModels:
    """Make a new model over the tokens of `vocabulary`; weights come from the global generator of torch."""
    labels: dict[str, Any] = {"id2label": dict(enumerate(config.classes))} if config.classes else {}
    bert = BertConfig(
        vocab_size=len(vocabulary),
        pad_token_id=vocabulary.special_tokens["<pad>"],
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.feed_forward,
        hidden_act=config.activation,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        initializer_range=config.init_sd,
        layer_norm_eps=config.layer_norm_eps,
        max_position_embeddings=config.max_length,
        type_vocab_size=config.token_types,
        tie_word_embeddings=True,
        use_cache=False,
        **labels,
    )
    bert._attn_implementation = config.attention
    return _NETWORKS[config.head](bert)


def mask_batch(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    vocabulary: GeneVocabulary,
    generator: torch.Generator,
    probability: float = 0.15,
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

    Returns
    -------
    Corrupted ids, and labels: the true id of a selected token, :data:`IGNORED` elsewhere; both int64 [B, L].
    """
    shape, device = input_ids.shape, input_ids.device
    genes = torch.tensor(vocabulary.tokens, dtype=torch.int64, device=device)
    select = torch.rand(shape, generator=generator, device=device) < probability
    fate = torch.rand(shape, generator=generator, device=device)
    drawn = genes[torch.randint(len(genes), shape, generator=generator, device=device)]
    select &= attention_mask.bool()
    labels_BL = input_ids.masked_fill(~select, IGNORED)
    corrupted_BL = input_ids.masked_fill(select & (fate < _MASKED), vocabulary.special_tokens["<mask>"])
    replace = select & (fate >= _MASKED) & (fate < _MASKED + _RANDOM)
    return torch.where(replace, drawn, corrupted_BL), labels_BL


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


def masked_lm(model: BertForMaskedLM) -> MaskedLM:
    """Return the loss module over `model`."""
    return MaskedLM(model)
