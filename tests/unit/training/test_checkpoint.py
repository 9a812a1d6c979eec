from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perturbscope.errors import (
    BundleError,
    CorruptBundleError,
    InvalidParameterError,
    UnsupportedBundleError,
    VocabularyMismatchError,
)
from tests.models import TINY_MODEL, small_batch, small_checkpoint, small_model, small_vocabulary
from training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from training.families.rank.model import build_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "checkpoint")


def rewrite_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def save(path: Path, **changes: object) -> Path:
    options = {
        "model": small_model(),
        "family": "rank",
        "family_config": {},
        "model_config": TINY_MODEL,
        "vocabulary": small_vocabulary(),
        "provenance": {},
    }
    return save_checkpoint(path, **(options | changes))


def test_round_trip(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    assert checkpoint.family == "rank"
    assert checkpoint.family_config == {"max_length": 40}
    assert checkpoint.provenance == {"data": "none", "licence": "Apache-2.0"}
    assert checkpoint.model_config["layers"] == 3
    assert checkpoint.vocabulary.gene_ids == small_vocabulary().gene_ids
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "vocabulary.tsv", "weights.safetensors"]

    ids, mask = small_batch()
    with torch.inference_mode():
        before = small_model()(ids, attention_mask=mask).logits
        after = checkpoint.model()(ids, attention_mask=mask).logits
    assert torch.equal(before, after)


def test_fields_that_came_later_are_stored_only_where_they_are_used(saved: Path, tmp_path: Path) -> None:
    assert not {"head", "classes"} & set(load_checkpoint(saved).model_config)
    config = dataclasses.replace(TINY_MODEL, head="gene_classes", classes=("sensitive", "not"))
    stored = load_checkpoint(save(tmp_path / "c", model=build_model(config, small_vocabulary()), model_config=config))
    assert (stored.model_config["head"], stored.model_config["classes"]) == ("gene_classes", ["sensitive", "not"])
    assert stored.model().classifier.out_features == 2


def test_tied_tensors_are_stored_once_and_tied_again(saved: Path) -> None:
    stored = load_file(saved / "weights.safetensors")
    shapes = [tuple(tensor.shape) for tensor in stored.values()]
    assert shapes.count((62, 32)) == 1
    model = load_checkpoint(saved).model()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_a_state_dict_with_copies_of_tied_tensors_is_accepted(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in small_model().state_dict().items()}
    model = load_checkpoint(save(tmp_path / "c", model=state)).model()
    assert torch.equal(model.cls.predictions.decoder.weight, state["bert.embeddings.word_embeddings.weight"])


def test_weights_are_stored_as_float32(tmp_path: Path) -> None:
    path = save(tmp_path / "c", model=small_model().to(torch.bfloat16))
    assert {tensor.dtype for tensor in load_file(path / "weights.safetensors").values()} == {torch.float32}


def test_the_model_configuration_can_be_overridden(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    assert checkpoint.model(attention="eager").config._attn_implementation == "eager"
    with pytest.raises(InvalidParameterError):
        checkpoint.model(attention="none")
    with pytest.raises(CorruptBundleError, match=r"layer\.3"):
        checkpoint.model(layers=4)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one"), save(tmp_path / "two")
    for name in ("weights.safetensors", "config.json", "vocabulary.tsv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


class TestVocabulary:
    def test_an_exchanged_vocabulary_file_is_refused(self, saved: Path) -> None:
        (saved / "vocabulary.tsv").write_text(small_vocabulary(median=2.0).to_tsv())
        with pytest.raises(VocabularyMismatchError, match=r"vocabulary\.tsv"):
            load_checkpoint(saved)


class TestDamage:
    @pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "vocabulary.tsv"])
    def test_a_missing_file(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        with pytest.raises(CorruptBundleError):
            load_checkpoint(saved)

    def test_a_changed_byte_of_the_weights(self, saved: Path) -> None:
        content = bytearray((saved / "weights.safetensors").read_bytes())
        content[-1] ^= 1
        (saved / "weights.safetensors").write_bytes(content)
        with pytest.raises(CorruptBundleError, match="damaged"):
            load_checkpoint(saved)

    def test_truncated_weights(self, saved: Path) -> None:
        content = (saved / "weights.safetensors").read_bytes()
        (saved / "weights.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(CorruptBundleError):
            load_checkpoint(saved)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": "1"}', '{"format_version": 1}', "\udcff"])
    def test_a_damaged_configuration(self, saved: Path, text: str) -> None:
        (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CorruptBundleError, match=r"config\.json"):
            load_checkpoint(saved)

    def test_a_field_of_another_kind(self, saved: Path) -> None:
        rewrite_config(saved, model_config=[])
        with pytest.raises(CorruptBundleError, match="model_config"):
            load_checkpoint(saved)

    def test_a_newer_format(self, saved: Path) -> None:
        rewrite_config(saved, format_version=99)
        with pytest.raises(UnsupportedBundleError, match="99"):
            load_checkpoint(saved)

    def test_an_unknown_family(self, saved: Path) -> None:
        rewrite_config(saved, family="nonesuch")
        with pytest.raises(UnsupportedBundleError, match="nonesuch"):
            load_checkpoint(saved).model()

    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptBundleError, match="not a checkpoint"):
            load_checkpoint(tmp_path / "nothing")

    def test_weights_of_another_network(self) -> None:
        weights = dict(small_model().state_dict())
        weights["bert.embeddings.LayerNorm.bias"] = torch.zeros(31)
        with pytest.raises(CorruptBundleError, match=r"here .* shape \['bert.embeddings.LayerNorm.bias'\]"):
            load_weights(small_model(), weights, where="here")


class TestAtomic:
    def test_an_existing_directory_is_kept(self, saved: Path) -> None:
        before = (saved / "weights.safetensors").read_bytes()
        with pytest.raises(BundleError, match="exists"):
            save(saved, model=small_model(seed=1))
        assert (saved / "weights.safetensors").read_bytes() == before

    def test_overwriting(self, saved: Path) -> None:
        save(saved, model=small_model(seed=1), overwrite=True)
        loaded = load_checkpoint(saved).model()
        assert torch.equal(loaded.cls.predictions.decoder.weight, small_model(seed=1).cls.predictions.decoder.weight)
        assert [file.name for file in saved.parent.iterdir()] == [saved.name]

    def test_something_else_is_never_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
        with pytest.raises(BundleError, match="not a checkpoint"):
            save(tmp_path / "thesis", overwrite=True)
        assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"

    def test_a_failed_save_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError):
            save(tmp_path / "c", provenance={"model": object()})
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_overwrite_keeps_the_old_one(self, saved: Path) -> None:
        with pytest.raises(TypeError):
            save(saved, provenance={"model": object()}, overwrite=True)
        assert load_checkpoint(saved).provenance == {"data": "none", "licence": "Apache-2.0"}
        assert [file.name for file in saved.parent.iterdir()] == [saved.name]
