"""Measurements on a GPU: the race of all routes, the wait for the tokenizer, and the attention kernels that run."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding.models import counts, paper_weights
from benchmarks.performance.embedding.routes import Route
from benchmarks.performance.gpu.forms import LENGTHS, forms_bundle
from benchmarks.performance.gpu.routes import MIX, GpuJob, Way, ceiling, embedder_of, ours, transformers
from benchmarks.performance.harness import ROOT, Options, Turns, race, table
from training.measure.flops import ModelSize, cell_cost

KERNELS = "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"
"""Makes ONNX Runtime say which attention kernel it runs."""
PEER = "transformers bf16, SDPA"
WAYS: dict[str, tuple[str, Way]] = {
    "fp16": ("PerturbScope `fp16`", Way()),
    "flash": ("PerturbScope `fp16-flash`", Way(form="fp16-flash")),
    "packed": ("PerturbScope `fp16-packed`", Way(form="fp16-packed")),
    "graphs": ("`fp16-flash`, CUDA graphs", Way(form="fp16-flash", cuda_graphs=True)),
    "unbound": ("`fp16`, memory not bound", Way(bound=False)),
    "shapes": ("`fp16`, batches as long as their longest cell", Way(buckets=False)),
    "tensorrt": ("TensorRT, `fp16-plain`", Way(form="fp16-plain", provider="tensorrt")),
}
"""Routes that are measured. In a trial on the CPU, those that need a GPU fail, and the table says so."""


def measure(options: Options, device: str = "cuda") -> tuple[str, dict[str, Any]]:
    """Measure all routes at each length and on the mix, against the card's ceiling."""
    weights, bundle = paper_weights(), forms_bundle()
    best = ceiling(device) if device != "cpu" else ceiling("cpu", 512, 0.5)
    numbers: dict[str, Any] = {"ceiling": best, "device": device}
    rows: list[tuple[object, ...]] = []
    trial = device == "cpu"
    for cells in (64, MIX) if trial else (*LENGTHS, MIX):
        n_cells = 4 if trial else 6000 if cells == MIX else max(512, 2**22 // int(cells))
        job = GpuJob(weights=weights, bundle=bundle, cells=cells, n_cells=n_cells, device=device)
        found = together(job, 1 if trial else 2 if options.quick else options.repeats)
        numbers[str(cells)] = found
        rows += [(cells, *line) for line in lines(job, found, best)]
    text = (
        f"Ceiling: {best / 1e12:.1f} TFLOP/s (bf16 products of torch, measured in this run). Share: FLOP of the tokens "
        "alone, attention included. Routes took turns.\n\n"
    )
    columns = ("length", "route", "cells/s", "share of the ceiling", "of transformers", "padding", "largest difference")
    return text + table(columns, rows), numbers


def together(job: GpuJob, turns: int) -> dict[str, dict[str, Any]]:
    """Run routes in turns; a route that fails has its error as its result."""
    makers: dict[str, Callable[[], Route]] = {PEER: lambda: Route(transformers, job)}
    for name, way in WAYS.values():
        makers[name] = lambda way=way: Route(ours, job, way)  # type: ignore[misc]
    found: dict[str, dict[str, Any]] = {}
    routes: dict[str, Route] = {}
    for name, make in makers.items():
        try:
            route = make()
            route.run()
        except ChildProcessError as error:
            found[name] = {"failed": last_line(str(error))}
        else:
            routes[name] = route
    seconds: dict[str, Turns] = race({name: route.run for name, route in routes.items()}, turns)
    values = {name: route.close()[0] for name, route in routes.items()}
    reference = values.get(PEER)
    for name, route in routes.items():
        found[name] = {
            "cells_per_s": job.n_cells / seconds[name].median,
            "spread": seconds[name].spread,
            "padding": route.padding,
            "difference": None if reference is None else float(np.abs(values[name] - reference).max()),
        }
    return {name: found[name] for name in makers}


def lines(job: GpuJob, found: Mapping[str, dict[str, Any]], best: float) -> Iterator[tuple[object, ...]]:
    """Yield the rows of the table."""
    cost = cell_cost(ModelSize(), job.tokens().lengths, layers=ModelSize().layers - 1).forward
    peer = found[PEER].get("cells_per_s")
    for name, values in found.items():
        if "failed" in values:
            yield name, "failed: " + values["failed"].replace("|", "/")[:120], "", "", "", ""
            continue
        rate = values["cells_per_s"]
        values["share"] = rate * cost / best
        yield (
            name,
            f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
            f"{values['share']:.0%}",
            "" if peer is None else f"{rate / peer:.2f} x",
            f"{values['padding']:.1%}",
            "" if values["difference"] is None else f"{values['difference']:.1e}",
        )


def waiting(options: Options, device: str = "cuda") -> tuple[str, dict[str, Any]]:
    """Measure the share of the time in which the GPU has no batch, from counts of real cells to vectors."""
    job = GpuJob(weights=paper_weights(), bundle=forms_bundle(), cells=MIX, n_cells=1, device=device)
    rows, numbers = [], {}
    drawn = counts("Kang", 600)
    n_cells = 8 if device == "cpu" else 4096
    chunk = drawn[np.arange(n_cells) % len(drawn)]
    for overlap in (False, True):
        embedder = embedder_of(job, Way())
        encoder: Any = embedder.encoder
        embedder.overlap = overlap
        busy = 0.0
        run: Callable[[Any], NDArray[np.float32]] = encoder.bound.finish

        def timed(staged: Any, run: Callable[[Any], NDArray[np.float32]] = run) -> NDArray[np.float32]:
            nonlocal busy
            started = time.perf_counter()
            values = run(staged)
            busy += time.perf_counter() - started
            return values

        encoder.bound.finish = timed
        stream = embedder.embed_stream(chunk for _ in range(2 if options.quick or device == "cpu" else 9))
        next(stream)
        busy, started = 0.0, time.perf_counter()
        n = sum(len(part) for part in stream)
        wall = time.perf_counter() - started
        embedder.close()
        name = "overlapped" if overlap else "in turn"
        numbers[name] = {"wall": wall, "busy": busy, "cells": n}
        rows.append((f"tokenizing and computing {name}", f"{n / wall:,.0f}", f"{1 - busy / wall:.0%}"))
    return table(("Kang, counts to vectors", "cells/s", "GPU waits"), rows), numbers


def kernels(options: Options, device: str = "cuda") -> tuple[str, dict[str, Any]]:
    """Tabulate the attention kernel that each form runs, as ONNX Runtime reports it."""
    found: dict[str, Any] = {}
    for form in ("fp16", "fp16-flash", "fp16-packed"):
        for length in (256, 2048) if device != "cpu" else (16,):
            script = (
                "from benchmarks.performance.gpu.measure import *\n"
                f"job = GpuJob(weights=paper_weights(), bundle=forms_bundle(), cells={length}, n_cells=4, "
                f"device={device!r})\n"
                f"embedder_of(job, Way(form={form!r})).embed_tokens(job.tokens())\n"
            )
            done = subprocess.run(
                [sys.executable, "-c", script],
                cwd=ROOT,
                env={**os.environ, KERNELS: "1"},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            said = sorted(set(re.findall(r"(?:SdpaKernel=|\b)([A-Z_]*ATTENTION|MATH)(?:=1)?", done.stdout)))
            failed = "" if done.returncode == 0 else "failed: " + last_line(done.stderr)
            found[f"{form}, {length}"] = failed or ", ".join(said) or "not said"
    return table(("form, length", "attention kernel"), list(found.items())), found


def last_line(text: str) -> str:
    """Return the last line of an error."""
    return next((line for line in reversed(text.strip().splitlines()) if line.strip()), "no reason given")


def cuda_here() -> str:
    """Return the reason why nothing can be measured on a GPU here; empty if it can."""
    with contextlib.suppress(ImportError):
        import torch

        if not torch.cuda.is_available():
            return "torch sees no GPU"
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime is not onnxruntime-gpu"
        return ""
    return "torch is not installed"
