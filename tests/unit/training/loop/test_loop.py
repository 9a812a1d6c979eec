from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perturbscope.errors import InvalidParameterError, ProviderUnavailableError, UnreadableFileError
from training.config.stages import LoopConfig, OptimizerConfig
from training.errors import NonFiniteLossError
from training.loop.engine import deepspeed_config
from training.loop.journal import draw_curve, read_log
from training.loop.loop import Evaluate, Outcome, derive_seed, plan_steps, train
from training.loop.optimizer import check_warmup, learning_rate, make_optimizer
from training.loop.process import Process, join

ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))


class Line(nn.Module):
    """A linear fit with dropout, so that the global generator of torch matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.norm = nn.LayerNorm(1)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        value: Tensor = (self.layer(nn.functional.dropout(x, 0.3, self.training)) - 2.0).square().mean()
        return value + 0 * self.norm.bias.sum()


class LineTask:
    name = "line"

    def __init__(self, *, n: int = 6, poison: int | None = None, stop: int | None = None) -> None:
        self.model: nn.Module = Line()
        self.module = self.model
        self.batches_per_epoch = n
        self._poison = poison
        self._stop = stop

    def batch(self, epoch: int, index: int, seed: int) -> dict[str, Tensor]:
        number = epoch * self.batches_per_epoch + index
        if number == self._stop:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        if number == self._poison:
            x[0, 0] = math.nan
        return {"x": x, "attention_mask": torch.ones(4, 3, dtype=torch.int64)}

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["x"])

    def kind(self, epoch: int, index: int) -> str:
        return "odd" if index % 2 else "even"

    def begin(self, evaluate: Evaluate) -> dict[str, float]:
        return {"start": 1.0}

    def validate(self, evaluate: Evaluate) -> dict[str, float]:
        with_dropout_off = evaluate(self.batch(0, 0, 7))
        return {"validation_loss": float(with_dropout_off)}


OPTIMIZER = OptimizerConfig(base_lr=0.05, schedule="constant", clip=0.0)


def run(folder: Path, *, optimizer: OptimizerConfig = OPTIMIZER, best: bool = False, **options: Any) -> Outcome:
    task = options.pop("task", None) or LineTask()
    values: dict[str, Any] = {"epochs": 2, "micro_batch": 4, "device": "cpu", "checkpoint_every": 5, **options}
    loop = LoopConfig(**values)
    return train(task, loop, optimizer, ALONE, output=folder, identity={"name": "line"}, select_best=best)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


def test_a_run_learns_and_logs_every_step(tmp_path: Path) -> None:
    outcome = run(tmp_path, epochs=10)
    assert (outcome.steps, outcome.tokens) == (60, 60 * 12)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] / 2
    first = read_log(tmp_path / "log.jsonl")[1]
    assert {"step", "epoch", "loss", "loss_even", "lr", "grad_norm", "tokens", "cells", "seconds"} <= set(first)
    assert (first["step"], first["tokens"], first["cells"]) == (1, 12, 4)
    assert outcome.initial == {"start": 1.0}
    assert [check["step"] for check in outcome.validation] == [6, 12, 18, 24, 30, 36, 42, 48, 54, 60]
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["step-000000060"]
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("stop", [1, 5, 6, 10])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, stop: int, accumulation: int) -> None:
    options: dict[str, Any] = {"checkpoint_every": 2, "validate_every": 3, "accumulation": accumulation}
    whole = run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", task=LineTask(stop=stop), **options)
    resumed = run(tmp_path / "cut", **options)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert resumed.validation == whole.validation
    assert resumed.tokens == whole.tokens
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor)


def test_a_half_written_state_is_ignored(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, task=LineTask(stop=9))
    (tmp_path / "states" / ".step-000000007").mkdir()
    (tmp_path / "states" / "step-000000009").mkdir()  # no position: nothing was renamed here
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    assert run(tmp_path).steps == 12
    assert len(losses(tmp_path)) == 12


def test_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert second.final_loss == first.final_loss
    assert all(torch.equal(second.weights[name], tensor) for name, tensor in first.weights.items())


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    loop = LoopConfig(epochs=2, micro_batch=4, device="cpu")
    with pytest.raises(
        InvalidParameterError, match=r'another configuration or other data: name was "line", is "other"\.'
    ):
        train(LineTask(), loop, OPTIMIZER, ALONE, output=tmp_path, identity={"name": "other"})
    path = tmp_path / "states" / "step-000000012" / "position.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"world_size": 2}))
    with pytest.raises(InvalidParameterError, match="written by 2 processes"):
        run(tmp_path)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"loss of step 8 is nan .*Lower optimizer\.base_lr") as caught:
        run(tmp_path, task=LineTask(poison=7))
    assert caught.value.code == "non_finite_loss"
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["step-000000005"]


def test_the_best_weights_can_be_selected(tmp_path: Path) -> None:
    rising = OptimizerConfig(base_lr=3.0, schedule="constant", clip=0.0)
    last = run(tmp_path / "last", optimizer=rising, validate_every=1)
    best = run(tmp_path / "best", optimizer=rising, validate_every=1, best=True)
    lowest = min(best.validation, key=lambda check: check["validation_loss"])
    assert best.selected_step == lowest["step"] != last.selected_step == 12
    model = Line().eval()
    model.load_state_dict(best.weights)
    task = LineTask()
    measured = float(model(**task.batch(0, 0, 7)).detach())
    assert measured == pytest.approx(lowest["validation_loss"], rel=1e-5)


def test_accumulated_micro_batches_equal_one_large_batch() -> None:
    task = LineTask()
    task.module.eval()
    batches = [task.batch(0, index, index) for index in range(2)]
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    from training.loop.engine import PlainEngine

    weights = []
    for parts in (batches, [joined]):
        module = Line()
        loop = LoopConfig(epochs=1, micro_batch=4, accumulation=len(parts), device="cpu")
        engine = PlainEngine(module, loop, OPTIMIZER, torch.device("cpu"))
        module.eval()
        for number, batch in enumerate(parts):
            engine.micro_step(batch, lr=0.1, last=number == len(parts) - 1)
        weights.append(engine.weights(module)["layer.weight"].clone())
    torch.testing.assert_close(weights[0], weights[1])


def test_clipping_limits_the_gradient_and_reports_it_unclipped() -> None:
    from training.loop.engine import PlainEngine

    module = Line().eval()
    loop = LoopConfig(epochs=1, micro_batch=4, device="cpu")
    engine = PlainEngine(module, loop, OptimizerConfig(base_lr=1.0, clip=1e-3), torch.device("cpu"))
    engine.micro_step(LineTask().batch(0, 0, 0), lr=0.1, last=True)
    assert engine.grad_norm > 1e-3


def test_bf16_runs_on_a_cpu(tmp_path: Path) -> None:
    run(tmp_path, precision="bf16")
    exact = losses(tmp_path)
    assert all(math.isfinite(loss) for loss in exact)


def test_learning_rate_rises_and_falls_linearly() -> None:
    config = OptimizerConfig(base_lr=1e-3, warmup_steps=4)
    rates = [learning_rate(step, config=config, total_steps=12, world_size=1) for step in range(12)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:] == pytest.approx([1e-3 * (12 - step) / 8 for step in range(4, 12)])
    flat = OptimizerConfig(base_lr=1e-3, schedule="constant")
    assert learning_rate(11, config=flat, total_steps=12, world_size=4) == 1e-3
    scaled = OptimizerConfig(base_lr=1e-3, lr_scale_by_world_size=True, warmup_steps=1)
    assert learning_rate(0, config=scaled, total_steps=12, world_size=4) == 4e-3


def test_a_warm_up_must_end() -> None:
    with pytest.raises(InvalidParameterError, match="warmup_steps is 12, but the run has 12"):
        check_warmup(OptimizerConfig(base_lr=1e-3, warmup_steps=12), 12)


def test_steps_are_planned_from_data_epochs_and_accumulation() -> None:
    def plan(n: int, **options: int) -> int:
        return plan_steps(n, LoopConfig(**{"epochs": 1, "micro_batch": 1, **options}))

    assert plan(10) == 10
    assert plan(11, accumulation=2, epochs=3) == 16
    assert plan(11, max_steps=4) == 4
    with pytest.raises(InvalidParameterError, match="make no optimiser step"):
        plan(3, accumulation=4)


def test_biases_and_layer_normalisation_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, plain = make_optimizer(model, OptimizerConfig(base_lr=1.0, weight_decay=0.1)).param_groups
    assert ([item.shape for item in decayed["params"]], decayed["weight_decay"]) == ([(4, 3)], 0.1)
    assert ([item.dim() for item in plain["params"]], plain["weight_decay"]) == ([1, 1, 1], 0.0)


def test_seeds_differ_with_every_part() -> None:
    seeds = {derive_seed(a, b, c) for a in range(3) for b in range(3) for c in range(50)}
    assert len(seeds) == 450
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)


@pytest.fixture
def json_file(tmp_path: Path) -> Path:
    return tmp_path / "ds.json"


def test_deepspeed_values_come_from_the_yaml_file(json_file: Path) -> None:
    loop = LoopConfig(epochs=1, micro_batch=7, accumulation=3, precision="bf16", deepspeed=str(json_file))
    json_file.write_text(
        '{"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}'
    )
    values = deepspeed_config(loop, OPTIMIZER)
    assert values["train_micro_batch_size_per_gpu"] == 7
    assert values["gradient_accumulation_steps"] == 3
    assert (values["bf16"], values["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert values["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gradient_accumulation_steps": 5}', "gradient_accumulation_steps 5, the YAML file says 3"),
        ('{"bf16": {"enabled": true}}', "bf16.enabled True"),
        ('{"optimizer": {"type": "Adam"}}', "sets 'optimizer'"),
    ],
)
def test_deepspeed_values_that_contradict_it_are_refused(json_file: Path, text: str, message: str) -> None:
    json_file.write_text(text)
    loop = LoopConfig(epochs=1, micro_batch=7, accumulation=3, deepspeed=str(json_file))
    with pytest.raises(InvalidParameterError, match=message):
        deepspeed_config(loop, OPTIMIZER)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_deepspeed_file_that_cannot_be_read_is_named(json_file: Path, text: str | None) -> None:
    if text is not None:
        json_file.write_text(text)
    with pytest.raises(UnreadableFileError, match=r"ds\.json cannot be read"):
        deepspeed_config(LoopConfig(epochs=1, micro_batch=7, deepspeed=str(json_file)), OPTIMIZER)


def test_several_processes_need_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InvalidParameterError, match="names no DeepSpeed JSON file"):
        join(LoopConfig(epochs=1, micro_batch=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ProviderUnavailableError, match="finds no CUDA device"):
        join(LoopConfig(epochs=1, micro_batch=1, device="cuda"))
    with pytest.raises(InvalidParameterError, match="fp16 needs a CUDA device"):
        join(LoopConfig(epochs=1, micro_batch=1, device="auto", precision="fp16"))


def test_a_curve_of_an_empty_log_can_be_drawn(tmp_path: Path) -> None:
    assert draw_curve(tmp_path / "none.jsonl", tmp_path / "loss.png")
