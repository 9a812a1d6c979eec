from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from perturbscope.errors import InvalidParameterError, UnreadableFileError
from tests.training_data import MODEL, VOCABULARY, contrastive_values, pretrain_values
from training.commands import cost as command
from training.config import strict
from training.config.stages import ContrastiveConfig, LossConfig, PretrainConfig
from training.data.corpus import build_corpus
from training.families.rank import masking
from training.families.rank import model as rank
from training.families.rank.pooling import PooledEncoder
from training.measure.cost import HARDWARE, Speed, estimate, speed_of_log
from training.measure.flops import ModelSize, cell_cost, model_size
from training.measure.speed import measure
from training.objectives.losses import ContrastiveModule

PAPER = ModelSize()


def test_the_model_of_the_paper() -> None:
    full = cell_cost(PAPER, 2048)
    assert full.linear == pytest.approx(12.9e9, rel=0.01)
    assert full.attention == pytest.approx(25.8e9, rel=0.01)
    assert full.forward == pytest.approx(38.7e9, rel=0.01)
    assert cell_cost(PAPER, 2048, layers=5).forward == pytest.approx(32.2e9, rel=0.01)
    assert cell_cost(PAPER, 2048, masked_share=0.15).training == pytest.approx(128e9, rel=0.01)
    assert cell_cost(PAPER, 2048, masked_share=1.0).training == pytest.approx(197e9, rel=0.01)
    assert cell_cost(PAPER, 1024).forward == pytest.approx(full.forward / 3, rel=0.01)


def test_lengths_are_averaged_and_attention_by_their_squares() -> None:
    found = cell_cost(PAPER, np.array([100, 300]), masked_share=0.1)
    apart = [cell_cost(PAPER, length, masked_share=0.1) for length in (100, 300)]
    for part in ("linear", "attention", "head"):
        assert getattr(found, part) == pytest.approx(sum(getattr(one, part) for one in apart) / 2)


@pytest.mark.parametrize("stage", ["pretraining", "fine-tuning"])
def test_the_formulas_are_what_torch_counts(stage: str) -> None:
    options = {"layers": 3, "hidden": 32, "heads": 2, "feed_forward": 48, "max_length": 40, "attention": "eager"}
    model = rank.build_model(rank.parse_config(options), VOCABULARY)
    size = ModelSize(layers=3, hidden=32, feed_forward=48, vocabulary=len(VOCABULARY))
    cells = {"input_ids": torch.randint(2, 60, (4, 40)), "attention_mask": torch.ones(4, 40, dtype=torch.int64)}
    if stage == "pretraining":
        labels = torch.full((4, 40), masking.IGNORED)
        labels[:, :10] = 7
        stepped: Any = masking.MaskedLM(model)
        cells["labels"] = labels
        expected = cell_cost(size, 40, masked_share=0.25)
    else:
        stepped = ContrastiveModule(PooledEncoder(model), LossConfig())
        cells["similar"] = torch.zeros(2)
        expected = cell_cost(size, 40, layers=2)
    with FlopCounterMode(display=False) as counter:
        loss = stepped(**cells)
    assert counter.get_total_flops() == pytest.approx(4 * expected.forward)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == pytest.approx(4 * (expected.training - expected.forward))


def config(folder: Path) -> PretrainConfig:
    return strict.parse(PretrainConfig, pretrain_values(folder))


def test_the_published_week_comes_out(tmp_path: Path) -> None:
    values = pretrain_values(tmp_path, epochs=3)
    values["model"] = {}
    values["corpus"] |= {"max_length": 2048, "vocabulary": "geneformer_gc30m"}
    paper = strict.parse(PretrainConfig, values)
    found = estimate(paper, hardware=HARDWARE["a10g"], devices=4, cells=33_000_000)
    (speed,) = found.speeds
    assert found.hours(speed) == pytest.approx(7 * 24)
    assert speed.cells_per_second / 4 == pytest.approx(41, abs=0.5)
    assert "7.5% of peak" in speed.origin
    assert "upper bound" in found.origin
    slow, fast = estimate(paper, hardware=HARDWARE["h100"], cells=33_000_000, length=1024).speeds
    assert slow.origin.startswith("assumed")
    assert fast.cells_per_second / slow.cells_per_second == pytest.approx(0.25 / 0.075)


