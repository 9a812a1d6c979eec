"""Training in real processes: killed and resumed, with DeepSpeed, on two processes.

``python -m``, torchrun and DeepSpeed's launcher are used once each; the other processes are forked from one that has
imported everything.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from tests.integration import pieces
from tests.integration.forked import Launcher, launcher
from tests.training_data import contrastive_values, pretrain_values
from training.checkpoint import load_checkpoint
from training.commands.finetune import finetune
from training.commands.pretrain import pretrain
from training.config import strict
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.loop.journal import read_log

ROOT = Path(__file__).resolve().parents[2]
ZERO = {stage: str(ROOT / "training" / "configs" / f"zero{stage}.json") for stage in (1, 2)}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
TIMEOUT = 180


def write(folder: Path, values: dict[str, Any], name: str = "config") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def forks() -> Iterator[Launcher]:
    with launcher(ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}) as found:
        yield found


Run = Callable[..., None]


@pytest.fixture(scope="module")
def run(forks: Launcher) -> Run:
    """Run a stage with a configuration."""

    def made(module: str, config: Path, processes: int = 1) -> None:
        forks.run(module, str(config), log=config.with_suffix(".log"), processes=processes, timeout=TIMEOUT)

    return made


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_log(folder / "log.jsonl") if name in line]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """A pre-training of 20 steps, plain torch, fp32."""
    folder = tmp_path_factory.mktemp("processes")
    run("training.commands.pretrain", write(folder, pretrain_values(folder, max_steps=20)))
    return folder


def test_deepspeed_gives_the_same_losses(base: Path, tmp_path: Path, run: Run) -> None:
    values = pretrain_values(base, max_steps=20, deepspeed=ZERO[1]) | {"output": str(tmp_path / "zero1")}
    run("training.commands.pretrain", write(tmp_path, values))
    plain, deepspeed = losses(base / "pretrain"), losses(tmp_path / "zero1")
    assert len(plain) == 20
    np.testing.assert_allclose(deepspeed, plain, atol=1e-3)
    before, after = (load_checkpoint(path / "checkpoint").weights for path in (base / "pretrain", tmp_path / "zero1"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_allclose(after[name].numpy(), tensor.numpy(), atol=1e-3)


def test_two_processes_learn_the_same_with_zero_1_and_2(base: Path, tmp_path: Path, run: Run) -> None:
    found = {}
    for stage in ZERO:
        output = tmp_path / f"zero{stage}"
        values = pretrain_values(base, max_steps=8, accumulation=2, deepspeed=ZERO[stage]) | {"output": str(output)}
        values["optimizer"] |= {"lr_scale_by_world_size": True}
        run("training.commands.pretrain", write(tmp_path, values), processes=2)
        found[stage] = losses(output)
        provenance = load_checkpoint(output / "checkpoint").provenance
        assert provenance["hardware"]["processes"] == 2
        assert provenance["result"]["peak_lr"] == pytest.approx(2 * values["optimizer"]["base_lr"])
    assert len(found[1]) == 8
    np.testing.assert_allclose(found[1], found[2], rtol=1e-4)
    assert found[1][-1] < found[1][0]


def test_finetuning_on_two_processes_equals_one_with_twice_the_batch(tmp_path: Path) -> None:
    values = pretrain_values(tmp_path, max_steps=5)
    values["model"] = values["model"] | {"dropout": 0.0, "attention_dropout": 0.0}
    pretrain(strict.parse(PretrainConfig, values))
    one = contrastive_values(tmp_path, max_steps=10, micro_batch=10) | {"output": str(tmp_path / "one")}
    finetune(strict.parse(ContrastiveConfig, one))
    two = contrastive_values(tmp_path, max_steps=10, deepspeed=ZERO[2]) | {"output": str(tmp_path / "two")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "training", "finetune", str(write(tmp_path, two))],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3)
    checks = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert checks[1]["validation"][-1] == pytest.approx(checks[0]["validation"][-1], rel=1e-2)
    assert (tmp_path / "two" / "heldout.h5ad").is_file()


def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path, forks: Launcher) -> None:
    """Cells have 1 to 40 genes, so micro-batches differ in their masked genes, each of which counts once."""
    cuts = {"88 x 1 x 1": "", "11 x 8 x 1": "", "11 x 2 x 4": ZERO[2]}
    found = {}
    for cut, engine in cuts.items():
        output, (micro_batch, accumulation, processes) = tmp_path / cut, cut.split(" x ")
        arguments = (str(output), micro_batch, accumulation, engine, "-1")
        if engine:
            forks.run("tests.integration.pieces", *arguments, log=tmp_path / "log", processes=int(processes))
        else:
            pieces.main(arguments)
        found[cut] = losses(output), load_file(output / "weights")
    (whole, weights), *others = found.values()
    assert whole[-1] < whole[0]
    for cut_losses, cut_weights in others:
        np.testing.assert_allclose(cut_losses, whole, rtol=1e-6)
        for name, tensor in weights.items():
            np.testing.assert_allclose(cut_weights[name].numpy(), tensor.numpy(), rtol=0, atol=1e-6)


def test_deepspeed_saves_nothing_after_a_gradient_that_is_not_finite(tmp_path: Path, forks: Launcher) -> None:
    log = tmp_path / "log"
    (process,) = forks.start("tests.integration.pieces", str(tmp_path / "run"), "44", "2", ZERO[1], "2", log=log)
    process.join(TIMEOUT)
    assert process.exitcode == 1
    assert re.search("The gradient of step 3 has the norm (nan|inf)", log.read_text())
    assert max((tmp_path / "run/states").iterdir()).name == "step-000000002"


def test_bf16_keeps_full_precision_in_the_checkpoint(base: Path, tmp_path: Path, run: Run) -> None:
    values = pretrain_values(base, max_steps=6, precision="bf16", deepspeed=ZERO[1]) | {
        "output": str(tmp_path / "bf16")
    }
    run("training.commands.pretrain", write(tmp_path, values))
    np.testing.assert_allclose(losses(tmp_path / "bf16"), losses(base / "pretrain")[:6], atol=0.1)
    weights = load_checkpoint(tmp_path / "bf16" / "checkpoint").weights["bert.embeddings.word_embeddings.weight"]
    assert not bool((weights == weights.bfloat16().float()).all())


def python_m(config: Path) -> tuple[Callable[[], int | None], Callable[[], None]]:
    """Start a pre-training. Returns functions that give its exit code (None while it runs) and that kill it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "training", "pretrain", str(config)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return process.poll, process.kill


