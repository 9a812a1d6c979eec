"""The rank family as training and export call it; see :class:`training.families.TrainingFamily`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import InvalidParameterError, UnsupportedBundleError
from perturbscope.families import Family
from perturbscope.families.outputs import CELL_EMBEDDING, OutputSpec, selected
from perturbscope.families.rank import RankFamily
from training.families import Batch
from training.families.rank.masking import IGNORED, MaskedLM, MaskedLMRestorer, mask_batch
from training.families.rank.model import BertModels, RankModelConfig, build_model, parse_config
from training.families.rank.outputs import RankOutputs, RankReference, output_specs
from training.families.rank.pooling import GENE_POOLING, LAYER, POOLING, PooledEncoder
from training.families.specs import BertFusion, Embedding, ExportSpec, ModelSize, Task

__all__ = [
    "build_model", "embedding", "encoder", "export_spec", "mask", "measures", "n_targets", "outputs", "parse_config",
    "pretraining", "restorer", "size", "special_ids",
]  # fmt: skip

_TASKS: dict[str, Task] = {
    "masked_lm": "embedding",
    "cell_classes": "cell_classification",
    "gene_classes": "gene_classification",
}


def mask(batch: Batch, *, family: Family, generator: torch.Generator, probability: float = 0.15) -> dict[str, Tensor]:
    """Return the batch with masked ``input_ids``, and ``labels``; see :func:`mask_batch`."""
    ids, labels = mask_batch(
        batch["input_ids"],
        batch["attention_mask"],
        vocabulary=family.vocabulary,
        generator=generator,
        probability=probability,
        special=special_ids(family),
    )
    return {**batch, "input_ids": ids, "labels": labels}


def n_targets(batch: Batch) -> int:
    """Return the number of labelled tokens."""
    return int((batch["labels"] != IGNORED).sum())


def measures(loss: float) -> dict[str, float]:
    """Return the perplexity of a mean cross-entropy."""
    return {"perplexity": math.exp(min(loss, 700.0))}


def pretraining(model: BertModels) -> MaskedLM:
    """Return the masked-language loss over `model`, which needs the head masked_lm."""
    if not isinstance(model, BertForMaskedLM):
        raise InvalidParameterError(
            "The model has the head of a classifier, and pre-training restores masked genes. Set head to masked_lm.",
            field="model.head",
        )
    return MaskedLM(model)


def encoder(model: BertModels, config: RankModelConfig, *, family: Family) -> PooledEncoder:
    """Return the pooled encoder of the configured layer and pooling."""
    return PooledEncoder(model, **_pooling(config, family))


def restorer(model: BertModels, *, family: Family) -> MaskedLMRestorer:
    """Return the masked-language model as a restorer."""
    if not isinstance(model, BertForMaskedLM):
        raise UnsupportedBundleError(
            "The model has the head of a classifier; only a masked-language model restores genes.", field="family"
        )
    return MaskedLMRestorer(model, family.vocabulary)


def outputs(config: RankModelConfig) -> tuple[OutputSpec, ...]:
    """Return the embeddings of cells and genes and, of a classifier, its logits."""
    return output_specs(config)


def embedding(config: RankModelConfig) -> Embedding:
    """Describe the configured layer and pooling."""
    head = "language-model head" if config.head == "masked_lm" else "classification head"
    return Embedding(
        layer=LAYER if config.layer == "penultimate" else "hidden_states[-1]",
        pooling=POOLING if config.pooling == "mean" else "state of the start token",
        untrained=f"the last block and the {head}: the embedding is taken before them"
        if config.layer == "penultimate"
        else f"the {head}",
    )


def size(config: RankModelConfig, vocabulary: GeneVocabulary) -> ModelSize:
    """Return the sizes of the network."""
    return ModelSize(
        layers=config.layers,
        hidden=config.hidden,
        feed_forward=config.feed_forward,
        vocabulary=len(vocabulary),
        embedding_layers=config.layers if config.layer == "last" else None,
    )


def export_spec(config: RankModelConfig, *, family: Family, outputs: Sequence[str] | None = None) -> ExportSpec:
    """Return the specification of a graph; with the cell embedding alone it is that of the pooled encoder."""
    specs = output_specs(config)
    specs = specs if outputs is None else selected(specs, outputs)
    options = _pooling(config, family)
    names = [spec.name for spec in specs]
    has_logits = any(spec.meaning == "logits" for spec in specs)
    described = embedding(config)
    if options["special"] and config.pooling == "mean":
        described = replace(described, pooling=GENE_POOLING)

    def module(model: Any) -> nn.Module:
        return PooledEncoder(model, **options) if names == [CELL_EMBEDDING] else RankOutputs(model, names, **options)

    def reference(model: Any) -> nn.Module:
        return RankReference(model, config, names, options["special"])

    return ExportSpec(
        inputs=family.inputs,
        outputs=specs,
        task=_TASKS[config.head],
        embedding=described,
        module=module,
        reference=reference,
        overrides={"attention": "eager"},  # the fusion cannot look into fused kernels
        fusion=BertFusion(
            heads=config.heads,
            hidden=config.hidden,
            blocks=config.layers if has_logits or config.layer == "last" else config.layers - 1,
        ),
    )


def special_ids(family: Family) -> tuple[int, ...]:
    """Return the ids of the start and the end token of a cell, as far as the tokenizer has them."""
    options = cast("RankFamily", family).config
    return tuple(family.vocabulary.special_tokens[name] for name in (options.start, options.end) if name is not None)


def _pooling(config: RankModelConfig, family: Family) -> dict[str, Any]:
    """Return the options of :class:`PooledEncoder`."""
    if config.pooling == "cls" and cast("RankFamily", family).config.start is None:
        raise InvalidParameterError(
            "pooling is cls, but the tokenizer puts no start token before a cell. Give the family the option start "
            "(such as <cls>), with which the weights must have been trained, or set pooling to mean.",
            field="model.pooling",
        )
    return {"layer": config.layer, "pooling": config.pooling, "special": special_ids(family)}
