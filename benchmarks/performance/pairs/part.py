"""Distances between all pairs of perturbations, and Wasserstein distances.

    FULL=1 python -m benchmarks.performance pairs

also maps 10,000 perturbations x 200 cells by the unsquared Euclidean distance, every pair of cells: hours.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._peers import ask
from benchmarks.performance.harness import Options, Section, Watch, in_child, matmul_ceiling, table
from benchmarks.performance.pairs.small import MOST, TRANSPORTED, against_peers, landmark_errors, papalexi
from benchmarks.performance.pairs.transport import transports
from perturbscope.scoring.energy.all_pairs import TILE_CELLS
from perturbscope.scoring.pair_map import Method, distance_map
from perturbscope.scoring.results import ScoreOptions
from perturbscope.threads import usable_cores

GROUPS, CELLS, WIDTH = 10_000, 200, 256
"""The screen of a genome."""
EUCLIDEAN_CELLS = (5, 20)
"""Cells of a perturbation in the Euclidean maps that every run makes."""
FULL = "FULL"
"""Environment variable that adds the map of all cells."""


@dataclass(frozen=True)
class Case:
    """One map of random cells around random centres.

    Attributes
    ----------
    name
        Name in the table.
    groups, cells, width
        Number of perturbations, of cells of each, and of dimensions.
    options
        Keywords of :class:`ScoreOptions`.
    method
        Method of :func:`distance_map`.
    """

    name: str
    groups: int
    cells: int
    width: int
    options: dict[str, Any]
    method: Method = "exact"

    @property
    def cell_pairs(self) -> int:
        """Number of pairs of different cells whose distances the map sums."""
        n = self.groups * self.cells
        return n * (n - 1) // 2


def cells_of(case: Case) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Make vectors [groups x cells, width] and labels."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((case.groups * case.cells, case.width), dtype=np.float32)
    by_group = values.reshape(case.groups, case.cells, case.width)
    by_group += 0.3 * rng.standard_normal((case.groups, 1, case.width), dtype=np.float32)
    return values, np.repeat([f"P{i:05d}" for i in range(case.groups)], case.cells)


def make(case: Case) -> tuple[float, float]:
    """Return the seconds of a map and the MiB that it added to its input; for a process of its own."""
    values, labels = cells_of(case)
    chosen = ScoreOptions(min_cells=2, **case.options)
    started = time.perf_counter()
    with Watch() as memory:
        distance_map(values, labels, options=chosen, method=case.method)
    return time.perf_counter() - started, memory.above


def root_rate(cells: int = TILE_CELLS) -> float:
    """Measure square roots a second of a tile in cache, on all usable cores together."""
    values, best = np.ones((cells, cells), dtype=np.float32), math.inf
    for _ in range(50):
        started = time.perf_counter()
        np.sqrt(values, out=values)
        best = min(best, time.perf_counter() - started)
    return usable_cores() * values.size / best


def floor(width: int) -> float:
    """Return distances a second if matrix products ran at the machine's ceiling and each had its root taken."""
    return 1 / (2 * width / matmul_ceiling() + 1 / root_rate())


def run(options: Options) -> Section:
    """Run the whole part."""
    groups, cells = (1000, 50) if options.quick else (GROUPS, CELLS)
    cases = [
        Case("cosine", groups, cells, WIDTH, {"metrics": ("cosine_e_distance",)}),
        Case("squared Euclidean", groups, cells, WIDTH, {"ground": "sqeuclidean"}),
    ]
    cases.append(Case("Euclidean, landmarks", groups, cells, WIDTH, {}, "landmarks"))
    wanted = [*EUCLIDEAN_CELLS, *([cells] if os.environ.get(FULL) else [])]
    cases += [Case("Euclidean", groups, few, WIDTH, {}) for few in wanted]
    rows, numbers = [], []
    for case in cases:
        limit = floor(case.width)
        seconds, memory = in_child(make, case)[0]
        rate = case.cell_pairs / seconds
        dense = case.name == "Euclidean"
        rows.append(
            [
                case.name,
                f"{case.groups:,} x {case.cells} x {case.width}",
                f"{case.groups * (case.groups - 1) // 2 / 1e6:.1f} M",
                f"{seconds:.1f}",
                f"{rate / 1e9:.3f} G/s" if dense else "",
                f"{rate / limit:.0%}" if dense else "",
                f"{memory:,.0f}",
            ]
        )
        numbers.append({"map": case.name, "groups": case.groups, "cells": case.cells, "width": case.width,
                        "seconds": seconds, "rate": rate, "floor": limit, "memory_mib": memory})  # fmt: skip
    columns = ["ground distance", "groups x cells x width", "pairs", "s", "cell pairs", "of the floor", "MiB added"]
    text = "All pairs of perturbations (random vectors). Floor: each squared distance as one entry of a float32 matrix "
    text += "product at the machine's ceiling, and its root; both measured before each row.\n\n" + table(columns, rows)
    peers = None
    if options.peers:
        values, labels = papalexi(50 if options.quick else MOST)
        peers = ask(options.peers, values, labels, "maps", transported=TRANSPORTED, repeats=options.repeats)
    small, small_numbers = against_peers(options, peers)
    near, near_numbers = landmark_errors(options)
    moved, moved_numbers = transports(options, peers)
    found = {"maps": numbers, "real": small_numbers, "landmarks": near_numbers, "wasserstein": moved_numbers}
    return Section("\n".join([text, small, near, moved]), found)
