"""The rank model: a BERT over the ranked genes of a cell, trained to restore masked genes or to name classes.

The architecture is that of Geneformer (Theodoris et al. 2023): post-LN blocks, learned absolute positions (the position
of a gene is its rank), a head tied to the input embeddings. A classifier of cells or of genes has the layers, and the
names of weights, of transformers' classes, so that published weights fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

from perturbscope.cells.vocabulary import GeneVocabulary
from training.config.strict import SectionError, configuration, later, parse, within

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
    """Number of transformer blocks; unless `layer` is last, the last one serves the head only."""
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
    layer: Literal["penultimate", "last"] = later("penultimate")
    """Layer whose states are pooled to the cell embedding: the output of the last block but one, or of the last."""
    pooling: Literal["mean", "cls"] = later("mean")
    """Cell embedding: the mean over the genes of a cell, or the state of its start token."""

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
