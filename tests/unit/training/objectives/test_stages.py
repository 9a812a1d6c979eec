"""Both stages in one process, on a synthetic data set of 60 genes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
import yaml

from perturbscope.errors import (
    BundleError,
    ControlLabelMissingError,
    InvalidParameterError,
    TooFewCellsError,
)
from tests.models import small_vocabulary
from tests.training_data import TARGETS, VOCABULARY, contrastive_values, pretrain_values, write_data_set
from training.checkpoint import load_checkpoint
from training.commands import finetune as finetune_command
from training.commands import pretrain
from training.commands.finetune import finetune
from training.config import strict
from training.config.stages import ContrastiveConfig, DegConfig, PretrainConfig, SplitConfig
from training.data.shards import Corpus
from training.data.splits import divide, load_splits, make_splits
from training.loop.journal import read_log
from training.loop.process import Process
from training.objectives.contrastive import ContrastiveTask
from training.objectives.masked import MaskedTask

ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))


def run_pretraining(folder: Path, **loop: Any) -> Path:
    config = strict.parse(PretrainConfig, pretrain_values(folder, **loop))
    path = pretrain.pretrain(config)
    assert path is not None
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    run_pretraining(folder, epochs=6)
    return folder


@pytest.fixture(scope="module")
def finetuned(pretrained: Path) -> Path:
    finetune(strict.parse(ContrastiveConfig, contrastive_values(pretrained, epochs=3)))
    return pretrained


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_log(folder / "log.jsonl") if name in line]


def test_pretraining_learns_and_writes_a_checkpoint_with_its_history(pretrained: Path) -> None:
    found = losses(pretrained / "pretrain")
    assert np.mean(found[-10:]) < np.mean(found[:5]) - 0.1
    assert found[0] == pytest.approx(np.log(len(VOCABULARY)), abs=0.5)
    checkpoint = load_checkpoint(pretrained / "pretrain" / "checkpoint")
    assert checkpoint.vocabulary.hash == VOCABULARY.hash
    made = checkpoint.provenance
    assert made["data"]["sources"][0]["kept"] == 130
    assert made["hyper_parameters"]["optimizer"]["base_lr"] == 5e-3
    assert made["result"]["peak_lr"] == 5e-3
    assert made["result"]["seconds"] > 0
    assert made["hardware"]["processes"] == 1
    assert "git_revision" in made["code"]
    assert (made["train_cells"], made["validation_cells"]) == (117, 13)
    metrics = json.loads((pretrained / "pretrain" / "metrics.json").read_text())
    last = metrics["validation"][-1]
    assert last["validation_perplexity"] == pytest.approx(np.exp(last["validation_loss"]))
    assert last["validation_loss"] < np.log(len(VOCABULARY))


def test_a_finished_run_is_not_overwritten_unasked(pretrained: Path) -> None:
    with pytest.raises(BundleError, match="run is complete"):
        run_pretraining(pretrained, epochs=6)


def test_the_same_seed_gives_the_same_losses(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        run_pretraining(tmp_path / name, seed=seed, max_steps=4, epochs=1)
    assert losses(tmp_path / "a" / "pretrain") == losses(tmp_path / "b" / "pretrain")
    assert losses(tmp_path / "a" / "pretrain") != losses(tmp_path / "c" / "pretrain")


def test_masks_change_every_epoch_and_validation_masks_do_not(pretrained: Path) -> None:
    config = strict.parse(PretrainConfig, pretrain_values(pretrained))
    task = MaskedTask(config, Corpus(config.corpus.path), ALONE)
    batch = task.batch(0, 0, 1)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.equal(task.batch(0, 0, 1)["labels"], batch["labels"])
    assert not torch.equal(task.batch(0, 0, 2)["labels"], batch["labels"])
    seen: list[torch.Tensor] = []

    def evaluate(batch: Any) -> torch.Tensor:
        seen.append(batch["labels"])
        return torch.tensor(1.5)

    assert task.validate(evaluate)["validation_loss"] == pytest.approx(1.5)
    first = list(seen)
    seen.clear()
    task.validate(evaluate)
    assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
    assert not set(task.train_cells.tolist()) & set(task.validation_cells.tolist())


def test_a_model_shorter_than_the_cells_is_refused(pretrained: Path) -> None:
    values = pretrain_values(pretrained)
    values["model"] = values["model"] | {"max_length": 20}
    with pytest.raises(InvalidParameterError, match="takes 20 tokens"):
        MaskedTask(strict.parse(PretrainConfig, values), Corpus(values["corpus"]["path"]), ALONE)


def test_finetuning_separates_and_leaves_the_last_block_alone(finetuned: Path) -> None:
    before = load_checkpoint(finetuned / "pretrain" / "checkpoint")
    after = load_checkpoint(finetuned / "contrastive" / "checkpoint")
    assert after.vocabulary.hash == before.vocabulary.hash
    assert after.family_config == before.family_config
    last = [name for name in before.weights if "layer.1." in name or name.startswith("cls")]
    trained = [name for name in before.weights if "layer.0." in name]
    assert last
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in last)
    assert not any(torch.equal(before.weights[name], after.weights[name]) for name in trained if "weight" in name)
    assert "last block" in after.provenance["untrained"]
    assert after.provenance["parent"]["objective"] == "masked language model"
    metrics = json.loads((finetuned / "contrastive" / "metrics.json").read_text())
    assert metrics["initial"]["distance_dissimilar_median"] > 0
    assert metrics["initial"]["embedding_norm_median"] > 0
    start, end = metrics["initial"], metrics["validation"][-1]
    assert end["validation_loss"] < start["validation_loss"]
    assert np.isfinite(end["validation_median_z"])


def test_a_model_with_start_and_end_tokens_is_fine_tuned_with_them(tmp_path: Path) -> None:
    vocabulary = small_vocabulary(ends=True)
    values = pretrain_values(tmp_path, epochs=1)
    (tmp_path / "genes.tsv").write_text(vocabulary.to_tsv())
    values["corpus"]["family_options"] = {"start": "<cls>", "end": "<eos>"}
    pretrain.pretrain(strict.parse(PretrainConfig, values))
    finetune(strict.parse(ContrastiveConfig, contrastive_values(tmp_path, epochs=1)))
    made = load_checkpoint(tmp_path / "contrastive" / "checkpoint")
    assert made.family_config == {"max_length": 40, "start": "<cls>", "end": "<eos>"}
    for cell in Corpus(tmp_path / "contrastive-corpus").cells(np.arange(5)):
        ids = cell["input_ids"].tolist()
        assert (ids[0], ids[-1], len(ids)) == (2, 3, 40)
        assert not {2, 3} & set(ids[1:-1])


def test_the_log_tells_both_kinds_apart_and_they_alternate(finetuned: Path) -> None:
    lines = [line for line in read_log(finetuned / "contrastive" / "log.jsonl") if "loss" in line]
    kinds = ["similar" if "loss_similar" in line else "dissimilar" for line in lines]
    assert kinds == ["dissimilar", "similar"] * (len(kinds) // 2)


def test_nothing_held_out_is_ever_in_a_batch(finetuned: Path) -> None:
    config = strict.parse(ContrastiveConfig, contrastive_values(finetuned))
    corpus = Corpus(config.corpus.path)
    stored = json.loads((finetuned / "contrastive" / "splits.json").read_text())
    splits = load_splits(finetuned / "contrastive" / "splits.json", fingerprint=stored["fingerprint"])
    assert splits is not None
    (split,) = splits
    assert split.targets == {
        "train": ["strong1", "strong2"],
        "validation": ["strong3"],
        "test": ["strong4"],
        "ineligible": ["weak"],
    }
    controls = {part: set(rows) for part, rows in split.controls.items()}
    assert [len(controls[part]) for part in ("train", "validation", "test")] == [30, 15, 15]
    assert not controls["train"] & controls["validation"] | controls["train"] & controls["test"]
    task = ContrastiveTask(config, corpus, splits, load_checkpoint(config.checkpoint), ALONE)
    labels, rows = corpus.labels("perturbation"), corpus.per_cell("row")
    for epoch in range(2):
        for batch in task._train.batches(epoch):
            used = np.concatenate([batch.first, batch.second])
            assert set(labels[used]) <= {"strong1", "strong2", "control"}
            assert set(rows[used[labels[used] == "control"]].tolist()) <= controls["train"]


def test_the_held_out_cells_are_a_file_ready_to_be_scored(finetuned: Path) -> None:
    heldout = anndata.read_h5ad(finetuned / "contrastive" / "heldout.h5ad")
    source = anndata.read_h5ad(finetuned / "perturbed.h5ad")
    assert set(heldout.obs["perturbation"]) == {"control", "strong4", "weak"}
    assert heldout.obs["split"].value_counts().to_dict() == {"control": 15, "test": 14, "ineligible": 14}
    same = source[heldout.obs_names]
    np.testing.assert_array_equal(heldout.X.toarray(), same.X.toarray())
    assert heldout.obs["batch"].tolist() == same.obs["batch"].tolist()
    facts = json.loads(heldout.uns["heldout"])
    assert facts["degs"]["strong4"] >= 5
    assert facts["degs"]["weak"] < 5


def test_ineligible_targets_can_be_left_out(pretrained: Path, tmp_path: Path) -> None:
    values = contrastive_values(pretrained, max_steps=1)
    values["output"] = str(tmp_path / "out")
    values["split"]["score_ineligible"] = False
    values["select"] = "best"
    finetune(strict.parse(ContrastiveConfig, values))
    heldout = anndata.read_h5ad(tmp_path / "out" / "heldout.h5ad")
    assert set(heldout.obs["perturbation"]) == {"control", "strong4"}


def test_two_data_sets_are_paired_apart(pretrained: Path, tmp_path: Path) -> None:
    values = contrastive_values(pretrained, max_steps=2)
    values["output"] = str(tmp_path / "out")
    values["corpus"]["path"] = str(tmp_path / "corpus")
    path = values["corpus"]["sources"][0]["path"]
    other = write_data_set(tmp_path / "other.h5ad", seed=1)
    values["corpus"]["sources"] = [{"path": path, "name": "one"}, {"path": str(other), "name": "two"}]
    finetune(strict.parse(ContrastiveConfig, values))
    assert (tmp_path / "out" / "heldout-one.h5ad").is_file()
    assert (tmp_path / "out" / "heldout-two.h5ad").is_file()
    config = strict.parse(ContrastiveConfig, values)
    corpus = Corpus(tmp_path / "corpus")
    stored = json.loads((tmp_path / "out" / "splits.json").read_text())
    splits = load_splits(tmp_path / "out" / "splits.json", fingerprint=stored["fingerprint"]) or []
    task = ContrastiveTask(config, corpus, splits, load_checkpoint(config.checkpoint), ALONE)
    source = corpus.per_cell("source")
    for batch in task._train.batches(0):
        assert len(set(source[np.concatenate([batch.first, batch.second])].tolist())) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split": {"validation": ["strong3"], "test": ["nobody"]}}, InvalidParameterError, "no perturbation 'nobody'"),
        ({"split": {"validation": ["weak"], "test": []}}, InvalidParameterError, "weak cannot be validated on"),
        ({"degs": {"min_degs": 61}, "split": {}}, TooFewCellsError, "left to train on"),
        ({"corpus": {"max_length": 41}}, InvalidParameterError, "takes 40 tokens"),
        ({"corpus": {"sources": [{"control": "NT"}]}}, ControlLabelMissingError, "no cell has the label 'NT'"),
        ({"loop": {"micro_batch": 2}}, InvalidParameterError, "at least 3 are needed"),
    ],
    ids=["unknown target", "weak validation target", "nothing to train on", "too long", "no controls", "small batch"],
)
def test_bad_configurations_are_refused(
    pretrained: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    values = contrastive_values(pretrained)
    values["output"] = str(tmp_path / "out")
    values["corpus"]["path"] = str(tmp_path / "corpus")
    for section, replaced in change.items():
        if section == "corpus" and "sources" in replaced:
            values["corpus"]["sources"][0] |= replaced["sources"][0]
        elif section == "split":
            values["split"] = replaced
        else:
            values[section] |= replaced
    with pytest.raises(error, match=message):
        finetune(strict.parse(ContrastiveConfig, values))


def test_targets_are_split_by_shares_and_seed() -> None:
    names = [f"g{number}" for number in range(50)]
    parts = divide(names, set(names), SplitConfig())
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [40, 5, 5]
    assert parts["train"] | parts["validation"] | parts["test"] == set(names)
    assert divide(names, set(names), SplitConfig()) == parts
    assert divide(names, set(names), SplitConfig(seed=1)) != parts


def test_weak_targets_are_not_eligible_whatever_the_number_of_passes(
    finetuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = strict.parse(ContrastiveConfig, contrastive_values(finetuned))
    corpus = Corpus(config.corpus.path)
    arguments = (corpus, config.corpus.sources, DegConfig(min_degs=5), config.split)
    (whole,) = make_splits(*arguments)
    monkeypatch.setattr("training.data.splits._VALUES_AT_ONCE", 500)
    (parts,) = make_splits(*arguments)
    assert parts == whole
    assert set(whole.degs) == set(TARGETS)
    assert whole.degs["weak"] < 5 <= min(count for name, count in whole.degs.items() if name != "weak")


@pytest.mark.parametrize("stage", ["pretrain", "contrastive"])
def test_the_commands_report_errors_with_a_status(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = {"pretrain": pretrain.main, "contrastive": finetune_command.main}[stage]
    values = {"pretrain": pretrain_values, "contrastive": contrastive_values}[stage](tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main([str(path), "--set", "loop.epoch=1"]) == 2
    assert "error [invalid_parameter]" in capsys.readouterr().err
    if stage == "contrastive":
        assert main([str(path)]) == 1
        assert "error [corrupt_bundle]" in capsys.readouterr().err
    else:
        assert main([str(path), "--set", "loop.max_steps=3"]) == 0
        assert (tmp_path / "pretrain" / "checkpoint" / "config.json").is_file()
        assert main([str(path), "--set", "loop.max_steps=3"]) == 1
        assert main([str(path), "--set", "loop.max_steps=3", "--overwrite"]) == 0
