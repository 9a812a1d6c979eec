"""Requests of mixed sizes with real cells of mixed lengths, the same in every process, and jobs of the callers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.harness import DATA
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import open_cells
from perturbscope.families.tokens import TokenizedCells, concatenate
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from serving.settings import DEFAULT_BUNDLE, Settings

FILES = {
    "kang": ("kang2018_ifnb_pbmc", None),
    "pbmc3k": ("pbmc3k_10x", None),
    "papalexi": ("papalexi2021_eccite_thp1_panel", "total_umi_full_transcriptome"),
}
"""Two whole transcriptomes, whose cells are cut at the model's 512 tokens or just below, and a panel of 303 genes."""
POOL = 1500
"""Number of cells of each file from which requests are drawn."""
SIZES = {1: 24, 2: 12, 4: 8, 8: 6, 16: 4, 32: 2, 64: 2, 128: 1, 256: 1, 512: 1}
"""Number of requests in the mix, by their number of cells."""
QUICK_SIZES = {1: 6, 4: 2, 16: 2, 64: 1}
Way = Literal["HTTP JSON", "HTTP Arrow", "gRPC", "gRPC stream", "HTTP Arrow stream", "BentoML batchable"]
UNARY: tuple[Way, ...] = ("HTTP JSON", "HTTP Arrow", "gRPC")
STREAMS: tuple[Way, ...] = ("gRPC stream", "HTTP Arrow stream")
RPC = "/perturbscope.v1.PerturbScope/"


@dataclass(frozen=True)
class Plan:
    """Amount of work of a run.

    Attributes
    ----------
    turns
        Number of turns of each way at saturation.
    small_seconds, large_seconds
        Seconds of each point of the curve, with small and with large requests.
    idle
        Number of requests of each kind to the idle service.
    quick
        Whether sizes are small, to see that the code runs.
    """

    turns: int
    small_seconds: float
    large_seconds: float
    idle: int
    quick: bool


@dataclass(frozen=True)
class Ask:
    """Cells of one file that one request brings.

    Attributes
    ----------
    source
        Key of :data:`FILES`.
    rows
        Rows of :func:`pool`.
    """

    source: str
    rows: tuple[int, ...]

    def cells(self) -> CountMatrix:
        """Return the cells."""
        return pool(self.source)[np.array(self.rows)]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Requests to send, and when.

    Attributes
    ----------
    way
        Interface to use.
    address
        Address of the service, ``host:port``.
    asks
        Requests to send.
    callers
        Number of requests in progress, a new one as soon as one is answered, until all were sent once; 0: see `rate`.
    rate
        Requests a second, sent at random times (a Poisson process) for `seconds`, whether answered or not.
    seconds
        Seconds of sending at a rate; requests begin again when all were sent.
    pause
        Seconds that a caller rests between an answer and its next request.
    """

    way: Way
    address: str
    asks: list[Ask]
    callers: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    pause: float = 0.0


@dataclass
class Outcome:
    """Result of a job.

    Attributes
    ----------
    wall, cpu
        Seconds from the first request to the last answer, and processor seconds of this process in them.
    latency
        Seconds of each request, from when it was due if it was sent at a rate; empty for streams.
    sizes
        Number of cells of each of these requests.
    n_cells
        Number of cells that were answered.
    vectors
        Vectors of each request in the order of ``Job.asks``, if all were sent once.
    """

    wall: float = 0.0
    cpu: float = 0.0
    latency: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    n_cells: int = 0
    vectors: list[NDArray[np.float32]] = field(default_factory=list)


@functools.cache
def pool(source: str) -> CountMatrix:
    """Draw cells from all over one file."""
    name, totals = FILES[source]
    with open_cells(DATA / f"{name}.h5ad", total_counts_key=totals) as opened:
        cells = opened.read()
    return cells[np.sort(np.random.default_rng(0).choice(len(cells), min(POOL, len(cells)), replace=False))]


def mix(*, quick: bool) -> list[Ask]:
    """Return requests of all sizes over all files, in random order."""
    rng = np.random.default_rng(1)
    sizes = [size for size, n in (QUICK_SIZES if quick else SIZES).items() for _ in range(n)]
    found = [_drawn(rng, list(FILES)[at % len(FILES)], size) for at, size in enumerate(sizes)]
    return [found[at] for at in rng.permutation(len(found))]


def uniform(size: int, n: int, sources: tuple[str, ...] = tuple(FILES)) -> list[Ask]:
    """Return `n` requests of one size, over these files in turn."""
    rng = np.random.default_rng([2, size])
    return [_drawn(rng, sources[at % len(sources)], size) for at in range(n)]


def _drawn(rng: np.random.Generator, source: str, size: int) -> Ask:
    rows = rng.choice(len(pool(source)), size, replace=size > POOL)
    return Ask(source, tuple(int(row) for row in rows))


@functools.cache
def embedder() -> Embedder:
    """Load the default bundle in this process, with the service's threads and batches."""
    from perturbscope.inference.batching import BatchLimits

    limits = BatchLimits(max_tokens=Settings().batch_tokens)
    return Embedder.from_bundle(Bundle.open(DEFAULT_BUNDLE), limits=limits)


@functools.cache
def right(asks: tuple[Ask, ...]) -> NDArray[np.float32]:
    """Embed all cells of the requests with the library."""
    return embedder().embed_tokens(tokens_of(asks))


def tokens_of(asks: Sequence[Ask]) -> TokenizedCells:
    """Tokenize all cells of the requests, joined."""
    return concatenate([embedder().tokenize(ask.cells()) for ask in asks])
