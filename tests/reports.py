"""A small report with every section, for tests of the page; its map is a random one."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd

from perturbscope.analysis.umap import Projector
from perturbscope.cells.counts import CountMatrix
from perturbscope.report import Report, build_report
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.results import ScoreOptions

EVIL = "<script>alert('x')</script>&\"quoted\""
"""A label that a page must not run."""
OPTIONS = ScoreOptions(metrics=("e_distance", "cosine_e_distance"), permutations=199)


def first_two(values, /, *, n_neighbors, min_dist, seed):
    """Make a map without scranpy, from the first two dimensions."""
    return np.asarray(values, dtype=np.float32)[:, :2]


@cache
def make_report(*, names: int = 6, seed: int = 0, title: str = "Screen", projector: Projector = first_two) -> Report:
    """Make a report of perturbations ``gene0`` (strongest) and on, one with a malicious name, and one of four cells."""
    rng = np.random.default_rng(seed)
    sizes = {"control": 80, EVIL: 24, "few": 4, **{f"gene{i}": 24 for i in range(names)}}
    labels = np.repeat(list(sizes), list(sizes.values())).tolist()
    vectors = rng.normal(size=(len(labels), 4)) + 1
    counts = rng.poisson(3.0, size=(len(labels), 12))
    for i in range(names):
        rows = [row for row, label in enumerate(labels) if label == f"gene{i}"]
        vectors[rows, i % 2] += 3.0 * 0.75**i
        counts[rows, : max(0, 6 - 2 * i)] *= 3
    counts[:, 0] += 1
    cells = CountMatrix.from_matrix(counts, [f"ENSG{i:011d}" for i in range(12)])
    scores = score_perturbations(vectors, labels, control="control", options=OPTIONS)
    return build_report(
        vectors.astype(np.float32),
        labels,
        scores,
        title=title,
        options=OPTIONS,
        batches=[f"b{i % 8}" for i in range(len(labels))],
        cells=cells,
        enrichment=pd.DataFrame({"gene_set": [EVIL, "RESPONSE_TO_TESTS"], "n": [3, 4], "p": [0.0002, 0.4]}),
        projector=projector,
    )
