"""A stage around the loop: what an earlier run left is kept until the new one is complete, and is used once."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from perturbscope.errors import BundleError, InvalidParameterError, PerturbScopeError
from tests.training_data import contrastive_values, pretrain_values
from training.checkpoint import load_checkpoint
from training.commands.finetune import finetune
from training.commands.pretrain import pretrain
from training.config import strict
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.loop.stage import PREVIOUS, Again

OVERWRITE, EXTEND = Again(overwrite=True), Again(extend=True)


def pretrained(values: dict[str, Any], again: Again = Again()) -> Path | None:  # noqa: B008
    return pretrain(strict.parse(PretrainConfig, values), again=again)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete pre-training of four steps."""
    folder = tmp_path_factory.mktemp("done")
    pretrained(pretrain_values(folder, max_steps=4))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": {"layers": 2, "hidden": 16, "heads": 3}},
        {"model": {"layers": 2, "hidden": 16, "heads": 2, "max_length": 20}},
        {"optimizer": {"base_lr": 1e-3, "warmup_steps": 100}},
        {"loop": {"deepspeed": "nowhere.json"}},
        {"loop": {"accumulation": 1000}},
        {"corpus": {"sources": [{"path": "nowhere.h5ad"}]}},
        {"corpus": {"vocabulary": "nowhere.tsv"}},
    ],
    ids=str,
)
def test_a_wrong_option_with_overwrite_loses_nothing(done: Path, wrong: dict[str, dict[str, Any]]) -> None:
    values = pretrain_values(done, max_steps=4)
    for section, options in wrong.items():
        values[section] = {**values[section], **options}
    before = content(done)
    with pytest.raises(PerturbScopeError):
        pretrained(values, OVERWRITE)
    assert content(done) == before


def test_the_earlier_run_is_kept_until_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = pretrain_values(tmp_path, max_steps=3)
    output = tmp_path / "pretrain"
    pretrained(values)
    first = content(output)
    built = (tmp_path / "corpus/manifest.json").stat()
    other = {**values, "optimizer": {"base_lr": 1e-3, "warmup_steps": 1}}

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("training.loop.stage.train", "training.loop.stage.save_checkpoint"):
        with monkeypatch.context() as patched:
            patched.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                pretrained(other, OVERWRITE)
        assert content(output / PREVIOUS) == first
    pretrained(other)
    assert not (output / PREVIOUS).exists()
    assert load_checkpoint(output / "checkpoint").provenance["hyper_parameters"]["optimizer"]["base_lr"] == 1e-3
    after = (tmp_path / "corpus/manifest.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (built.st_ino, built.st_mtime_ns)


def test_a_run_is_for_one_command_at_a_time(done: Path) -> None:
    with (done / "pretrain/.lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InvalidParameterError, match=r"Another run \(process \d+ on .*\) is training into"):
            pretrained(pretrain_values(done, max_steps=4), OVERWRITE)


def test_a_complete_run_is_extended_or_says_how(done: Path, tmp_path: Path) -> None:
    values = pretrain_values(tmp_path, max_steps=4)
    values["optimizer"] = {**values["optimizer"], "schedule": "constant"}
    longer = {**values, "loop": {**values["loop"], "max_steps": 6, "checkpoint_every": 1, "threads": None}}
    pretrained(values)
    with pytest.raises(BundleError, match=r"--overwrite, train longer with --extend"):
        pretrained(longer)
    pretrained(longer, EXTEND)
    metrics = json.loads((tmp_path / "pretrain/metrics.json").read_text())
    assert metrics["steps"] == 6
    whole = {**longer, "output": str(tmp_path / "whole")}
    pretrained(whole)
    logs = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("pretrain", "whole")
    ]
    assert [loss for loss in logs[0] if loss] == [loss for loss in logs[1] if loss]


@pytest.mark.parametrize("missing", ["checkpoint", "heldout.h5ad", "metrics.json"])
def test_the_same_command_writes_what_is_missing(tmp_path: Path, missing: str) -> None:
    pretrained(pretrain_values(tmp_path, max_steps=3))
    config = strict.parse(ContrastiveConfig, contrastive_values(tmp_path, max_steps=3))
    output = tmp_path / "contrastive"
    finetune(config)
    weights = (output / "checkpoint/weights.safetensors").read_bytes()
    path = output / missing
    if path.is_dir():
        path.rename(tmp_path / "away")
    else:
        path.unlink()
    finetune(config)
    assert path.exists()
    assert (output / "checkpoint/weights.safetensors").read_bytes() == weights
    with pytest.raises(BundleError, match="the run is complete"):
        finetune(config)


def test_a_split_without_a_test_part_trains_to_the_end(tmp_path: Path) -> None:
    pretrained(pretrain_values(tmp_path, max_steps=3))
    values = contrastive_values(tmp_path, max_steps=3)
    values["split"] = {
        "control_fractions": [0.8, 0.2, 0.0], "validation": ["strong3"], "test": [], "score_ineligible": False,
    }  # fmt: skip
    config = strict.parse(ContrastiveConfig, values)
    assert finetune(config) is not None
    assert not (tmp_path / "contrastive/heldout.h5ad").exists()
    with pytest.raises(BundleError, match="the run is complete"):
        finetune(config)
