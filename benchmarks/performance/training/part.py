"""Training: the loop beside transformers' Trainer, the overhead of DeepSpeed, the loader alone, projected costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.harness import ROOT, Options, Section, padding_share, table
from benchmarks.performance.training.extras import deepspeed, loader, projected
from benchmarks.performance.training.routes import Job, Route, choose, ours, trainer, trainer_order
from perturbscope.threads import usable_cores

CONFIG = ROOT / "training" / "configs" / "default-pretrain.yaml"
DEFAULT = "default, 4 x 128, 512 tokens"
PAPER = "paper, 6 x 256, 2,048 tokens"
SIZES = {
    DEFAULT: {"layers": 4, "hidden": 128, "heads": 4, "feed_forward": 256, "attention_dropout": 0.0},
    PAPER: {"layers": 6, "hidden": 256, "heads": 4, "feed_forward": 512, "attention_dropout": 0.0},
}
"""Dropout of attention weights keeps torch from its fused attention on a CPU, for either route."""
MASKED = 0.15
KINDS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, its cells and its steps."""

    title: str
    model: Mapping[str, Any]
    max_length: int
    batch: int
    steps: int
    turns: int


def run(options: Options) -> Section:
    """Run the whole part."""
    n = 1 if options.quick else options.repeats
    shapes = [
        Shape(title=DEFAULT, model=SIZES[DEFAULT], max_length=512, batch=16,
              steps=2 if options.quick else 3, turns=n),
        Shape(title=PAPER, model=SIZES[PAPER], max_length=2048, batch=4 if options.quick else 8,
              steps=1 if options.quick else 2, turns=max(1, n - 2)),
    ]  # fmt: skip
    text: list[str] = []
    numbers: dict[str, Any] = {}
    corpora: dict[str, tuple[Any, Job]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            corpora[shape.title] = prepare(shape, Path(folder))
        for shape in shapes[:1] if options.quick else shapes:
            markdown, numbers[shape.title] = compare(
                shape, *corpora[shape.title], kinds=KINDS[: 1 if options.quick else 2]
            )
            text.append(markdown)
        markdown, numbers["deepspeed"] = deepspeed(
            corpora[DEFAULT][1],
            Path(folder),
            stages=(1,) if options.quick else (0, 1, 2),
            turns=1 if options.quick else 3,
        )
        text.append(markdown)
        markdown, numbers["loader"] = loader(
            {name: found for name, found in corpora.items() if name in numbers},
            {name: max(route["cells_per_second"] for route in numbers[name]["routes"].values())
             for name in corpora if name in numbers},
            {name: needed(shape, corpora[name][0].lengths, len(corpora[name][0].vocabulary))
             for name, shape in ((shape.title, shape) for shape in shapes)},
            seconds=1.0 if options.quick else 3.0,
        )  # fmt: skip
        text.append(markdown)
        markdown, numbers["projected_hours"] = projected(corpora[PAPER][0].lengths)
        text.append(markdown)
    return Section(markdown="\n".join(text), numbers=numbers)


def build(folder: Path, max_length: int) -> Any:
    """Build the corpus of default-pretrain.yaml."""
    from training.config import strict
    from training.config.stages import PretrainConfig
    from training.data.corpus import build_corpus

    path = folder / f"corpus-{max_length}"
    changes = [f"corpus.path={path}", f"corpus.max_length={max_length}"]
    return build_corpus(strict.read(PretrainConfig, str(CONFIG), changes).corpus)


def prepare(shape: Shape, folder: Path) -> tuple[Any, Job]:
    """Build the corpus, and the job of every route."""
    corpus = build(folder, shape.max_length)
    lengths = corpus.lengths
    cells = choose(lengths, batch=shape.batch, steps=shape.steps)
    rest = np.setdiff1d(np.arange(len(lengths)), cells)
    job = Job(
        corpus=corpus.path,
        cells=cells,
        held_out=np.random.default_rng(0).choice(rest, 8, replace=False),
        batch=shape.batch,
        turns=shape.turns,
        model=shape.model,
        threads=usable_cores(),
    )
    return corpus, job


def compare(shape: Shape, corpus: Any, job: Job, kinds: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Run all routes on one shape, in turns."""
    lengths, cells = corpus.lengths, job.cells
    ceilings = {kind: ceiling(kind) for kind in kinds}
    plans: dict[str, tuple[Any, dict[str, Any]]] = {
        f"{name}, {kind}": (work, {"precision": kind})
        for kind in kinds
        for name, work in (("Trainer", trainer), ("this project", ours))
    }
    routes = {name: Route(work, job, **how) for name, (work, how) in plans.items()}
    seconds: dict[str, list[float]] = {name: [] for name, route in routes.items() if route.first_loss}  # all are ready
    for _ in range(shape.turns):
        for name, route in routes.items():
            seconds[name].append(route.turn())
    for kind in ceilings:
        ceilings[kind] = max(ceilings[kind], ceiling(kind))
    operations = needed(shape, lengths[cells], len(corpus.vocabulary)) * len(cells)
    tokens = int(lengths[cells].sum())
    peers = {kind: statistics.median(seconds[f"Trainer, {kind}"]) for kind in ceilings}
    rows, found = [], {}
    padding = {"Trainer": trainer_padding(lengths, shape.batch), "this project": 0.0}
    for name, route in routes.items():
        last, peak = route.end()
        median = statistics.median(seconds[name])
        kind = name[-4:]
        values = {
            "cells_per_second": len(cells) / median,
            "ratio": peers[kind] / median,
            "tokens_per_second": tokens / median,
            "share_of_ceiling": operations / median / ceilings[kind],
            "padding": padding[name.split(",")[0]],
            "peak_mib": peak,
            "first_loss": route.first_loss,
            "last_loss": last,
            "seconds": seconds[name],
        }
        found[name] = values
        rows.append(
            (
                name,
                f"{values['cells_per_second']:.2f}",
                f"{values['ratio']:.2f}",
                f"{values['tokens_per_second']:,.0f}",
                f"{values['share_of_ceiling']:.0%}",
                f"{values['padding']:.2%}",
                f"{peak:,.0f}",
                f"{route.first_loss:.4f} → {last:.3f}",
            )
        )
    columns = ("route", "cells/s", "x Trainer", "tokens/s", "of ceiling", "padding", "peak MiB", "held-out loss")
    first = (
        f"**{shape.title}.** {len(cells)} real cells a turn ({lengths[cells].min()} to {lengths[cells].max()} tokens, "
        f"mean {lengths[cells].mean():.0f}; corpus mean {lengths.mean():.0f}), {shape.batch} a step, "
        f"{shape.turns} turns of each route, medians, {job.threads} threads. Ceiling (1,024³ products, same run): "
        + ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in ceilings.items())
        + f". A cell needs {operations / len(cells) / 1e9:.1f} GFLOP (head at masked tokens only).\n\n"
    )
    last_words = (
        "\nPadding: share of the computed tokens, over an epoch of the whole corpus in batches of Trainer's own "
        "length-grouped sampler; this project lays cells end to end. Padded, its batches would have "
        f"{our_padding(lengths, shape.batch):.2%}.\n"
    )
    return first + table(columns, rows) + last_words, {"routes": found, "ceilings": ceilings, "operations": operations}


def needed(shape: Shape, lengths: NDArray[np.integer[Any]], vocabulary: int) -> float:
    """Return the mean operations of training on one cell, with the head at masked tokens only."""
    from training.measure.flops import ModelSize, cell_cost

    sizes = {name: shape.model[name] for name in ("layers", "hidden", "feed_forward")}
    return cell_cost(ModelSize(**sizes, vocabulary=vocabulary), lengths, masked_share=MASKED).training


def trainer_padding(lengths: NDArray[np.integer[Any]], batch: int) -> float:
    """Padding of an epoch of the corpus in the order of transformers' LengthGroupedSampler."""
    order = trainer_order(lengths, batch=batch)
    return padding_share(lengths, [order[start : start + batch] for start in range(0, len(order), batch)])


def our_padding(lengths: NDArray[np.integer[Any]], batch: int) -> float:
    """Padding of an epoch of the corpus in this project's order."""
    from training.data.length_sampler import LengthGroupedSampler

    return padding_share(lengths, LengthGroupedSampler(lengths, batch=batch).batches(0))


def ceiling(precision: str, seconds: float = 0.5) -> float:
    """Measure the fastest rate of a 1,024³ matrix product in torch on all usable cores, FLOP/s."""
    import torch

    torch.set_num_threads(usable_cores())
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = (torch.randn(1024, 1024).to(kind) for _ in range(2))
    torch.matmul(a, b)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.matmul(a, b)
        best = min(best, time.perf_counter() - started)
    return 2.0 * 1024**3 / best
