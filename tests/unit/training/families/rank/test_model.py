from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
)

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import InvalidParameterError, UnsupportedBundleError
from perturbscope.families import FAMILIES
from tests.models import TINY_MODEL, small_batch, small_model, small_vocabulary
from training import families
from training.families.rank.masking import IGNORED, MaskedLM, mask_batch
from training.families.rank.model import RankModelConfig, build_model, parse_config


def masked(ids, mask, *, seed=0, probability=0.15):
    generator = torch.Generator().manual_seed(seed)
    return mask_batch(ids, mask, vocabulary=small_vocabulary(), generator=generator, probability=probability)


class TestModel:
    def test_defaults_are_the_ten_million_parameter_model(self) -> None:
        with torch.device("meta"):
            model = build_model(RankModelConfig(), GeneVocabulary.geneformer_gc30m())
        embeddings = (25_426 + 2_048 + 2) * 256 + 2 * 256
        block = 4 * (256 * 256 + 256) + (256 * 512 + 512) + (512 * 256 + 256) + 2 * 2 * 256
        assert sum(parameter.numel() for parameter in model.bert.parameters()) == embeddings + 6 * block
        assert embeddings + 6 * block == 10_196_992
        assert model.bert.embeddings.word_embeddings.weight.shape == (25_426, 256)
        assert model.bert.embeddings.position_embeddings.weight.shape == (2048, 256)
        assert [block.intermediate.dense.out_features for block in model.bert.encoder.layer] == [512] * 6

    def test_the_head_is_tied_to_the_embeddings(self) -> None:
        model = small_model()
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight

    def test_weights_have_the_configured_spread(self) -> None:
        model = small_model(dataclasses.replace(TINY_MODEL, init_sd=0.02))
        weight = model.bert.encoder.layer[0].intermediate.dense.weight
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("layers", 1),
            ("layers", 2.5),
            ("layers", True),
            ("hidden", 30),
            ("dropout", 1.0),
            ("dropout", float("nan")),
            ("activation", "tanh"),
            ("attention", "flash"),
            ("max_length", "2048"),
            ("depth", 3),
        ],
    )
    def test_a_bad_option_is_named(self, option: str, value: object) -> None:
        with pytest.raises(InvalidParameterError) as caught:
            parse_config({option: value})
        assert caught.value.field == f"model.{option}"

    @pytest.mark.parametrize(
        ("head", "published"),
        [
            ("masked_lm", BertForMaskedLM),
            ("cell_classes", BertForSequenceClassification),
            ("gene_classes", BertForTokenClassification),
        ],
    )
    def test_each_head_takes_the_weights_of_transformers(self, head: str, published: type[PreTrainedModel]) -> None:
        names = () if head == "masked_lm" else ("T cell", "B cell", "monocyte")
        config = dataclasses.replace(TINY_MODEL, head=head, classes=names)
        model = build_model(config, small_vocabulary())
        ids, mask = small_batch()
        labels = {"id2label": dict(enumerate(names))} if names else {}
        other = published(BertConfig(**{**model.config.to_diff_dict(), **labels})).eval()
        other.load_state_dict(model.state_dict())
        logits = other(ids, attention_mask=mask).logits
        torch.testing.assert_close(model.eval()(ids, attention_mask=mask).logits, logits)
        width = len(names) or 62
        assert logits.shape == ((3, width) if head == "cell_classes" else (*ids.shape, width))

    @pytest.mark.parametrize(
        ("head", "names", "problem"),
        [
            ("masked_lm", ["a", "b"], "holds 2 names, but the head masked_lm"),
            ("gene_classes", ["a"], "at least 2"),
            ("cell_classes", ["a", "b", "a"], "'a' twice"),
        ],
    )
    def test_classes_that_do_not_suit_the_head(self, head: str, names: list[str], problem: str) -> None:
        with pytest.raises(InvalidParameterError, match=problem) as caught:
            parse_config({"head": head, "classes": names})
        assert caught.value.field == "model.classes"

    def test_families_bear_the_names_of_the_tokenizers(self) -> None:
        assert set(families.FAMILIES) <= set(FAMILIES)
        assert families.load("rank").parse_config({"layers": 4}) == RankModelConfig(layers=4)

    @pytest.mark.parametrize("name", ["", "os", "..checkpoint", "rank.", "nonesuch"])
    def test_an_unknown_family_is_refused(self, name: str) -> None:
        with pytest.raises(UnsupportedBundleError, match="rank"):
            families.load(name)


class TestMaskBatch:
    def test_labels_are_the_true_ids_where_selected_and_only_there(self) -> None:
        ids, mask = small_batch(lengths=(40, 25, 3))
        before = ids.clone()
        corrupted, labels = masked(ids, mask, probability=0.5)
        selected = labels != IGNORED
        assert torch.equal(ids, before)
        assert torch.equal(labels[selected], ids[selected])
        assert torch.equal(corrupted[~selected], ids[~selected])
        assert not selected[mask == 0].any()

    def test_shares_of_the_four_fates(self) -> None:
        ids = torch.randint(2, 62, (200, 500), generator=torch.Generator().manual_seed(1))
        corrupted, labels = masked(ids, torch.ones_like(ids))
        selected = labels != IGNORED
        assert selected.float().mean().item() == pytest.approx(0.15, abs=0.005)
        changed = corrupted[selected]
        assert (changed == 1).float().mean().item() == pytest.approx(0.8, abs=0.012)
        kept = (changed == ids[selected]).float().mean().item()
        # A random gene is the true one in 1 of 60 cases.
        assert kept == pytest.approx(0.1 + 0.1 / 60, abs=0.01)

    def test_random_ids_are_genes_and_all_of_them_occur(self) -> None:
        ids = torch.full((300, 300), 2)
        corrupted, labels = masked(ids, torch.ones_like(ids))
        drawn = corrupted[(labels != IGNORED) & (corrupted != 1)]
        assert set(drawn.unique().tolist()) == set(range(2, 62))

    def test_the_generator_alone_decides(self) -> None:
        ids, mask = small_batch(lengths=(40, 40))
        first, again, other = (masked(ids, mask, seed=seed)[0] for seed in (5, 5, 6))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestMaskedLoss:
    def test_equals_the_loss_of_the_dense_head(self) -> None:
        model = small_model()
        ids, mask = small_batch(lengths=(40, 25, 3))
        corrupted, labels = masked(ids, mask)
        sparse = MaskedLM(model)(corrupted, mask, labels)
        dense = model(corrupted, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(sparse, dense, atol=1e-6, rtol=1e-6)
        names = [name for name, _ in model.named_parameters()]
        for name, one, two in zip(
            names,
            torch.autograd.grad(sparse, list(model.parameters()), materialize_grads=True),
            torch.autograd.grad(dense, list(model.parameters()), materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4, msg=name)

    def test_a_batch_without_masked_tokens_has_zero_loss_and_zero_gradients(self) -> None:
        model = small_model()
        ids, mask = small_batch()
        loss = MaskedLM(model)(ids, mask, torch.full_like(ids, IGNORED))
        loss.backward()
        assert loss.item() == 0.0
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert [name for name, grad in grads.items() if grad is None or bool(grad.abs().max() != 0)] == []

    def test_an_untrained_model_is_as_good_as_guessing(self) -> None:
        model = small_model(dataclasses.replace(TINY_MODEL, init_sd=0.001))
        ids, mask = small_batch(lengths=(40, 40, 40))
        corrupted, labels = masked(ids, mask)
        loss = MaskedLM(model)(corrupted, mask, labels)
        assert loss.item() == pytest.approx(torch.log(torch.tensor(62.0)).item(), abs=0.02)
