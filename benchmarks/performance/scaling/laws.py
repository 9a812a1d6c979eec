"""The laws: a cost against a size, each measured in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding.models import (
    BUILT,
    DEFAULT,
    counts,
    equal_cells,
    paper_weights,
    random_bundle,
    tokens,
)
from benchmarks.performance.harness import Watch, resident, tile
from benchmarks.performance.tokenization.part import stream, write_tiled
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families import Family
from perturbscope.inference.batching import BatchLimits
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pair_map import distance_map
from perturbscope.scoring.results import ScoreOptions
from training.measure.flops import ModelSize, cell_cost

CONTROL = "control"
CONTROLS = 2_000
"""Number of control cells, unless that is varied."""
WIDTHS_LENGTH = 256
"""Tokens of a cell where the width is varied."""
LENGTH_TOKENS = 8192
"""Number of tokens of all cells when the length is varied: longer cells are fewer."""

Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Law:
    """A cost against a size.

    Attributes
    ----------
    what, size
        Names of the work and of the size that is varied.
    sizes, quick
        Sizes at which it is measured, ascending; those of ``--quick``.
    operations
        Function from a size to the expected work, up to a factor.
    begin
        Loads what does not depend on the size, and returns a function from a size to the work to be timed.
    cells
        Function from a size to the number of cells that share the seconds; None: the seconds are those of all.
    """

    what: str
    size: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    operations: Callable[[float], float]
    begin: Callable[[], Callable[[int], Work]]
    cells: Callable[[int], float] | None = None


def measure(name: str, sizes: tuple[int, ...], repeats: int) -> list[dict[str, float]]:
    """Seconds (fastest turn) and memory above the start (MiB, input included) at each size; for a fresh process."""
    law, found = LAWS[name], []
    prepare = law.begin()
    start = resident()
    for size in sizes:
        with Watch() as watch:
            work = prepare(size)
            work()
        seconds = [timed(work) for _ in range(repeats)]
        share = 1.0 if law.cells is None else law.cells(size)
        found.append({"size": size, "seconds": min(seconds) / share, "memory": max(watch.peak - start, 0.0)})
        del work
    return found


def timed(work: Work) -> float:
    """Return the seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def real_cells(n: int) -> CountMatrix:
    """Repeat the cells of PBMC 3k to n cells."""
    cells = counts("PBMC 3k", 2700)
    return cells[np.arange(n) % len(cells)]


def family() -> Family:
    """Return the tokenizer with at most 2,048 tokens."""
    return Bundle.open(paper_weights().bundle).family()


def tokenize_cells() -> Callable[[int], Work]:
    """Tokenization in memory, by cells."""
    tokenizer = family()

    def prepare(size: int) -> Work:
        cells = real_cells(size)
        return lambda: tokenizer.tokenize(cells)

    return prepare


def tokenize_genes() -> Callable[[int], Work]:
    """Tokenization of 2,000 made-up cells, by the genes that each expresses."""
    tokenizer, vocabulary = family(), GeneVocabulary.geneformer_gc30m()

    def prepare(size: int) -> Work:
        rng, n_cells = np.random.default_rng(0), 2000
        genes = [np.sort(rng.choice(len(vocabulary.gene_ids), size, replace=False)) for _ in range(n_cells)]
        values = rng.poisson(2.0, n_cells * size).astype(np.int32) + 1
        starts = np.arange(n_cells + 1, dtype=np.int64) * size
        cells = CountMatrix.from_csr(values, np.concatenate(genes), starts, vocabulary.gene_ids)
        return lambda: tokenizer.tokenize(cells)

    return prepare


def stream_cells() -> Callable[[int], Work]:
    """Reading and tokenizing an uncompressed .h5ad, by cells."""
    tokenizer: Any = family()
    folder = tempfile.TemporaryDirectory(prefix="perturbscope-bench-")

    def prepare(size: int) -> Work:
        path = Path(folder.name) / "cells.h5ad"
        write_tiled(path, size, None)
        return lambda: stream(path, tokenizer)

    return prepare


def embed_cells() -> Callable[[int], Work]:
    """The default bundle on tokens of real cells, by cells."""
    embedder = Embedder.from_bundle(Bundle.open(DEFAULT))

    def prepare(size: int) -> Work:
        cells = embedder.tokenize(real_cells(size))
        return lambda: embedder.embed_tokens(cells)

    return prepare


