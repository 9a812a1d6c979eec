"""Cells per CPU second of the rank tokenizer against the plain per-cell loop, in one process and on one thread.

    python benchmarks/tokenizer.py [--repeats 7] [--out benchmarks/tokenizer.json] [FILE.h5ad ...]

All three routes start from the same validated counts in memory, with genes resolved, and give the same tokens, which
is checked before anything is timed:

- PerturbScope: ``family.tokenize``, with all that it reports besides (genes resolved again, share of known counts,
  genes detected);
- loop: the published algorithm (Theodoris et al. 2023) cell by cell, count / total * 10,000 / median, sorted with
  numpy's default ``argsort``, which leaves ties in any order;
- loop, ties: the same with ties in the order of token ids (``lexsort``), which is what PerturbScope promises.

Reading files is not timed. Seconds are those of the CPU, of which there is one thread, so waiting for a busy machine
does not count; routes take turns, so that what still disturbs them disturbs all. Medians over the repeats.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np

from perturbscope.counts import CountMatrix
from perturbscope.families.rank import RankFamily, build
from perturbscope.genes import GeneVocabulary

DATA = Path(__file__).resolve().parent.parent / "data"
FILES = ("kang2018_ifnb_pbmc", "baron2016_pancreas", "pbmc3k_10x", "papalexi2021_eccite_thp1_panel")
MAX_LENGTH = 2048


def plain_loop(cells: CountMatrix, family: RankFamily, *, ties: bool) -> list[np.ndarray]:
    """Tokens of each cell by the published algorithm, one cell at a time."""
    rows = family.resolver.map(cells.gene_ids, family.vocabulary).rows
    tokens = np.where(rows >= 0, family.vocabulary.tokens[rows], -1)
    medians = np.where(rows >= 0, family.vocabulary.medians[rows], np.nan)
    data, indices, indptr = cells.counts.data, cells.counts.indices, cells.counts.indptr
    found = []
    for cell in range(len(cells)):
        entries = slice(indptr[cell], indptr[cell + 1])
        columns = indices[entries]
        known = tokens[columns] >= 0
        columns = columns[known]
        values = data[entries][known] / cells.totals[cell] * 10_000 / medians[columns]
        token = tokens[columns]
        order = np.lexsort((token, -values)) if ties else np.argsort(-values)
        found.append(token[order][:MAX_LENGTH])
    return found


def read(path: Path) -> CountMatrix:
    cells = anndata.read_h5ad(path)
    return CountMatrix.from_matrix(cells.X, cells.var_names)


def measure(cells: CountMatrix, family: RankFamily, repeats: int) -> dict[str, float]:
    """Median cells per second of each route."""
    routes: dict[str, Callable[[], object]] = {
        "perturbscope": lambda: family.tokenize(cells),
        "loop": lambda: plain_loop(cells, family, ties=False),
        "loop, ties": lambda: plain_loop(cells, family, ties=True),
    }
    assert_equal(cells, family)
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(repeats):
        for name, route in routes.items():
            started = time.process_time()
            route()
            seconds[name].append(time.process_time() - started)
    return {name: len(cells) / statistics.median(times) for name, times in seconds.items()}


def assert_equal(cells: CountMatrix, family: RankFamily) -> None:
    ours = family.tokenize(cells).arrays["input_ids"]
    for ties in (False, True):
        np.testing.assert_array_equal(ours, np.concatenate(plain_loop(cells, family, ties=ties)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[DATA / f"{name}.h5ad" for name in FILES])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    family = build({"max_length": MAX_LENGTH}, GeneVocabulary.geneformer_gc30m())
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {options.repeats} repeats, one thread\n")
    print(
        "| file | cells | genes a cell | PerturbScope, cells/s | loop, cells/s | loop with ties, cells/s | speed-up |"
    )
    print("|---|---|---|---|---|---|---|")
    results = []
    for path in options.files:
        cells = read(path)
        rates = measure(cells, family, options.repeats)
        genes = float(np.median(cells.counts.getnnz(axis=1)))
        ours, loop, ties = rates.values()
        print(
            f"| {path.stem} | {len(cells):,} | {genes:,.0f} | {ours:,.0f} | {loop:,.0f} | {ties:,.0f} "
            f"| {ours / loop:.1f} x, {ours / ties:.1f} x |",
            flush=True,
        )
        results.append({"file": path.stem, "cells": len(cells), "genes": genes, "cells_per_second": rates})
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
