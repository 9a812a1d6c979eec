"""From counts to vectors, the int8 variant, and memory as cells grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding.models import FILES, Weights, counts, tokens
from benchmarks.performance.embedding.routes import Job, Route, ours
from benchmarks.performance.harness import Options, Watch, in_child, race, table
from perturbscope.cells.counts import CountMatrix
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import CHUNK_CELLS, Embedder


def whole(model: Weights, options: Options) -> tuple[str, dict[str, Any]]:
    """Time embedding from counts and from tokens."""
    embedder = Embedder.from_bundle(Bundle.open(model.bundle))
    rows, numbers = [], {}
    for source in FILES:
        cells = counts(source, 40 if options.quick else 200)
        cut = embedder.tokenize(cells)
        routes: dict[str, Callable[[], object]] = {
            "tokenize": lambda cells=cells: embedder.tokenize(cells),
            "embed": lambda cut=cut: embedder.embed_tokens(cut),
            "both": lambda cells=cells: embedder.embed(cells),
        }
        seconds = {name: turns.median for name, turns in race(routes, options.repeats).items()}
        rates = {name: len(cells) / took for name, took in seconds.items()}
        numbers[source] = rates
        share = seconds["tokenize"] / seconds["both"]
        rows.append((source, len(cells), *(f"{rate:,.0f}" for rate in rates.values()), f"{share:.1%}"))
    head = ("cells", "n", "tokenize, cells/s", "embed tokens, cells/s", "embed counts, cells/s", "of it tokenization")
    return table(head, rows), numbers


def small_variant(models: Sequence[Weights], options: Options) -> tuple[str, dict[str, Any]]:
    """Measure the int8 graph beside float32: speed by data set, and cosines of the vectors."""
    rows, numbers = [], {}
    for model in models:
        sources = ("mix",) if options.quick else (*FILES, "mix")
        for source in sources:
            n = 30 if "paper" in model.title or options.quick else 150
            job = Job(weights=model, source=source, n_cells=n)
            routes = {variant: Route(ours, job, variant) for variant in ("fp32", "int8")}
            seconds = race({name: route.run for name, route in routes.items()}, max(2, options.repeats - 2))
            wide, small = (routes[name].close()[0] for name in ("fp32", "int8"))
            plain, centred = cosines(wide, small), cosines(wide - wide.mean(axis=0), small - wide.mean(axis=0))
            speed = seconds["fp32"].median / seconds["int8"].median
            found = {"speed": speed, "cosine_mean": plain.mean(), "cosine_min": plain.min(),
                     "centred_mean": centred.mean(), "centred_min": centred.min()}  # fmt: skip
            numbers[f"{model.title}: {source}"] = {name: float(value) for name, value in found.items()}
            mean_length = tokens(model.bundle, source, n).lengths.mean()
            rows.append(
                (
                    f"{model.title}: {source}",
                    f"{mean_length:.0f}",
                    f"{n / seconds['int8'].median:,.1f}",
                    f"{speed:.2f} x",
                    f"{plain.mean():.5f}, {plain.min():.5f}",
                    f"{centred.mean():.5f}, {centred.min():.5f}",
                )
            )
    head = (
        "model: cells",
        "mean length",
        "int8 cells/s",
        "against fp32",
        "cosine: mean, least",
        "centred: mean, least",
    )
    return table(head, rows), numbers


def cosines(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the cosine of each row."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    products = (a * b).sum(axis=1)
    return np.asarray(products / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def streaming(model: Weights, options: Options) -> tuple[str, dict[str, Any]]:
    """Measure the memory of one stream of chunks, and of one matrix of results, as cells grow."""
    rows, numbers = [], {}
    for n_chunks in (1, 2) if options.quick else (1, 4):
        added, vectors = {}, 0.0
        for name, work in {"stream": stream_all, "result": result_of_all}.items():
            (added[name], vectors), _ = in_child(work, model.bundle, n_chunks, 256 if options.quick else CHUNK_CELLS)
        n_cells = n_chunks * (256 if options.quick else CHUNK_CELLS)
        numbers[str(n_cells)] = {**added, "vectors": vectors}
        rows.append((f"{n_cells:,}", f"{added['stream']:,.0f}", f"{added['result']:,.0f}", f"{vectors:,.1f}"))
    head = ("cells", "MiB added by a stream", "MiB added by embed", "MiB of the vectors")
    said = (
        "Peak memory above the loaded model and, for embed, above the counts; cells of the Papalexi panel, repeated.\n"
    )
    return said + "\n" + table(head, rows), numbers


def chunk_of(n_cells: int) -> CountMatrix:
    """Cells of the Papalexi panel."""
    return counts("Papalexi panel", n_cells)


def stream_all(bundle: Path, n_chunks: int, size: int) -> tuple[float, float]:
    """Embed a stream and keep nothing; return MiB added, and MiB of the vectors."""
    embedder, chunk = Embedder.from_bundle(Bundle.open(bundle)), chunk_of(size)
    total = 0.0
    with Watch() as memory:
        for part in embedder.embed_stream(chunk for _ in range(n_chunks)):
            total += part.values.nbytes
    return memory.above, total / 2**20


def result_of_all(bundle: Path, n_chunks: int, size: int) -> tuple[float, float]:
    """Embed one matrix; return MiB added, and MiB of the vectors."""
    from scipy import sparse

    embedder, chunk = Embedder.from_bundle(Bundle.open(bundle)), chunk_of(size)
    joined = sparse.vstack([chunk.counts] * n_chunks, format="csr")
    cells = CountMatrix.from_matrix(joined, chunk.gene_ids)
    with Watch() as memory:
        values = embedder.embed(cells).values
    return memory.above, values.nbytes / 2**20
