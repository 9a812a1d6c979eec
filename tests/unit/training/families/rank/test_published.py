"""Published weights: configurations and tensors that are read, and those that are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perturbscope.errors import InvalidParameterError, UnreadableFileError
from tests.published import genes, write_published
from training.families.rank.model import RankModelConfig, build_model
from training.families.rank.published import named, read_config, read_weights, weight_files


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_published(tmp_path, "V2")[0]


def change(directory: Path, **values: Any) -> None:
    """Replace keys of config.json; None takes one out."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def read(directory: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    config = read_config(directory)
    options = {"head": config.head, "classes": config.classes or ()}
    return read_weights(directory, RankModelConfig(**config.options, **options), genes("V2"))


def test_a_configuration_becomes_ours(directory):
    config = read_config(directory)
    assert (config.architecture, config.head, config.vocab_size, config.classes) == (
        "BertForMaskedLM", "masked_lm", 64, None,
    )  # fmt: skip
    wanted = {"layers": 3, "hidden": 32, "heads": 4, "feed_forward": 64, "activation": "relu", "max_length": 40}
    assert dict(config.options).items() >= wanted.items()
    change(directory, hidden_dropout_prob=None, layer_norm_eps=None)
    assert (read_config(directory).options["dropout"], read_config(directory).options["layer_norm_eps"]) == (0.1, 1e-12)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"architectures": ["BertForQuestionAnswering"]},
            "is of a BertForQuestionAnswering; a BertForMaskedLM or a BertFor",
        ),
        ({"architectures": ["EsmForMaskedLM"], "model_type": "esm"}, "is of a EsmForMaskedLM"),
        ({"architectures": None}, "is of a bert model without a head"),
        ({"architectures": "BertForMaskedLM"}, "is of a bert model without a head"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; only 'absolute' is"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"model_type": "roberta"}, "model_type is 'roberta'; only 'bert' is supported"),
        ({"problem_type": "multi_label_classification"}, "only 'single_label_classification' is supported"),
        ({"pad_token_id": 1}, "pad_token_id is 1"),
    ],
)
def test_another_architecture_is_named(directory, values, says):
    change(directory, **values)
    with pytest.raises(InvalidParameterError, match=says):
        read_config(directory)


def test_a_configuration_that_is_none(directory):
    change(directory, hidden_size=None)
    with pytest.raises(UnreadableFileError, match="has no hidden_size; it is not the file of a BERT"):
        read_config(directory)
    change(directory, hidden_size=32, vocab_size="all")
    with pytest.raises(UnreadableFileError, match="vocab_size is 'all'; a whole number is needed"):
        read_config(directory)
    change(directory, vocab_size=64, architectures=["BertForSequenceClassification"], id2label=["a", "b"])
    with pytest.raises(UnreadableFileError, match=r"id2label is \['a', 'b'\]; names by number are needed"):
        read_config(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(UnreadableFileError, match="holds no JSON object"):
        read_config(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UnreadableFileError, match=r"has no config\.json\. Give the directory"):
        read_config(directory)
    with pytest.raises(UnreadableFileError, match="is not a directory"):
        read_config(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [({"1": "b", "0": "a"}, ("a", "b")), ({"a": 0, "b": 1}, ("a", "b")), ({"0": "1", "1": "0"}, ("1", "0"))],
)
def test_classes_in_the_order_of_their_numbers(names, wanted):
    assert named(names) == wanted
    with pytest.raises(ValueError, match="does not number 3 classes 0 to 2"):
        named({**names, "7": "c"})


# Weights


def state(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_files_of_all_kinds_hold_the_same(tmp_path, directory):
    wanted, unused = read(directory)
    assert unused == []
    model = build_model(RankModelConfig(**read_config(directory).options), genes("V2"))
    assert set(wanted) == {name for name, _ in model.named_parameters()}

    single = state(directory)
    write_published(tmp_path / "sharded", "V2")[1].save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(weight_files(tmp_path / "shards")) > 2
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in single.items()} | {
        "bert.embeddings.position_ids": torch.arange(40)[None],
        "bert.pooler.dense.weight": torch.ones(32, 32),
        "cls.predictions.decoder.weight": single["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": single["cls.predictions.bias"],
    }
    (directory / "model.safetensors").unlink()
    torch.save(old, directory / "pytorch_model.bin")
    for place, left_out in (
        (tmp_path / "shards", []),
        (directory, ["bert.embeddings.position_ids", "bert.pooler.dense.weight"]),
    ):
        found, unused = read(place)
        assert unused == left_out
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_half_precision_is_read_as_float32(directory):
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state(directory).items()}
    save_file(half, directory / "model.safetensors")
    found, _ = read(directory)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], tensor.to(torch.float32)) for name, tensor in half.items())


def lacking(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layer.1." not in name}


def unknown(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "bert.encoder.layer.3.output.dense.bias": torch.ones(32)}


def shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "bert.embeddings.position_embeddings.weight": torch.ones(41, 32)}


def own_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "cls.predictions.decoder.weight": torch.ones(64, 32)}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lacking, r"lacks bert\.encoder\.layer\.1\.\S+, \S+, \S+ and 13 more; they are not the weights"),
        (unknown, r"has unknown tensors: bert\.encoder\.layer\.3\.output\.dense\.bias; they"),
        (shape, r"position_embeddings\.weight has the shape \(41, 32\), but the network in .* needs \(40, 32\)"),
        (own_head, r"decoder\.weight is not bert\.embeddings\.word_embeddings\.weight; a head of its own"),
    ],
)
def test_tensors_that_do_not_fit(directory, changed, says):
    save_file(changed(state(directory)), directory / "model.safetensors")
    with pytest.raises(InvalidParameterError, match=says):
        read(directory)


class Calls:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, ("touch MARK",)


def test_damaged_files(directory, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    weights = directory / "model.safetensors"
    raw = weights.read_bytes()
    for damaged, says in (
        (raw[:1000], r"model\.safetensors cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(UnreadableFileError, match=says):
            read(directory)
    weights.unlink()
    with pytest.raises(UnreadableFileError, match=r"neither model\.safetensors nor pytorch_model\.bin, nor an index"):
        read(directory)
    binary = directory / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": Calls()}, binary)
    with pytest.raises(UnreadableFileError, match=r"names posix\.system, so reading it could run code; it is not read"):
        read(directory)
    assert not (tmp_path / "MARK").exists()
    binary.write_bytes(binary.read_bytes()[:300])
    with pytest.raises(UnreadableFileError, match=r"pytorch_model\.bin cannot be read"):
        read(directory)
    torch.save([torch.ones(2)], binary)
    with pytest.raises(UnreadableFileError, match="something other than tensors by name"):
        read(directory)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "model-00001-of-00001.safetensors"}}, "names model-00001-of-00001.safetensors, which"),
        ({"weight_map": {"a": "../../elsewhere.safetensors"}}, "names elsewhere.safetensors, which is not there"),
        ({"weight_map": [1]}, "has no weight_map of file names"),
        ({}, "has no weight_map of file names"),
    ],
)
def test_an_index_of_shards_that_are_not_there(directory, index, says):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnreadableFileError, match=says):
        weight_files(directory)
