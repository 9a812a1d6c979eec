"""What is measured against what: one law a quantity, each in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding_models import BUILT, DEFAULT, counts, paper_weights, tokens
from benchmarks.performance.harness import Watch, resident, tile
from benchmarks.performance.tokenization import stream, write_tiled
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage, GeneVocabulary
from perturbscope.families import Family
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.batching import BatchLimits
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pair_map import distance_map
from perturbscope.scoring.results import ScoreOptions
from training.measure.flops import ModelSize, cell_cost

CONTROL = "control"
CONTROLS = 2_000
"""Control cells, where they are not what is varied."""
WIDTHS_LENGTH = 256
"""Tokens of a cell where the width is varied."""
LENGTH_TOKENS = 8192
"""Tokens in all where the length is varied: the number of cells falls as they grow."""

Prepared = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Law:
    """A cost against a size.

    Attributes
    ----------
    what, size
        Names of the work and of what is varied.
    sizes, quick
        Where it is measured, ascending; with ``--quick``.
    operations
        The work expected at a size, to a factor.
    prepare
        Called with a size: what is to be timed.
    cells
        Cells among which the seconds are to be divided at a size; None: the whole is meant.
    """

    what: str
    size: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    operations: Callable[[float], float]
    prepare: Callable[[int], Any]
    cells: Callable[[int], float] | None = None


def measure(name: str, sizes: tuple[int, ...], repeats: int) -> list[dict[str, float]]:
    """Seconds (fastest turn) and memory above the start (MiB, inputs included) at each size; for a fresh process."""
    law, found = LAWS[name], []
    with law.prepare(0) as make:  # what does not depend on the size
        start = resident()
        for size in sizes:
            with Watch() as watch:
                work = make(size)
                work()
            seconds = [timed(work) for _ in range(repeats)]
            share = 1.0 if law.cells is None else law.cells(size)
            found.append({"size": size, "seconds": min(seconds) / share, "memory": max(watch.peak - start, 0.0)})
            del work
    return found


def timed(work: Prepared) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def real_cells(n: int) -> CountMatrix:
    """Cells of PBMC 3k, over and over."""
    cells = counts("PBMC 3k", 2700)
    return cells[np.arange(n) % len(cells)]


def family() -> Family:
    """The tokenizer at 2,048 tokens."""
    return Bundle.open(paper_weights().bundle).family()


@contextmanager
def tokenize_cells(_: int) -> Iterator[Callable[[int], Prepared]]:
    """Tokenization in memory, by cells."""
    tokenizer = family()

    def make(size: int) -> Prepared:
        cells = real_cells(size)
        return lambda: tokenizer.tokenize(cells)

    yield make


@contextmanager
def tokenize_genes(_: int) -> Iterator[Callable[[int], Prepared]]:
    """Tokenization of 2,000 made-up cells, by the genes that each expresses."""
    tokenizer, vocabulary = family(), GeneVocabulary.geneformer_gc30m()

    def make(size: int) -> Prepared:
        rng, n_cells = np.random.default_rng(0), 2000
        genes = [np.sort(rng.choice(len(vocabulary.gene_ids), size, replace=False)) for _ in range(n_cells)]
        values = rng.poisson(2.0, n_cells * size).astype(np.int32) + 1
        starts = np.arange(n_cells + 1, dtype=np.int64) * size
        cells = CountMatrix.from_csr(values, np.concatenate(genes), starts, vocabulary.gene_ids)
        return lambda: tokenizer.tokenize(cells)

    yield make


@contextmanager
def stream_cells(_: int) -> Iterator[Callable[[int], Prepared]]:
    """Reading and tokenizing an uncompressed .h5ad, by cells."""
    tokenizer: Any = family()
    with tempfile.TemporaryDirectory(prefix="perturbscope-bench-") as folder:
        path = Path(folder) / "cells.h5ad"

        def make(size: int) -> Prepared:
            write_tiled(path, size, None)
            return lambda: stream(path, tokenizer)

        yield make


@contextmanager
def embed_cells(_: int) -> Iterator[Callable[[int], Prepared]]:
    """The default bundle on tokens of real cells, by cells."""
    embedder = Embedder.from_bundle(Bundle.open(DEFAULT))

    def make(size: int) -> Prepared:
        cells = embedder.tokenize(real_cells(size))
        return lambda: embedder.embed_tokens(cells)

    yield make
    embedder.close()


@contextmanager
def embed_lengths(_: int) -> Iterator[Callable[[int], Prepared]]:
    """The model of the paper's shape, by tokens of a cell."""
    bundle = Bundle.open(paper_weights().bundle)
    embedder = Embedder.from_bundle(bundle)

    def make(size: int) -> Prepared:
        cells = same_length(bundle.vocabulary, LENGTH_TOKENS // size, size)
        return lambda: embedder.embed_tokens(cells)

    yield make
    embedder.close()


@contextmanager
def embed_batches(_: int) -> Iterator[Callable[[int], Prepared]]:
    """The default bundle on 256 real cells, by padded tokens of a batch."""
    bundle = Bundle.open(DEFAULT)
    cells = tokens(DEFAULT, "PBMC 3k", 256)
    embedders: list[Embedder] = []

    def make(size: int) -> Prepared:
        limits = BatchLimits(max_tokens=size, max_attention=2**40, max_cells=10_000)
        embedders.append(Embedder.from_bundle(bundle, limits=limits))
        return lambda: embedders[-1].embed_tokens(cells)

    yield make


@contextmanager
def embed_widths(_: int) -> Iterator[Callable[[int], Prepared]]:
    """Four blocks on 16 cells of 256 tokens, by width."""

    def make(size: int) -> Prepared:
        bundle = Bundle.open(BUILT / f"width-{size}")
        embedder = Embedder.from_bundle(bundle)
        cells = same_length(bundle.vocabulary, 16, WIDTHS_LENGTH)
        return lambda: embedder.embed_tokens(cells)

    yield make


def build_widths(sizes: tuple[int, ...]) -> None:
    """Bundles with random weights, made once; for a process of its own, which imports torch."""
    import torch

    from export.pipeline import export_checkpoint
    from training.checkpoint import save_checkpoint
    from training.families.rank.model import RankModelConfig, build_model

    vocabulary = Bundle.open(DEFAULT).vocabulary
    for size in sizes:
        if (BUILT / f"width-{size}").exists():
            continue
        config = RankModelConfig(
            layers=5, hidden=size, heads=size // 32, feed_forward=2 * size, max_length=WIDTHS_LENGTH
        )
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(
                Path(folder) / "checkpoint",
                model=build_model(config, vocabulary),
                family="rank",
                family_config={"max_length": config.max_length},
                model_config=config,
                vocabulary=vocabulary,
                provenance={"weights": "random, for benchmarks"},
            )
            export_checkpoint(
                Path(folder) / "checkpoint", BUILT / f"width-{size}", name=f"width-{size}", version="0", tolerance=1e-3
            )


def same_length(vocabulary: GeneVocabulary, n_cells: int, length: int) -> TokenizedCells:
    """Cells of random genes, all of one length."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.choice(vocabulary.tokens, length, replace=False) for _ in range(n_cells)])
    return TokenizedCells(
        arrays={"input_ids": ids},
        offsets=np.arange(n_cells + 1, dtype=np.int64) * length,
        known_share=np.ones(n_cells, np.float32),
        n_detected=np.full(n_cells, length, np.int32),
        coverage=GeneCoverage(1, 1),
    )


def screen(perturbations: int, cells: int, controls: int, width: int = 256) -> tuple[NDArray[np.float32], list[str]]:
    """Random vectors and their labels; the work does not depend on the values."""
    n = perturbations * cells + controls
    values = tile(np.random.default_rng(0).standard_normal((min(n, 20_000), width), dtype=np.float32), n)
    names = np.repeat(np.array([f"gene{number:05d}" for number in range(perturbations)]), cells)
    return values, [*[CONTROL] * controls, *names.tolist()]


def scored(perturbations: int, cells: int, controls: int) -> Prepared:
    """E-distance with p-values of 1,000 permutations."""
    values, labels = screen(perturbations, cells, controls)
    options = ScoreOptions(permutations=1000)
    return lambda: score_perturbations(values, labels, control=CONTROL, options=options)


@contextmanager
def score_perturbations_law(_: int) -> Iterator[Callable[[int], Prepared]]:
    """Scores of groups of 100 cells against 2,000 controls, by perturbations."""
    yield lambda size: scored(size, 100, CONTROLS)


@contextmanager
def score_cells(_: int) -> Iterator[Callable[[int], Prepared]]:
    """Scores of 8 perturbations against 2,000 controls, by cells of a perturbation."""
    yield lambda size: scored(8, size, CONTROLS)


@contextmanager
def score_controls(_: int) -> Iterator[Callable[[int], Prepared]]:
    """Scores of 8 perturbations of 100 cells, by controls."""
    yield lambda size: scored(8, 100, size)


@contextmanager
def map_perturbations(_: int) -> Iterator[Callable[[int], Prepared]]:
    """All pairs of groups of 50 cells, by groups."""

    def make(size: int) -> Prepared:
        values, labels = screen(size, 50, 0)
        return lambda: distance_map(values, labels)

    yield make


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
    """As many operations as there are."""
    return size


def square(size: float) -> float:
    """Pairs."""
    return size * size


def constant(_: float) -> float:
    """The same for all."""
    return 1.0


LAWS = {
    "tokenize-cells": Law(
        what="Tokenize", size="cells", sizes=(2_000, 4_000, 8_000, 16_000, 32_000), quick=(500, 1_000),
        operations=linear, prepare=tokenize_cells,
    ),
    "tokenize-genes": Law(
        what="Tokenize 2,000 cells", size="genes expressed by a cell", sizes=(250, 500, 1_000, 2_000, 4_000),
        quick=(100, 200), operations=lambda k: k * np.log2(k), prepare=tokenize_genes,
    ),
    "stream-cells": Law(
        what="Read and tokenize a file", size="cells", sizes=(10_000, 20_000, 40_000, 80_000), quick=(1_000, 2_000),
        operations=linear, prepare=stream_cells,
    ),
    "embed-cells": Law(
        what="Embed", size="cells", sizes=(64, 128, 256, 512, 1_024), quick=(16, 32),
        operations=linear, prepare=embed_cells,
    ),
    "embed-length": Law(
        what="Embed a cell (paper's shape)", size="tokens of a cell", sizes=(128, 256, 512, 1_024, 2_048),
        quick=(1_024, 2_048), operations=length_operations,
        prepare=embed_lengths, cells=lambda size: LENGTH_TOKENS / size,
    ),
    "embed-batch": Law(
        what="Embed 256 cells", size="tokens of a batch", sizes=(1_024, 4_096, 16_384, 65_536), quick=(4_096, 16_384),
        operations=constant, prepare=embed_batches,
    ),
    "embed-width": Law(
        what="Embed 16 cells of 256 tokens", size="width", sizes=(64, 128, 256, 512), quick=(64, 128),
        operations=width_operations, prepare=embed_widths,
    ),
    "score-perturbations": Law(
        what="Score groups of 100 cells", size="perturbations", sizes=(16, 32, 64, 128, 256), quick=(4, 8),
        operations=lambda size: score_operations(size, 100), prepare=score_perturbations_law,
    ),
    "score-cells": Law(
        what="Score 8 perturbations", size="cells of a perturbation", sizes=(50, 100, 200, 400, 800), quick=(25, 50),
        operations=lambda size: score_operations(8, size), prepare=score_cells,
    ),
    "score-controls": Law(
        what="Score 8 perturbations of 100 cells", size="controls", sizes=(5_000, 10_000, 20_000, 40_000, 80_000),
        quick=(500, 1_000), operations=constant, prepare=score_controls,
    ),
    "map-perturbations": Law(
        what="Map of all pairs, groups of 50", size="groups", sizes=(64, 128, 256, 512), quick=(8, 16),
        operations=square, prepare=map_perturbations,
    ),
}  # fmt: skip
