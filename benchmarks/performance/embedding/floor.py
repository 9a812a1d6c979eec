"""The encoder's speed as a share of the machine's matrix products, and its time by operator."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.performance.embedding.models import Weights, equal_cells, tokens
from benchmarks.performance.harness import Options, matmul_ceiling, table
from perturbscope.families.tokens import TokenizedCells, pad
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.cpu_graph import DISABLED_OPTIMIZERS, cpu_graph
from perturbscope.inference.embedder import Embedder
from perturbscope.threads import usable_cores
from training.measure.flops import ModelSize, cell_cost

LENGTHS = (64, 128, 256, 512, 1024, 2048)
CEILING_SHAPES = ((4096, 1024, 1024), (4096, 256, 512), (1024, 256, 512))
_SECONDS = 1.5
"""Time spent on each length."""


def floors(models: Sequence[Weights], options: Options) -> tuple[str, dict[str, Any]]:
    """Measure the share of the machine's fastest matrix product that is reached, by length and for real cells."""
    rows, numbers = [], {}
    seconds = 0.2 if options.quick else _SECONDS
    for model in models:
        bundle = Bundle.open(model.bundle)
        embedder = Embedder.from_bundle(bundle)
        size, layers = shape(bundle)
        sets = {
            f"{length} tokens": equal_cells(bundle.vocabulary, length, max(1, 8192 // length))
            for length in LENGTHS
            if length <= embedder.family.max_length
        }
        sets["mix of real cells"] = tokens(model.bundle, "mix", 30 if options.quick else 150)
        for name, cells in sets.items():
            flop = cell_cost(size, cells.lengths, layers=layers)
            ceiling, took = machine_ceiling(), best(embedder, cells, seconds)
            ceiling = max(ceiling, machine_ceiling())
            rate = len(cells) * flop.forward / took
            rows.append(
                (
                    model.title,
                    name,
                    f"{len(cells) / took:,.1f}",
                    f"{flop.forward / 1e9:.2f}",
                    f"{flop.attention / flop.forward:.0%}",
                    f"{rate / 1e9:.0f}",
                    f"{ceiling / 1e9:.0f}",
                    f"{rate / ceiling:.0%}",
                )
            )
            numbers[f"{model.title}: {name}"] = {"flop_per_s": rate, "ceiling": ceiling, "share": rate / ceiling}
    head = ("model", "cells", "cells/s", "GFLOP a cell", "of it attention", "GFLOP/s", "ceiling", "share")
    said = (
        "Fastest of several passes. FLOP are those of the matrix products, two for a multiplication and an addition, "
        "padding not counted; the ceiling is the fastest product of any of three shapes, before and after.\n"
    )
    return said + "\n" + table(head, rows), numbers


def machine_ceiling() -> float:
    """Fastest matrix product, FLOP/s, of the harness's shape and those of a feed-forward layer of the paper's model."""
    return max(matmul_ceiling(shape, seconds=0.1) for shape in CEILING_SHAPES)


def where_time_goes(models: Sequence[Weights], options: Options) -> tuple[str, dict[str, Any]]:
    """Measure the share of the time by operator, from ONNX Runtime's own profile."""
    shares: dict[str, dict[str, float]] = {}
    for model in models:
        bundle = Bundle.open(model.bundle)
        longest = bundle.family().max_length
        for length in dict.fromkeys((64, 512, longest)):
            shares[f"{model.title.split(',')[0]}, {length}"] = profile(bundle, length, turns=3 if options.quick else 8)
    operators = sorted({name for found in shares.values() for name in found})
    order = sorted(operators, key=lambda name: -max(found.get(name, 0.0) for found in shares.values()))
    rows = [
        (name, *(f"{found.get(name, 0.0):.1%}" for found in shares.values()))
        for name in order
        if max(found.get(name, 0.0) for found in shares.values()) >= 0.01
    ]
    return table(("operator", *shares), rows), shares


def profile(bundle: Bundle, length: int, *, turns: int) -> dict[str, float]:
    """Share of each kind of operator in a batch of about 1,024 tokens, from each operator's fastest turn."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "ort")
        session = ort.InferenceSession(
            cpu_graph(bundle.graph()),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[*DISABLED_OPTIMIZERS],
        )
        cells = equal_cells(bundle.vocabulary, length, max(1, 1024 // length))
        inputs = pad(cells, np.arange(len(cells)), bundle.family().inputs)
        for _ in range(turns):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    fastest: dict[tuple[str, str], float] = defaultdict(lambda: float("inf"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"]["op_name"], event["name"]
            fastest[key] = min(fastest[key], event["dur"])
    total = sum(took for (operator, _), took in fastest.items() if operator != "If")
    found: dict[str, float] = defaultdict(float)
    for (operator, _), took in fastest.items():
        if operator != "If":
            found[operator] += took / total
    return dict(found)


def best(embedder: Embedder, cells: TokenizedCells, seconds: float) -> float:
    """Return the seconds of the fastest pass among those that fit in `seconds`, at least two after the first."""
    embedder.embed_tokens(cells)
    took, until, turns = float("inf"), time.perf_counter() + seconds, 0
    while turns < 2 or time.perf_counter() < until:
        started = time.perf_counter()
        embedder.embed_tokens(cells)
        took, turns = min(took, time.perf_counter() - started), turns + 1
    return took


def shape(bundle: Bundle) -> tuple[ModelSize, int]:
    """Return the size of a bundle's model, and the number of blocks that an embedding runs."""
    config = bundle.manifest.training["model_config"]
    size = ModelSize(
        layers=config["layers"],
        hidden=config["hidden"],
        feed_forward=config["feed_forward"],
        vocabulary=len(bundle.vocabulary),
    )
    return size, bundle.manifest.parity["blocks_in_graph"]
