"""Would a GPU wait? The encoder takes as long as a GPU, and uses no processor meanwhile.

The encoder sleeps for as long as an H100 should compute (see :mod:`benchmarks.performance.gpu.forms`); tokenizing,
padding, forming batches and everything else is real. The share of the time in which it has nothing to do is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding.models import counts, paper_weights, pick, tokens
from benchmarks.performance.gpu.forms import projected
from benchmarks.performance.harness import Options, table
from perturbscope.cells.counts import CountMatrix
from perturbscope.families import Family
from perturbscope.families.outputs import CELL_EMBEDDING, cell_embedding
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Values
from perturbscope.inference.gpu import gpu_limits
from serving.queue import Dispatcher

WIDTH = 256
CHUNK = 4096


class SleepingGpu:
    """An encoder that is busy as long as a GPU would be.

    Parameters
    ----------
    speed
        Speed relative to the projected H100; 0.25 is four times slower.
    """

    provider = ""
    outputs = (cell_embedding(WIDTH),)

    def __init__(self, speed: float = 1.0) -> None:
        self._speed = speed
        self.busy = 0.0
        """Seconds in which it computes, from call to return, the lateness of the sleep included."""

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        """Sleep, and return zeros."""
        n_cells, length = inputs["attention_mask"].shape
        started = time.perf_counter()
        time.sleep(n_cells / (projected("fp16", length) * self._speed))
        self.busy += time.perf_counter() - started
        return {CELL_EMBEDDING: np.zeros((n_cells, WIDTH), dtype=np.float32)}

    def close(self) -> None:
        """Do nothing: there is no model."""


def simulated(family: Family, speed: float, *, overlap: bool, max_tokens: int) -> Embedder:
    """Return an embedder whose encoder is a sleeping GPU."""
    return Embedder(
        family,
        SleepingGpu(speed),
        model_id="simulated",
        vocabulary_hash="simulated",
        limits=gpu_limits("cuda", family.max_length, max_tokens=max_tokens),
        overlap=overlap,
    )


def overlap(options: Options) -> tuple[str, dict[str, Any]]:
    """Measure how long a simulated GPU waits, in the library and behind the service's queue."""
    family = Bundle.open(paper_weights().bundle).family()
    source = "Kang"
    cells = counts(source, 600)
    chunk = cells[np.arange(CHUNK) % len(cells)]
    n_chunks = 2 if options.quick else 6
    queued = tokens(paper_weights().bundle, source, 600)
    rows, numbers = [], {}
    for speed, name in ((0.125, "an eighth of an H100"), (1.0, "H100")):
        for max_tokens in (16_384, 65_536):
            for ahead in (False, True):
                wall, busy = _library(simulated(family, speed, overlap=ahead, max_tokens=max_tokens), chunk, n_chunks)
                key = f"library, {'overlapped' if ahead else 'in turn'}"
                numbers[f"{key}, {name}, {max_tokens}"] = {"wall": wall, "busy": busy}
                rows.append(
                    (f"{key}: counts to vectors", name, f"{max_tokens:,}", *_shares(wall, busy, n_chunks * CHUNK))
                )
            embedder = simulated(family, speed, overlap=True, max_tokens=max_tokens)
            wall, busy, n_cells = asyncio.run(_service(embedder, queued, 4 if options.quick else 16))
            numbers[f"queue, {name}, {max_tokens}"] = {"wall": wall, "busy": busy}
            rows.append(
                ("queue of the service: tokens to vectors", name, f"{max_tokens:,}", *_shares(wall, busy, n_cells))
            )
    text = (
        f"A simulated GPU: real counts ({source} at 2,048 tokens, median "
        f"{int(np.median(queued.lengths)):,}), real tokenizer, padding and queue; the encoder sleeps as long as the "
        "projection says. It waits while no batch is with it; both are on the processor cores of this machine.\n\n"
    )
    return text + table(("way", "speed of", "tokens a batch", "cells/s", "GPU waits"), rows), numbers


def _shares(wall: float, busy: float, n_cells: int) -> tuple[str, str]:
    return f"{n_cells / wall:,.0f}", f"{1.0 - busy / wall:.0%}"


def _library(embedder: Embedder, chunk: CountMatrix, n_chunks: int) -> tuple[float, float]:
    """Seconds from the first result to the last, and of them those of the encoder."""
    encoder = embedder.encoder
    assert isinstance(encoder, SleepingGpu)
    stream = embedder.embed_stream(chunk for _ in range(n_chunks + 1))
    next(stream)
    started, before = time.perf_counter(), encoder.busy
    for _ in stream:
        pass
    return time.perf_counter() - started, encoder.busy - before


async def _service(embedder: Embedder, queued: TokenizedCells, callers: int) -> tuple[float, float, int]:
    """Callers that each wait for their cells before they send more, so that the queue is never empty."""
    encoder = embedder.encoder
    assert isinstance(encoder, SleepingGpu)
    dispatcher = Dispatcher(embedder)
    each = pick(queued, np.arange(256))
    turns = 4
    await dispatcher.submit(each)
    started, before = time.perf_counter(), encoder.busy

    async def caller() -> None:
        for _ in range(turns):
            await dispatcher.submit(each)

    await asyncio.gather(*(caller() for _ in range(callers)))
    wall = time.perf_counter() - started
    await dispatcher.close()
    return wall, encoder.busy - before, callers * turns * len(each)