def forked(forks: Launcher, config: Path) -> tuple[Callable[[], int | None], Callable[[], None]]:
    """Start the same in a fork."""
    (process,) = forks.start("training.commands.pretrain", str(config), log=config.with_suffix(".log"))
    return lambda: process.exitcode, process.kill


def kill_at(step: int, log: Path, code: Callable[[], int | None], kill: Callable[[], None]) -> None:
    """End a training with SIGKILL as soon as it has logged `step`."""
    try:
        deadline = time.monotonic() + TIMEOUT
        while not any(line.get("step", 0) >= step and "loss" in line for line in read_log(log)):
            assert code() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, f"step {step} was never logged"
            time.sleep(0.01)
    finally:
        kill()
        while code() is None:
            time.sleep(0.01)
    assert code() == -signal.SIGKILL


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_killed_run_resumes_with_the_same_losses(tmp_path: Path, engine: str, forks: Launcher, run: Run) -> None:
    options: dict[str, Any] = {"epochs": 15, "checkpoint_every": 25, "validate_every": 60}
    if engine == "deepspeed":
        options["deepspeed"] = ZERO[2]
    whole = write(tmp_path, pretrain_values(tmp_path, **options), "whole")
    run("training.commands.pretrain", whole)
    values = pretrain_values(tmp_path, **options) | {"output": str(tmp_path / "killed")}
    killed = write(tmp_path, values, "killed")
    process = python_m(killed) if engine == "torch" else forked(forks, killed)
    kill_at(60, tmp_path / "killed" / "log.jsonl", *process)
    assert not (tmp_path / "killed" / "checkpoint").exists()
    states = sorted(path.name for path in (tmp_path / "killed" / "states").glob("step-*"))
    assert states[-1] >= "step-000000050"
    run("training.commands.pretrain", killed)
    assert losses(tmp_path / "killed") == losses(tmp_path / "pretrain")
    checks = [
        json.loads((tmp_path / name / "metrics.json").read_text())["validation"] for name in ("killed", "pretrain")
    ]
    assert checks[0] == checks[1]


def test_the_deepspeed_launcher_starts_two_processes(base: Path, tmp_path: Path) -> None:
    values = pretrain_values(base, max_steps=3, deepspeed=ZERO[1]) | {"output": str(tmp_path / "launched")}
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        str(launcher),
        "--num_accelerators",
        "2",
        "--module",
        "training",
        "pretrain",
        str(write(tmp_path, values)),
    ]
    environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu", "PATH": f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert load_checkpoint(tmp_path / "launched" / "checkpoint").provenance["hardware"]["processes"] == 2
