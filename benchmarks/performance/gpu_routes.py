"""Embedding on a GPU, beside transformers with torch's fused attention; the same code runs on the CPU, for a trial.

Every route is a process of its own (see :mod:`benchmarks.performance.embedding_routes`), and one that fails is a line
of the table, with its error.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding_models import Weights, counts, paper_weights, pick, tokens
from benchmarks.performance.embedding_routes import Ready, Route
from benchmarks.performance.gpu_forms import LENGTHS, forms_bundle
from benchmarks.performance.harness import ROOT, Options, Turns, padding_share, race, table
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.batching import form_batches
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Device, OnnxEncoder
from perturbscope.inference.gpu import GpuOptions, gpu_limits
from training.measure.flops import ModelSize, cell_cost

MIX = "mix"
"""Cells as data sets have them, instead of one length."""
KERNELS = "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"
"""Makes ONNX Runtime say which attention kernel it runs."""


@dataclass(frozen=True, kw_only=True)
class GpuJob:
    """What to embed, and where.

    Attributes
    ----------
    weights
        For transformers.
    bundle
        The same weights in all forms.
    cells
        One length, or ``mix``.
    n_cells
        How many.
    device
        ``cuda``, or ``cpu`` for a trial.
    """

    weights: Weights
    bundle: Path
    cells: int | str
    n_cells: int
    device: str = "cuda"

    def tokens(self) -> TokenizedCells:
        """The cells."""
        if self.cells == MIX:
            drawn = tokens(self.bundle, MIX, 600)
            return pick(drawn, np.random.default_rng(0).choice(len(drawn), size=self.n_cells))
        length = int(self.cells)
        genes = Bundle.open(self.bundle).vocabulary.tokens
        ids = np.random.default_rng(0).choice(genes, size=self.n_cells * length).astype(np.int32)
        some = tokens(self.bundle, MIX, 3)
        return TokenizedCells(
            arrays={"input_ids": ids},
            offsets=np.arange(self.n_cells + 1, dtype=np.int64) * length,
            known_share=np.ones(self.n_cells, dtype=np.float32),
            n_detected=np.full(self.n_cells, length, dtype=np.int32),
            coverage=some.coverage,
        )


@dataclass(frozen=True, kw_only=True)
class Way:
    """How PerturbScope runs a graph.

    Attributes
    ----------
    form
        Variant of the bundle.
    provider
        ``cuda`` or ``tensorrt``; ``cpu`` in a trial.
    cuda_graphs, bound, buckets
        Whether kernels are captured; whether memory is bound; whether shapes are few.
    """

    form: str = "fp16"
    provider: str = "cuda"
    cuda_graphs: bool = False
    bound: bool = True
    buckets: bool = True


def ours(job: GpuJob, way: Way) -> Ready:
    """:class:`perturbscope.Embedder`, from tokens to vectors."""
    embedder = embedder_of(job, way)
    cells = job.tokens()
    batches = embedder.plan(cells)
    return Ready(lambda: embedder.embed_tokens(cells), padding_share(cells.lengths, batches))


def embedder_of(job: GpuJob, way: Way) -> Embedder:
    """The embedder of a way; in a trial on the CPU, with all that a GPU's has."""
    bundle = Bundle.open(job.bundle)
    max_length = bundle.family().max_length
    limits = gpu_limits(way.provider, max_length)
    if not way.buckets:
        limits = type(limits)(
            max_tokens=limits.max_tokens, max_attention=limits.max_attention, max_cells=limits.max_cells
        )
    options = GpuOptions(cuda_graphs=way.cuda_graphs, engine_cache=job.bundle.parent / "tensorrt")
    provider = cast("Device", "cpu" if job.device == "cpu" else way.provider)
    embedder = Embedder.from_bundle(bundle, variant=way.form, device=provider, limits=limits, gpu=options)
    embedder.overlap = True
    encoder = embedder.encoder
    assert isinstance(encoder, OnnxEncoder)
    if job.device == "cpu":
        encoder.bind("cpu", capture=way.cuda_graphs)
    if not way.bound:
        encoder.bound = None
    return embedder


