"""Models of the shapes that Geneformer is published in: adopted and exported, beside the published extractor.

The weights are random, in directories as published; what a cell costs does not depend on them. The extractor's loop is
that of :func:`benchmarks.performance.embedding.routes.extractor`: ``BertForMaskedLM`` with all hidden states, the
longest cells first, batches padded to their longest cell.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.performance.embedding.models import BUILT, Weights
from benchmarks.performance.embedding.part import columns, compare
from benchmarks.performance.embedding.routes import Job, extractor, ours
from benchmarks.performance.harness import Options, Section, in_child, table

SHAPES: dict[str, dict[str, Any]] = {
    "V1, 6 x 256, 2,048 tokens": {"version": "V1", "layers": 6, "width": 256, "heads": 4, "positions": 2048},
    "V2, 12 x 512, 4,096 tokens": {"version": "V2", "layers": 12, "width": 512, "heads": 8, "positions": 4096},
}
"""Shapes of Geneformer-V1-10M and of the smallest V2, gf-12L-38M-i4096."""
SMALL = {"V2, 2 x 32": {"version": "V2", "layers": 2, "width": 32, "heads": 4, "positions": 4096}}
CELLS = {"PBMC 3k": 16, "mix": 18}
"""Cells of each source; see :func:`benchmarks.performance.embedding.models.tokens`."""
OURS, EXTRACTOR = "PerturbScope", "published extractor"


def run(options: Options) -> Section:
    """Run the whole part."""
    rows, made, numbers = [], [], {}
    for title, shape in (SMALL if options.quick else SHAPES).items():
        weights, steps = prepared(title, shape)
        numbers[title] = {"made": steps}
        made.append((title, *(f"{seconds:.1f} s, {mib:,.0f} MiB" for seconds, mib in steps.values())))
        for source, n_cells in CELLS.items():
            job = Job(weights=weights, source=source, n_cells=n_cells // (4 if options.quick else 1))
            routes = {OURS: (ours, {}), EXTRACTOR: (extractor, {"head": True})}
            found = compare(job, routes, max(2, options.repeats - 2))
            numbers[title][f"{source}, {job.n_cells}"] = found
            rows += [
                (f"{title}: {source}, {job.n_cells}", name, *columns(values, found[OURS]["cells_per_s"]))
                for name, values in found.items()
            ]
    head = ("model: cells", "route", "cells/s", "PerturbScope is", "padding", "MiB added", "largest difference")
    text = [table(head, rows), table(("model", "adoption, peak memory", "export, peak memory"), made)]
    return Section("\n".join(text), numbers)


def prepared(title: str, shape: dict[str, Any]) -> tuple[Weights, dict[str, tuple[float, float]]]:
    """Adopt and export a model, each in a process of its own; seconds and peak memory in MiB of both steps."""
    root = BUILT / f"published-{shape['version']}-{shape['layers']}x{shape['width']}"
    shutil.rmtree(root, ignore_errors=True)
    directory, _ = in_child(written, root, shape)
    steps = {"adoption": in_child(adopted, directory, root / "checkpoint")}
    steps["export"] = in_child(exported, root / "checkpoint", root / "bundle")
    shutil.rmtree(directory)
    return Weights(title=title, bundle=root / "bundle", checkpoint=root / "checkpoint"), steps


def written(root: Path, shape: dict[str, Any]) -> Path:
    """Write a directory as published, over the published genes."""
    from perturbscope.cells.vocabulary import GeneVocabulary
    from tests.published import write_published

    name = "geneformer_gc30m" if shape["version"] == "V1" else "geneformer_gc95m"
    return write_published(root, vocabulary=GeneVocabulary.named(name), init_sd=0.02, **shape)[0]


def adopted(directory: Path, output: Path) -> float:
    """Adopt a directory; seconds, imports included."""
    started = time.perf_counter()
    from training.commands.adopt import adopt

    adopt(directory, output)
    return time.perf_counter() - started


def exported(checkpoint: Path, bundle: Path) -> float:
    """Export a checkpoint; seconds, imports included."""
    started = time.perf_counter()
    from export.pipeline import export_checkpoint

    export_checkpoint(checkpoint, bundle, name="published", version="0")
    return time.perf_counter() - started