def embed_lengths() -> Callable[[int], Work]:
    """The model of the paper's shape, by tokens of a cell."""
    bundle = Bundle.open(paper_weights().bundle)
    embedder = Embedder.from_bundle(bundle)

    def prepare(size: int) -> Work:
        cells = equal_cells(bundle.vocabulary, size, LENGTH_TOKENS // size)
        return lambda: embedder.embed_tokens(cells)

    return prepare


def embed_batches() -> Callable[[int], Work]:
    """The default bundle on 256 real cells, by padded tokens of a batch."""
    bundle = Bundle.open(DEFAULT)
    cells = tokens(DEFAULT, "PBMC 3k", 256)

    def prepare(size: int) -> Work:
        limits = BatchLimits(max_tokens=size, max_attention=2**40, max_cells=10_000)
        embedder = Embedder.from_bundle(bundle, limits=limits)
        return lambda: embedder.embed_tokens(cells)

    return prepare


def embed_widths() -> Callable[[int], Work]:
    """Four blocks on 16 cells of 256 tokens, by width."""

    def prepare(size: int) -> Work:
        bundle = Bundle.open(BUILT / f"width-{size}")
        embedder = Embedder.from_bundle(bundle)
        cells = equal_cells(bundle.vocabulary, WIDTHS_LENGTH, 16)
        return lambda: embedder.embed_tokens(cells)

    return prepare


def build_widths(sizes: tuple[int, ...]) -> None:
    """Make the bundles with random weights, once; for a process of its own, which imports torch."""
    from training.families.rank.model import RankModelConfig

    for size in sizes:
        config = RankModelConfig(
            layers=5, hidden=size, heads=size // 32, feed_forward=2 * size, max_length=WIDTHS_LENGTH
        )
        random_bundle(config, BUILT / f"width-{size}-checkpoint", BUILT / f"width-{size}", tolerance=1e-3)


def screen(perturbations: int, cells: int, controls: int, width: int = 256) -> tuple[NDArray[np.float32], list[str]]:
    """Random vectors and their labels; the work does not depend on the values."""
    n = perturbations * cells + controls
    values = tile(np.random.default_rng(0).standard_normal((min(n, 20_000), width), dtype=np.float32), n)
    names = np.repeat(np.array([f"gene{number:05d}" for number in range(perturbations)]), cells)
    return values, [*[CONTROL] * controls, *names.tolist()]


def scored(perturbations: int, cells: int, controls: int) -> Work:
    """E-distance with p-values of 1,000 permutations."""
    values, labels = screen(perturbations, cells, controls)
    options = ScoreOptions(permutations=1000)
    return lambda: score_perturbations(values, labels, control=CONTROL, options=options)


def mapped(groups: int) -> Work:
    """All pairs of groups of 50 cells."""
    values, labels = screen(groups, 50, 0)
    return lambda: distance_map(values, labels)


def length_operations(length: float) -> float:
    """FLOP of a cell of the paper's shape without its last block."""
    return cell_cost(ModelSize(), int(length), layers=5).forward


def width_operations(width: float) -> float:
    """FLOP of a cell of 256 tokens."""
    size = ModelSize(layers=4, hidden=int(width), feed_forward=2 * int(width))
    return cell_cost(size, WIDTHS_LENGTH).forward


def score_operations(perturbations: float, cells: float) -> float:
    """Distances: among the controls, once; of each perturbation's cells to them and to each other."""
    return CONTROLS * CONTROLS + perturbations * (cells * CONTROLS + cells * cells)


def linear(size: float) -> float:
    """Work in proportion to the size."""
    return size


def square(size: float) -> float:
    """Work in proportion to the square of the size."""
    return size * size


def constant(_: float) -> float:
    """Work that does not depend on the size."""
    return 1.0


LAWS = {
    "tokenize-cells": Law(
        what="Tokenize", size="cells", sizes=(2_000, 4_000, 8_000, 16_000, 32_000), quick=(500, 1_000),
        operations=linear, begin=tokenize_cells,
    ),
    "tokenize-genes": Law(
        what="Tokenize 2,000 cells", size="genes expressed by a cell", sizes=(250, 500, 1_000, 2_000, 4_000),
        quick=(100, 200), operations=lambda k: k * np.log2(k), begin=tokenize_genes,
    ),
    "stream-cells": Law(
        what="Read and tokenize a file", size="cells", sizes=(10_000, 20_000, 40_000, 80_000), quick=(1_000, 2_000),
        operations=linear, begin=stream_cells,
    ),
    "embed-cells": Law(
        what="Embed", size="cells", sizes=(64, 128, 256, 512, 1_024), quick=(16, 32),
        operations=linear, begin=embed_cells,
    ),
    "embed-length": Law(
        what="Embed a cell (paper's shape)", size="tokens of a cell", sizes=(128, 256, 512, 1_024, 2_048),
        quick=(1_024, 2_048), operations=length_operations,
        begin=embed_lengths, cells=lambda size: LENGTH_TOKENS / size,
    ),
    "embed-batch": Law(
        what="Embed 256 cells", size="tokens of a batch", sizes=(1_024, 4_096, 16_384, 65_536), quick=(4_096, 16_384),
        operations=constant, begin=embed_batches,
    ),
    "embed-width": Law(
        what="Embed 16 cells of 256 tokens", size="width", sizes=(64, 128, 256, 512), quick=(64, 128),
        operations=width_operations, begin=embed_widths,
    ),
    "score-perturbations": Law(
        what="Score groups of 100 cells", size="perturbations", sizes=(16, 32, 64, 128, 256), quick=(4, 8),
        operations=lambda size: score_operations(size, 100), begin=lambda: lambda size: scored(size, 100, CONTROLS),
    ),
    "score-cells": Law(
        what="Score 8 perturbations", size="cells of a perturbation", sizes=(50, 100, 200, 400, 800), quick=(25, 50),
        operations=lambda size: score_operations(8, size), begin=lambda: lambda size: scored(8, size, CONTROLS),
    ),
    "score-controls": Law(
        what="Score 8 perturbations of 100 cells", size="controls", sizes=(5_000, 10_000, 20_000, 40_000, 80_000),
        quick=(500, 1_000), operations=constant, begin=lambda: lambda size: scored(8, 100, size),
    ),
    "map-perturbations": Law(
        what="Map of all pairs, groups of 50", size="groups", sizes=(64, 128, 256, 512), quick=(8, 16),
        operations=square, begin=lambda: mapped,
    ),
}  # fmt: skip