def transformers(job: GpuJob) -> Ready:
    """The blocks that an embedding needs, in bf16, with torch's fused attention and the same batches.

    Cells of one length come without a mask, with which torch would not run its flash kernel.
    """
    import torch

    model: Any = job.weights.torch().bert
    model.encoder.layer = model.encoder.layer[:-1]
    model = model.to(job.device, torch.bfloat16)
    cells = job.tokens()
    limits = gpu_limits("cuda", model.config.max_position_embeddings)
    limits = type(limits)(max_tokens=limits.max_tokens, max_attention=limits.max_attention, max_cells=limits.max_cells)
    batches = form_batches(cells.lengths, limits)
    width: int = model.config.hidden_size

    @torch.inference_mode()
    def run() -> NDArray[np.float32]:
        values = np.empty((len(cells), width), dtype=np.float32)
        waiting = []
        for rows in batches:
            lengths = torch.tensor(cells.lengths[rows])
            longest = int(lengths.max())
            mask = torch.arange(longest) < lengths[:, None]
            ids = torch.full(mask.shape, model.config.pad_token_id, dtype=torch.int64)
            take = (cells.offsets[rows][:, None] + np.arange(longest))[mask.numpy()]
            ids[mask] = torch.tensor(cells.arrays["input_ids"][take], dtype=torch.int64)
            if job.device != "cpu":
                ids, mask = (tensor.pin_memory().to(job.device, non_blocking=True) for tensor in (ids, mask))
            whole = bool((lengths == longest).all())
            states = model(input_ids=ids, attention_mask=None if whole else mask.long()).last_hidden_state
            weights = mask[:, :, None].float()
            waiting.append((rows, (states.float() * weights).sum(1) / weights.sum(1)))
        for rows, means in waiting:
            values[rows] = means.cpu().numpy()
        return values

    return Ready(run, padding_share(cells.lengths, batches))


def ceiling(device: str = "cuda", n: int = 8192, seconds: float = 2.0) -> float:
    """Fastest bf16 matrix product [n, n] x [n, n] of torch, FLOP/s."""
    import torch

    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    best, until = float("inf"), time.perf_counter() + seconds
    for _ in range(3):
        a @ b
    while time.perf_counter() < until:
        wait()
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        wait()
        best = min(best, (time.perf_counter() - started) / 4)
    return 2.0 * n**3 / best


PEER = "transformers bf16, SDPA"
BEST = "fp16"
WAYS: dict[str, tuple[str, Way]] = {
    "fp16": ("PerturbScope `fp16`", Way()),
    "flash": ("PerturbScope `fp16-flash`", Way(form="fp16-flash")),
    "packed": ("PerturbScope `fp16-packed`", Way(form="fp16-packed")),
    "graphs": ("`fp16-flash`, CUDA graphs", Way(form="fp16-flash", cuda_graphs=True)),
    "unbound": ("`fp16`, memory not bound", Way(bound=False)),
    "shapes": ("`fp16`, batches as long as their longest cell", Way(buckets=False)),
    "tensorrt": ("TensorRT, `fp16-plain`", Way(form="fp16-plain", provider="tensorrt")),
}
"""What is measured. In a trial on the CPU, what only a GPU has fails, and is shown to."""


def measure(options: Options, device: str = "cuda") -> tuple[str, dict[str, Any]]:
    """All routes at each length and on the mix, against the card's ceiling."""
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
    """Routes in turns; those that fail, with their error."""
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
    """Rows of the table."""
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
    """Share of the time in which the GPU has no batch: counts of real cells to vectors."""
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
    """Which attention kernel each form runs, as ONNX Runtime says."""
    found: dict[str, Any] = {}
    for form in ("fp16", "fp16-flash", "fp16-packed"):
        for length in (256, 2048) if device != "cpu" else (16,):
            script = (
                "from benchmarks.performance.gpu_routes import *\n"
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
    """What an error says."""
    return next((line for line in reversed(text.strip().splitlines()) if line.strip()), "no reason given")


def cuda_here() -> str:
    """Why nothing can be measured on a GPU here; empty if it can."""
    with contextlib.suppress(ImportError):
        import torch

        if not torch.cuda.is_available():
            return "torch sees no GPU"
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime is not onnxruntime-gpu"
        return ""
    return "torch is not installed"
