"""The overhead of DeepSpeed, the loader alone, and the projected cost of whole runs on GPUs."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.harness import ROOT, table
from benchmarks.performance.training.routes import Job, Route, ours

CONFIGS = ROOT / "training" / "configs"
SHARE = 0.4
"""Assumed share of the peak: the target of training on a GPU."""


def deepspeed(job: Job, folder: Path, *, stages: tuple[int, ...], turns: int) -> tuple[str, dict[str, Any]]:
    """Measure the seconds of an optimiser step with each engine, in one process, float32."""
    job = replace(job, cells=job.cells[: 2 * job.batch], turns=turns)
    plans: dict[str, dict[str, Any]] = {"plain torch": {}}
    for stage in stages:
        path = folder / f"zero{stage}.json"
        values = json.loads((CONFIGS / "zero1.json").read_text())
        path.write_text(json.dumps({**values, "zero_optimization": {"stage": stage}}))
        plans[f"DeepSpeed, ZeRO {stage}"] = {"deepspeed": str(path)}
    routes = {name: Route(ours, job, **how) for name, how in plans.items()}
    seconds: dict[str, list[float]] = {name: [] for name, route in routes.items() if route.first_loss}  # all are ready
    for _ in range(turns):
        for name, route in routes.items():
            seconds[name].append(route.turn() / job.steps)
    steps = {name: statistics.median(found) for name, found in seconds.items()}
    plain = steps["plain torch"]
    rows = []
    for name, route in routes.items():
        last, peak = route.end()
        rows.append((name, f"{steps[name]:.3f}", f"{steps[name] / plain - 1:+.1%}", f"{peak:,.0f}", f"{last:.4f}"))
    columns = ("engine", "s a step", "over plain", "peak MiB", "held-out loss after")
    first = (
        f"**DeepSpeed's overhead.** The default shape, float32, one process, {job.batch} cells a step, "
        f"{turns} turns of {job.steps} steps, medians.\n\n"
    )
    return first + table(columns, rows), steps


def loader(
    corpora: dict[str, tuple[Any, Job]], speeds: dict[str, float], needs: dict[str, float], *, seconds: float
) -> tuple[str, dict[str, Any]]:
    """Compare cells/s of the loader alone (read, pad, mask; one thread) with training here and on an H100.

    Parameters
    ----------
    corpora
        Corpus and job by the shape's name.
    speeds
        Cells/s of the fastest training route of each shape.
    needs
        Operations of training on one cell of each shape.
    seconds
        Seconds of measurement for each shape.
    """
    import torch

    from training.loop.process import Process
    from training.measure.cost import HARDWARE
    from training.objectives.masked import MaskedTask

    rows, found = [], {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    process = Process(rank=0, world_size=1, device=torch.device("cpu"))
    for name, (corpus, job) in corpora.items():
        task = MaskedTask(job.config(), corpus, process)
        task.batch(0, 0, 0)
        cells, index, started = 0, 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            cells += len(task.batch(0, index % (task.batches_per_epoch - 1), index)["input_ids"])
            index += 1
        rate = cells / (time.perf_counter() - started)
        needed = SHARE * HARDWARE["h100"].peak / needs[name]
        found[name] = {"loader": rate, "training": speeds[name], "h100": needed}
        rows.append(
            (
                name,
                f"{rate:,.0f}",
                f"{speeds[name]:,.1f}",
                f"{speeds[name] / rate:.2%}",
                f"{needed:,.0f}",
                f"{needed / rate:.1f}",
            )
        )
    torch.set_num_threads(threads)
    columns = (
        "shape", "loader alone, cells/s", "training here", "loader's share of a step", "an H100 at 40 % (projected)",
        "loader threads it takes",
    )  # fmt: skip
    first = (
        "**The loader alone.** Batches of an epoch from the memory-mapped corpus, masked, in one thread. In training "
        "the next batch is made in a thread of its own while the current one is computed, so a share below 100 % is "
        "not waited for.\n\n"
    )
    return first + table(columns, rows), found


def projected(lengths: NDArray[np.integer[Any]]) -> tuple[str, dict[str, Any]]:
    """Project the hours of the paper's two stages on H100s at the assumed share of their peak."""
    from training.config import strict
    from training.config.stages import ContrastiveConfig, PretrainConfig
    from training.measure.cost import HARDWARE, PASSES_PER_CELL
    from training.measure.flops import ModelSize, cell_cost

    pretraining = strict.read(PretrainConfig, str(CONFIGS / "paper-pretrain.yaml"))
    tuning = strict.read(ContrastiveConfig, str(CONFIGS / "paper-contrastive.yaml"))
    size = ModelSize()
    stages: dict[str, tuple[float, dict[str, Any]]] = {
        f"pre-training, 33 million cells, {pretraining.loop.epochs} epochs": (
            33e6 * pretraining.loop.epochs,
            {"masked_share": pretraining.mask_probability},
        ),
        f"contrastive, 2 million perturbed cells, {tuning.loop.epochs} epochs": (
            2e6 * PASSES_PER_CELL * tuning.loop.epochs,
            {"layers": size.layers - 1},
        ),
    }
    mixes: dict[str, Any] = {"2,048 each": 2048, f"this corpus' mix, mean {lengths.mean():,.0f}": lengths}
    peak = HARDWARE["h100"].peak
    rows, found = [], {}
    for stage, (passes, computed) in stages.items():
        for mix, tokens in mixes.items():
            cost = cell_cost(size, tokens, **computed).training
            rate = SHARE * peak / cost
            hours = passes / rate / 3600
            found[f"{stage}, {mix}"] = hours
            rows.append(
                (
                    stage,
                    mix,
                    f"{cost / 1e9:.0f}",
                    f"{passes / 1e6:,.0f}",
                    f"{rate:,.0f}",
                    f"{hours:,.1f}",
                    f"{hours / 8:,.1f}",
                )
            )
    columns = (
        "stage", "tokens of a cell", "GFLOP a cell", "million passes", "cells/s, one H100", "hours, 1 x H100",
        "hours, 8 x H100",
    )  # fmt: skip
    first = (
        f"**Projected, not measured: whole runs.** Operations of `training/measure/flops.py` at an assumed {SHARE:.0%} "
        f"of the H100's {peak / 1e12:,.0f} TFLOP/s (bf16); eight GPUs as eight times one. No GPU was there to check "
        "it.\n\n"
    )
    return first + table(columns, rows), found
