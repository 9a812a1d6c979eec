"""Fine-tuning on mixed batches, on a synthetic data set of 60 genes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

from perturbscope.errors import InvalidParameterError, TooFewCellsError
from tests.training_data import contrastive_values, data_set, pretrain_values
from training.checkpoint import load_checkpoint
from training.commands import pretrain
from training.commands.finetune import finetune
from training.config import strict
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.data.shards import Corpus
from training.data.splits import make_splits
from training.loop.journal import read_log
from training.loop.process import Process
from training.objectives.mixed import MixedTask, make_pools
from training.objectives.mixed_sampler import UNLABELLED, MixedSampler, Pool

ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model, a data set with two contexts, and a file without perturbations."""
    folder = tmp_path_factory.mktemp("mixed")
    values = pretrain_values(folder, epochs=1)
    pretrain.pretrain(strict.parse(PretrainConfig, values))
    whole = data_set(cells_per_target=40, controls=120, seed=1)
    whole.obs["state"] = np.where(np.arange(whole.n_obs) % 2, "on", "off")
    whole.write_h5ad(folder / "perturbed.h5ad")
    plain = data_set(seed=2)
    del plain.obs["perturbation"]
    plain.write_h5ad(folder / "plain.h5ad")
    return folder


def values_of(folder: Path, **mixed: Any) -> dict[str, Any]:
    values = contrastive_values(folder, epochs=4, micro_batch=16)
    values["corpus"]["sources"] = [
        {"path": str(folder / "perturbed.h5ad"), "context_key": "state"},
        {"path": str(folder / "plain.h5ad"), "unlabelled": True},
    ]
    values["optimizer"] = {"base_lr": 3e-3}
    values["mixed"] = {"geometry": 1.0, "expression": {"components": 10}, **mixed}
    return values


@pytest.fixture(scope="module")
def finetuned(folder: Path) -> Path:
    values = values_of(
        folder,
        margin_contrastive=0.1,
        supervised_contrastive=0.1,
        cross_entropy=0.1,
        info_nce=0.1,
        panel={"share": 0.5, "genes": [0.3, 1.0]},
    )
    assert finetune(strict.parse(ContrastiveConfig, values)) is not None
    return folder


def task_of(folder: Path, values: Mapping[str, Any]) -> tuple[MixedTask, Corpus, ContrastiveConfig]:
    config = strict.parse(ContrastiveConfig, values)
    corpus = Corpus(config.corpus.path)
    splits = make_splits(corpus, config.corpus.sources, config.degs, config.split)
    return MixedTask(config, corpus, splits, load_checkpoint(config.checkpoint), ALONE), corpus, config


def test_the_loss_falls_and_the_log_tells_data_sets_apart(finetuned: Path) -> None:
    log = read_log(finetuned / "contrastive" / "log.jsonl")
    assert any("loss_perturbed" in line for line in log)
    assert any("loss_plain" in line for line in log)
    measured = [line for line in log if "validation_loss" in line]
    assert measured[-1]["validation_loss"] < measured[0]["validation_loss"] - 0.1
    assert "validation_median_z" in measured[-1]


def test_only_labelled_data_sets_leave_held_out_cells(finetuned: Path) -> None:
    held = anndata.read_h5ad(finetuned / "contrastive" / "heldout.h5ad")
    assert set(held.obs["split"]) == {"test", "control", "ineligible"}
    assert "state" in held.obs
    assert not list((finetuned / "contrastive").glob("heldout-*.h5ad"))


def test_nothing_held_out_is_in_a_pool_and_classes_are_perturbations_in_a_context(finetuned: Path) -> None:
    values = values_of(finetuned)
    task, corpus, config = task_of(finetuned, values)
    splits = make_splits(corpus, config.corpus.sources, config.degs, config.split)
    (train, validation), (plain, none) = make_pools(config, corpus, splits)
    labels = corpus.labels("perturbation").astype(str)
    assert set(labels[train.cells]) == {*splits[0].targets["train"], "control"}
    assert {"strong3"} < set(labels[validation.cells]) <= {"strong3", "control"} if validation is not None else False
    rows = corpus.per_cell("row")
    controls = rows[train.cells[train.is_control]]
    assert set(controls) == set(splits[0].controls["train"])
    states = corpus.labels("state").astype(str)[train.cells]
    pairs = {(int(c), label, state) for c, label, state in zip(train.classes, labels[train.cells], states, strict=True)}
    assert len(pairs) == len({c for c, _, _ in pairs}) == 2 * (len(splits[0].targets["train"]) + 1)
    assert (plain.classes == UNLABELLED).all()
    assert not plain.is_control.any()
    assert none is None
    assert np.isfinite(train.geometry).all()
    batch = task.batch(0, 0, seed=1)
    assert {"classes", "contexts", "is_control", "geometry", "input_ids", "attention_mask"} == set(batch)


def test_a_batch_is_a_function_of_its_place_and_seed(finetuned: Path) -> None:
    first, _, _ = task_of(finetuned, values_of(finetuned, panel={"share": 1.0}))
    second, _, _ = task_of(finetuned, values_of(finetuned, panel={"share": 1.0}))
    for name, value in first.batch(1, 2, seed=9).items():
        assert torch.equal(value, second.batch(1, 2, seed=9)[name])
    assert not torch.equal(first.batch(1, 2, 9)["input_ids"], first.batch(1, 2, 10)["input_ids"])
    assert first.kind(1, 2) in {"perturbed", "plain"}


def pool(name: str, n: int) -> Pool:
    zeros = np.zeros(n, dtype=np.int64)
    return Pool(name, np.arange(n), zeros, zeros, zeros.astype(bool), np.zeros((n, 2), dtype=np.float32))


def test_the_sampler_uses_data_sets_by_weight_and_processes_share_a_block() -> None:
    pools = [pool("a", 100), pool("b", 40)]
    sampler = MixedSampler(pools, batch=5, weights={"b": 2.0}, world_size=2)
    ranks = [sampler.batches(3, rank=rank) for rank in range(2)]
    assert len(sampler) == len(ranks[0]) == len(ranks[1]) == 18
    used: dict[int, list[int]] = {0: [], 1: []}
    for (number, cells), (other, more) in zip(*ranks, strict=True):
        assert number == other
        assert len(cells) == len(more) == 5
        used[number] += [*cells.tolist(), *more.tolist()]
    assert sorted(used[0]) == list(range(100))
    assert sorted(used[1]) == sorted([*range(40), *range(40)])
    again = sampler.batches(4, rank=0)
    assert [cells.tolist() for _, cells in again] != [cells.tolist() for _, cells in ranks[0]]


def test_a_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(TooFewCellsError, match="few has 7 training cells"):
        MixedSampler([pool("few", 7)], batch=8)


def test_a_weight_for_an_unknown_data_set_is_refused(finetuned: Path) -> None:
    with pytest.raises(InvalidParameterError, match="names 'elsewhere'; the data sets are perturbed, plain"):
        task_of(finetuned, values_of(finetuned, weights={"elsewhere": 1.0}))


def test_the_controls_of_one_file_can_be_divided_by_shares_of_their_own(finetuned: Path) -> None:
    values = values_of(finetuned)
    values["corpus"]["sources"][0]["control_fractions"] = [0.0, 0.0, 1.0]
    config = strict.parse(ContrastiveConfig, values)
    splits = make_splits(Corpus(config.corpus.path), config.corpus.sources, config.degs, config.split)
    assert splits[0].controls["train"] == []
    assert len(splits[0].controls["test"]) == 120
