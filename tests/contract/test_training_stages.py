"""The stages of training over the toy family: what the rank family does not have goes through all of them.

Its cells have two inputs a token and one a cell, no input is called ``input_ids``, and its loss is no cross-entropy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perturbscope.cells.readers import open_cells
from perturbscope.errors import InvalidParameterError, UnsupportedBundleError
from perturbscope.families import load_family
from perturbscope.families.tokens import TokenizedCells, pad
from tests.toy_family.tokens import ToyFamily
from tests.training_data import VOCABULARY, contrastive_values, pretrain_values
from training.checkpoint import load_checkpoint
from training.commands.evaluate import run as evaluate
from training.commands.finetune import finetune
from training.commands.pretrain import pretrain
from training.config import strict
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.data.batches import padded
from training.data.corpus import build_corpus
from training.data.shards import Corpus
from training.loop.engine import PlainEngine
from training.loop.journal import read_log
from training.measure.cost import Speed, estimate
from training.measure.speed import measure
from training.measure.unseen import EvaluateOptions

TOKENS = {"family": "toy", "family_options": {"n_bins": 5}}


def pretraining(folder: Path, **loop: Any) -> PretrainConfig:
    values = pretrain_values(folder, **loop)
    values["corpus"] |= {**TOKENS, "shard_tokens": 500, "chunk_cells": 7}
    values["model"] = {"hidden": 12, "n_bins": 5}
    values["panel"] = {"share": 0.5, "genes": [0.3, 1.0]}
    return strict.parse(PretrainConfig, values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model."""
    folder = tmp_path_factory.mktemp("toy")
    assert pretrain(pretraining(folder, epochs=4, checkpoint_every=2)) is not None
    return folder


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line]


def test_a_corpus_keeps_every_input_of_every_cell(folder: Path) -> None:
    corpus = Corpus(folder / "corpus")
    assert len(corpus.manifest["shards"]) > 3
    assert corpus.manifest["family_config"] == {"max_length": 40, "n_bins": 5}
    with open_cells(folder / "perturbed.h5ad") as source:
        expected = load_family("toy", {"max_length": 40, "n_bins": 5}, VOCABULARY).tokenize(source.read())
    numbers = np.array([70, 3, 3, 128])
    stored: TokenizedCells = corpus.cells(numbers)
    for name in ("genes", "bins"):
        assert stored.arrays[name].dtype == np.uint16
    batch = padded(corpus, numbers)
    for name, array in pad(expected, numbers, corpus.family.inputs).items():
        np.testing.assert_array_equal(batch[name].numpy(), array)
        assert batch[name].numpy().dtype == array.dtype
    assert batch["depth"].shape == (4,)


def test_pretraining_learns(folder: Path) -> None:
    found = losses(folder / "pretrain")
    assert np.mean(found[-10:]) < 0.6 * np.mean(found[:5])
    checks = [line for line in read_log(folder / "pretrain" / "log.jsonl") if "validation_loss" in line]
    assert checks[-1]["validation_loss"] < checks[0]["validation_loss"]
    assert checks[0]["validation_error"] == pytest.approx(checks[0]["validation_loss"] ** 0.5)
    assert "validation_perplexity" not in checks[0]  # the loss is no cross-entropy
    checkpoint = load_checkpoint(folder / "pretrain" / "checkpoint")
    assert checkpoint.family == "toy"
    assert checkpoint.family_config == {"max_length": 40, "n_bins": 5}
    assert checkpoint.model_config["hidden"] == 12