def test_a_built_corpus_gives_cells_and_lengths(tmp_path: Path) -> None:
    plain = config(tmp_path)
    corpus = build_corpus(plain.corpus)
    given = Speed(cells_per_second=10.0, origin="measured: so")
    found = estimate(plain, measured=given)
    assert found.passes == 117 * 2
    assert found.hours(given) == pytest.approx(117 * 2 / 10 / 3600)
    size = ModelSize(layers=2, hidden=16, feed_forward=24, vocabulary=62)
    assert found.cost == cell_cost(size, corpus.lengths, masked_share=0.15)
    assert estimate(plain, measured=given, length=7).cost == cell_cost(size, 7, masked_share=0.15)


def test_fine_tuning_counts_four_passes_of_each_trained_cell(tmp_path: Path) -> None:
    build_corpus(config(tmp_path).corpus)
    values = contrastive_values(tmp_path, epochs=3)
    values["corpus"] |= {"path": str(tmp_path / "corpus"), "vocabulary": str(tmp_path / "genes.tsv")}
    fine = strict.parse(ContrastiveConfig, values)
    with pytest.raises(InvalidParameterError, match=r"no splits\.json yet"):
        estimate(fine, hardware=HARDWARE["t4"])
    Path(fine.output).mkdir()
    targets = {"targets": {"train": ["strong1", "strong2"]}}
    Path(fine.output, "splits.json").write_text(json.dumps({"data_sets": [targets]}))
    found = estimate(fine, hardware=HARDWARE["h100"])
    assert found.passes == 2 * 14 * 4 * 3
    paper = estimate(fine, hardware=HARDWARE["t4"], cells=246_560)
    assert paper.hours(paper.speeds[0]) == pytest.approx(7 * 24 * 3 / 10)  # three epochs, not ten


def test_a_log_is_a_measurement(tmp_path: Path) -> None:
    lines = [{"step": n, "loss": 1.0, "cells": 88, "seconds": 10.0 if n <= 3 else 0.5} for n in range(1, 9)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 8, "validation_loss": 1.0}])
    (tmp_path / "log.jsonl").write_text(text)
    found = speed_of_log(tmp_path / "log.jsonl")
    assert found.cells_per_second == 176.0
    assert "5 steps" in found.origin
    with pytest.raises(UnreadableFileError, match="no more than 3 steps"):
        speed_of_log(tmp_path / "none.jsonl")


@pytest.mark.parametrize("stage", ["pretrain", "contrastive"])
def test_a_measurement_is_a_share_of_what_the_machine_can_do(tmp_path: Path, stage: str) -> None:
    values = pretrain_values(tmp_path)
    read: Any = config(tmp_path)
    if stage == "contrastive":
        values = contrastive_values(tmp_path)
        values["corpus"]["vocabulary"] = str(tmp_path / "genes.tsv")
        read = strict.parse(ContrastiveConfig, values)
    found = measure(read, steps=3, length=20)
    assert found.cells_per_second > 0
    said = re.fullmatch(
        r"measured: 3 steps of (\d+) cells x 20 tokens on CPU.*, fp32; ([\d.]+)% of the .* TFLOP/s", found.origin
    )
    assert said is not None
    assert int(said[1]) == (8 if stage == "pretrain" else 10)
    assert 0 < float(said[2]) < 100
    assert "times 4 devices (assumed" in measure(read, steps=1, length=20, devices=4).origin


def test_the_command_prints_where_each_number_is_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(pretrain_values(tmp_path)))
    assert command.main([str(path), "--hardware", "a10g"]) == 2
    assert "is not built yet. Give --cells" in capsys.readouterr().err
    assert command.main([str(path), "--cells", "1000"]) == 2
    assert "How fast is it?" in capsys.readouterr().err
    assert command.main([str(path), "--cells", "0", "--hardware", "t4"]) == 2
    assert "must be above 0" in capsys.readouterr().err
    assert command.main([str(path), "--cells", "3600", "--gpus", "2", "--throughput", "1"]) == 0
    shown = capsys.readouterr().out
    assert "2.0 h" in shown
    assert "measured: given with --throughput" in shown
    assert command.main([str(path), "--cells", "100", "--measure", "1"]) == 0
    assert re.search(r"measured: 1 steps of 8 cells x 40 tokens on \w+", capsys.readouterr().out)
    assert MODEL["layers"] == model_size(config(tmp_path)).layers
