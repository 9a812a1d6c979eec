"""Embedding on a GPU, beside transformers with torch's fused attention; the same code runs on the CPU, for a trial.

Every route is a process of its own (see :mod:`benchmarks.performance.embedding.routes`); one that fails has its error
in the table.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding.models import Weights, equal_cells, pick, tokens
from benchmarks.performance.embedding.routes import Ready
from benchmarks.performance.harness import padding_share
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.batching import form_batches
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Device, OnnxEncoder
from perturbscope.inference.gpu import GpuOptions, gpu_limits

MIX = "mix"
"""Cells as data sets have them, instead of one length."""


@dataclass(frozen=True, kw_only=True)
class GpuJob:
    """Cells to embed, the models, and the device.

    Attributes
    ----------
    weights
        Weights for transformers.
    bundle
        Bundle with the same weights in all forms.
    cells
        Length of all cells, or ``mix``.
    n_cells
        Number of cells.
    device
        ``cuda``, or ``cpu`` for a trial.
    """

    weights: Weights
    bundle: Path
    cells: int | str
    n_cells: int
    device: str = "cuda"

    def tokens(self) -> TokenizedCells:
        """Return the cells."""
        if self.cells == MIX:
            drawn = tokens(self.bundle, MIX, 600)
            return pick(drawn, np.random.default_rng(0).choice(len(drawn), size=self.n_cells))
        return equal_cells(Bundle.open(self.bundle).vocabulary, int(self.cells), self.n_cells, repeat=True)


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
    """Run :class:`perturbscope.Embedder`, from tokens to vectors."""
    embedder = embedder_of(job, way)
    cells = job.tokens()
    batches = embedder.plan(cells)
    return Ready(lambda: embedder.embed_tokens(cells), padding_share(cells.lengths, batches))


def embedder_of(job: GpuJob, way: Way) -> Embedder:
    """Return the embedder of a way; in a trial on the CPU it has everything that a GPU's has."""
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
    """Run the blocks that an embedding needs in bf16, with torch's fused attention and the same batches.

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
    """Measure the fastest bf16 matrix product [n, n] x [n, n] of torch, FLOP/s."""
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