def test_an_interrupted_run_goes_on_to_the_last_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = PlainEngine.micro_step

    def killed(self: PlainEngine, *arguments: Any, **options: Any) -> float:
        nonlocal steps
        steps += 1
        if steps > 25:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    config = pretraining(tmp_path, epochs=4, checkpoint_every=10)
    monkeypatch.setattr(PlainEngine, "micro_step", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    steps = -1000
    assert pretrain(config) is not None
    assert losses(tmp_path / "pretrain") == losses(folder / "pretrain")
    weights = [load_checkpoint(run / "pretrain" / "checkpoint").weights for run in (folder, tmp_path)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def contrastive(folder: Path, out: Path, **changes: Any) -> ContrastiveConfig:
    values = contrastive_values(folder, epochs=2)
    values["output"] = str(out / "run")
    values["corpus"] |= {"family": "toy", "path": str(out / "corpus"), **changes.pop("corpus", {})}
    return strict.parse(ContrastiveConfig, values | changes)


@pytest.mark.parametrize("objective", ["pairs", "mixed"])
def test_fine_tuning_takes_the_options_of_the_checkpoint(folder: Path, tmp_path: Path, objective: str) -> None:
    changes: dict[str, Any] = {"loss": {"margin": 3.0, "normalize": False}}
    if objective == "mixed":
        panel = {"share": 0.5, "genes": [0.3, 1.0]}
        changes = {"mixed": {"margin_contrastive": 1.0, "cross_entropy": 0.1, "info_nce": 0.1, "panel": panel}}
        changes["loop"] = {"epochs": 2, "micro_batch": 16, "device": "cpu", "threads": 1}
    path = finetune(contrastive(folder, tmp_path, **changes))
    assert path is not None
    assert Corpus(tmp_path / "corpus").manifest["family_config"] == {"max_length": 40, "n_bins": 5}
    before, after = load_checkpoint(folder / "pretrain" / "checkpoint"), load_checkpoint(path)
    assert after.model_config == before.model_config
    assert after.provenance["untrained"] == "the heads"
    changed = {name for name, tensor in before.weights.items() if not torch.equal(tensor, after.weights[name])}
    assert "body.mixing.weight" in changed
    assert not [name for name in changed if not name.startswith("body.")]
    assert all(np.isfinite(losses(tmp_path / "run")))


def test_options_that_contradict_the_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    config = contrastive(folder, tmp_path, corpus={"family_options": {"n_bins": 6}})
    with pytest.raises(InvalidParameterError, match=r"n_bins 6, the checkpoint 5") as caught:
        finetune(config)
    assert caught.value.field == "corpus.family_options.n_bins"
    with pytest.raises(InvalidParameterError, match="a key of its own"):
        contrastive(folder, tmp_path, corpus={"family_options": {"max_length": 6}})


def test_another_bin_is_another_corpus(folder: Path) -> None:
    values = pretrain_values(folder)["corpus"] | {**TOKENS, "family_options": {"n_bins": 6}}
    other = strict.parse(PretrainConfig, pretrain_values(folder) | {"corpus": values}).corpus
    with pytest.raises(InvalidParameterError, match="another configuration"):
        build_corpus(other)


def test_genes_are_not_hidden_from_cells_with_positions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = ToyFamily.inputs.fget  # type: ignore[attr-defined]
    fixed = property(lambda self: (replace(inputs(self)[0], within_length=True), *inputs(self)[1:]))
    config = pretraining(folder, epochs=4)
    monkeypatch.setattr(ToyFamily, "inputs", fixed)
    with pytest.raises(InvalidParameterError, match="cannot hide genes: its input genes holds positions"):
        pretrain(replace(config, output=str(tmp_path)))


def test_cost_and_speed_know_the_family(folder: Path) -> None:
    config = pretraining(folder)
    found = estimate(config, cells=100, length=30, measured=Speed(cells_per_second=1.0, origin="measured: so"))
    assert found.cost.forward > 0
    assert measure(config, steps=1, length=10).cells_per_second > 0


def test_a_measure_that_the_model_cannot_have_is_refused(folder: Path) -> None:
    arguments = (str(folder / "pretrain" / "checkpoint"), [str(folder / "perturbed.h5ad")])
    with pytest.raises(UnsupportedBundleError, match="does not restore genes"):
        evaluate(*arguments, options=EvaluateOptions(cells=5), corpus_path=None, out=None)
