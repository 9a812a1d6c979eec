"""Runs that are stopped, damaged, extended or not finite: nothing that was good is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perturbscope.errors import InvalidParameterError, UnreadableFileError
from tests.unit.training.loop.test_loop import ALONE, OPTIMIZER, Line, LineTask, losses, run
from training.config.stages import LoopConfig
from training.errors import NonFiniteLossError, NotWrittenError, StoppedError
from training.loop.journal import read_log
from training.loop.loop import train


class SteepLine(Line):
    """A line whose loss is finite and whose gradient is not, where an input is poisoned."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        loss: Tensor = super().forward(x.nan_to_num(), attention_mask)
        # The root of 0 is finite, and its gradient infinite.
        return loss + (self.layer.weight.square().sum() * 0).sqrt() if bool(x.isnan().any()) else loss


class SteepTask(LineTask):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model = self.module = SteepLine()


@pytest.mark.parametrize("poison", [7, 10, 11], ids=["between states", "at a state", "at the last step"])
def test_a_gradient_that_is_not_finite_changes_no_weight_and_is_not_saved(tmp_path: Path, poison: int) -> None:
    with pytest.raises(NonFiniteLossError, match=rf"gradient of step {poison + 1} has the norm nan .* newest state is"):
        run(tmp_path, task=SteepTask(poison=poison), checkpoint_every=1)
    newest = max((tmp_path / "states").iterdir())
    assert newest.name == f"step-{poison:09d}"
    state = torch.load(newest / "state.pt", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in state["module"].values())
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text
    assert len(losses(tmp_path)) == poison


def test_the_first_state_says_that_there_is_none_before(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="it had not saved a state yet"):
        run(tmp_path, task=SteepTask(poison=0))


def damage(state: Path, how: str) -> None:
    if how == "position":
        (state / "position.json").write_text("{")
        return
    path = state / "state.pt"
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-100])
    else:
        path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])


@pytest.mark.parametrize("how", ["position", "missing", "truncated", "changed"])
def test_a_damaged_state_falls_back_to_the_one_before(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole", checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", task=LineTask(stop=10), checkpoint_every=4)
    damage(tmp_path / "cut/states/step-000000008", how)
    resumed = run(tmp_path / "cut", checkpoint_every=4)
    assert "step-000000008isdamaged" in "".join(capsys.readouterr().err.split())  # paths are long, and lines broken
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


def test_if_all_states_are_damaged_it_says_so(tmp_path: Path) -> None:
    run(tmp_path)
    damage(tmp_path / "states/step-000000012", "truncated")
    with pytest.raises(UnreadableFileError, match=r"All 1 states in .* are damaged. Start anew with --overwrite"):
        run(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_exactly(tmp_path: Path, number: int) -> None:
    class Killed(LineTask):
        def batch(self, epoch: int, index: int, seed: int) -> dict[str, Tensor]:
            if epoch * self.batches_per_epoch + index == 7:
                os.kill(os.getpid(), number)
            return super().batch(epoch, index, seed)

    before = signal.getsignal(number)
    whole = run(tmp_path / "whole", checkpoint_every=100)
    with pytest.raises(StoppedError, match=r"stopped after step (7|8) of 12, whose state is saved") as caught:
        run(tmp_path / "cut", task=Killed(), checkpoint_every=100)
    assert caught.value.number == number
    assert signal.getsignal(number) is before
    resumed = run(tmp_path / "cut", checkpoint_every=100)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert resumed.validation == whole.validation


def test_a_disk_that_takes_no_state_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, task=LineTask(stop=7))

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #0: c10")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(NotWrittenError) as caught:
        run(tmp_path)
    assert "state of step 10 could not be written" in caught.value.message
    assert "its newest state is" in caught.value.message
    assert "\n" not in caught.value.message
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["step-000000005"]


def extended(folder: Path, epochs: int, **identity: Any) -> Any:
    loop = LoopConfig(epochs=epochs, micro_batch=4, device="cpu", checkpoint_every=5)
    values = {"loop": {"epochs": epochs, "max_steps": None}, **identity}
    names = frozenset({"loop.epochs", "loop.max_steps"})
    return train(LineTask(), loop, OPTIMIZER, ALONE, output=folder, identity=values, may_differ=names)


def test_a_run_can_be_extended_on_purpose(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", epochs=4)
    extended(tmp_path / "parts", 2)
    longer = extended(tmp_path / "parts", 4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(longer.weights[name], tensor) for name, tensor in whole.weights.items())
    facts = json.loads((tmp_path / "parts/states/step-000000024/position.json").read_text())
    assert facts["position"]["extended"] == [{"step": 12, "changed": {"loop.epochs": [2, 4]}}]
    with pytest.raises(InvalidParameterError, match='other data: mask was not set, is "x"'):
        extended(tmp_path / "parts", 4, mask="x")
    with pytest.raises(InvalidParameterError, match="has done 24 steps, and this configuration has 6"):
        extended(tmp_path / "parts", 1)


def test_a_line_tells_progress_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 12))
    monkeypatch.setattr("training.loop.journal.time.monotonic", lambda: next(clock))
    run(tmp_path)
    printed = " ".join(capsys.readouterr().err.split())
    assert "step 4 of 12: loss " in printed
    assert "tokens/s, 0:01:36 left" in printed
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line] == list(range(1, 13))
