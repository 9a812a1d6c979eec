"""The rank family as training and export see it: special tokens, layers, poolings, heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from perturbscope.errors import InvalidParameterError, UnsupportedBundleError
from perturbscope.families import Family, load_family
from tests.models import TINY_MODEL, small_vocabulary
from training.families.rank import family as half
from training.families.rank.masking import IGNORED
from training.families.rank.model import RankModelConfig
from training.families.rank.pooling import PooledEncoder

CLASSES = ("T cell", "B cell", "monocyte")


def rank(*, ends: bool) -> Family:
    options = {"start": "<cls>", "end": "<eos>"} if ends else {}
    return load_family("rank", {"max_length": 40, **options}, small_vocabulary(ends=ends))


def model_of(config: RankModelConfig, family: Family) -> Any:
    torch.manual_seed(0)
    return half.build_model(config, family.vocabulary).eval()


def cells(*, ends: bool, lengths: tuple[int, ...] = (12, 7, 4)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, 60, mask.shape, generator=generator)
    if ends:
        ids[:, 0] = 2
        ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 3
    return {"input_ids": ids * mask, "attention_mask": mask}


def configured(**options: Any) -> RankModelConfig:
    return dataclasses.replace(TINY_MODEL, **options)


@pytest.mark.parametrize("head", ["masked_lm", "cell_classes", "gene_classes"])
@pytest.mark.parametrize("layer", ["penultimate", "last"])
@pytest.mark.parametrize("ends", [False, True], ids=["genes only", "start and end"])
def test_the_module_to_trace_gives_the_outputs_by_their_definition(head: str, layer: str, ends: bool) -> None:
    family = rank(ends=ends)
    for pooling in ("mean", "cls") if ends else ("mean",):
        classes = () if head == "masked_lm" else CLASSES
        config = configured(head=head, classes=classes, layer=layer, pooling=pooling)
        spec = half.export_spec(config, family=family)
        model = model_of(dataclasses.replace(config, **spec.overrides), family)
        batch = cells(ends=ends)
        with torch.inference_mode():
            found = spec.module(model)(**batch)
            expected = spec.reference(model)(**batch)
        assert len(found) == len(expected) == len(spec.outputs)
        for output, value, reference in zip(spec.outputs, found, expected, strict=True):
            real = batch["attention_mask"].bool() if output.per == "token" else slice(None)
            assert value.shape == (3, *((12,) if output.per == "token" else ()), output.width)
            torch.testing.assert_close(value[real], reference[real], atol=1e-5, rtol=0)
        assert spec.fusion is not None
        assert spec.fusion.blocks == (2 if layer == "penultimate" and head == "masked_lm" else 3)


def test_the_logits_of_a_classifier_are_those_of_transformers() -> None:
    family = rank(ends=True)
    config = configured(head="cell_classes", classes=CLASSES)
    model = model_of(config, family)
    spec = half.export_spec(config, family=family, outputs=["cell_logits"])
    assert [(item.name, item.names) for item in spec.outputs] == [("cell_embedding", None), ("cell_logits", CLASSES)]
    assert spec.task == "cell_classification"
    with torch.inference_mode():
        _, logits = spec.module(model)(**cells(ends=True))
        torch.testing.assert_close(logits, model(**cells(ends=True)).logits, atol=1e-6, rtol=0)


def test_the_mean_leaves_start_and_end_out() -> None:
    family = rank(ends=True)
    model = model_of(TINY_MODEL, family)
    batch = cells(ends=True, lengths=(9,))
    with torch.inference_mode():
        found = half.encoder(model, TINY_MODEL, family=family)(**batch)
        states = model.bert(**batch, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(found, states[:, 1:-1].mean(dim=1), atol=1e-5, rtol=0)


def test_without_special_tokens_the_encoder_is_the_plain_one() -> None:
    family = rank(ends=False)
    model = model_of(TINY_MODEL, family)
    spec = half.export_spec(TINY_MODEL, family=family, outputs=[])
    for module in (spec.module(model), half.encoder(model, TINY_MODEL, family=family)):
        assert type(module) is PooledEncoder
        assert module.genes is None
    assert (spec.embedding.layer, spec.embedding.pooling) == ("hidden_states[-2]", "mean over tokens, padding excluded")


def test_start_and_end_are_never_masked() -> None:
    batch = cells(ends=True, lengths=(40, 30, 20))
    masked = half.mask(batch, family=rank(ends=True), generator=torch.Generator().manual_seed(0), probability=1.0)
    special = (batch["input_ids"] == 2) | (batch["input_ids"] == 3)
    assert int(special.sum()) == 6
    assert (masked["labels"][special] == IGNORED).all()
    assert torch.equal(masked["input_ids"][special], batch["input_ids"][special])
    assert half.n_targets(masked) == 90 - 6


def test_every_parameter_of_an_encoder_gets_a_gradient_whatever_the_head_and_pooling() -> None:
    family = rank(ends=True)
    for options in (
        {"head": "cell_classes", "classes": CLASSES},
        {"layer": "last", "pooling": "cls"},
        {"pooling": "cls"},
    ):
        config = configured(**options)
        encoder = half.encoder(model_of(config, family), config, family=family)
        encoder(**cells(ends=True)).square().sum().backward()
        assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_what_does_not_suit_is_said() -> None:
    with pytest.raises(InvalidParameterError, match="no start token") as caught:
        half.export_spec(configured(pooling="cls"), family=rank(ends=False))
    assert caught.value.field == "model.pooling"
    with pytest.raises(InvalidParameterError, match="has no output 'cell_logits'"):
        half.export_spec(TINY_MODEL, family=rank(ends=False), outputs=["cell_logits"])
    config = configured(head="gene_classes", classes=CLASSES)
    classifier = model_of(config, rank(ends=False))
    with pytest.raises(InvalidParameterError, match="head of a classifier"):
        half.pretraining(classifier)
    with pytest.raises(UnsupportedBundleError, match="head of a classifier"):
        half.restorer(classifier, family=rank(ends=False))
