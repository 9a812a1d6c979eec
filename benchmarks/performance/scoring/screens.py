"""Screens of any size made of real cells, and the Papalexi cells that the peers score."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD

from benchmarks.performance.harness import DATA
from evaluation.baselines import log_cp10k, pca
from perturbscope.cells.readers import open_cells

CONTROL = "control"
PEER_LABELS = (CONTROL, "ATF2", "IFNGR2", "JAK2", "STAT1", "TNFRSF14")
MIXED = 0.3
"""Share of the difference of two other cells that is added to a cell."""
EFFECT = 0.2
"""Share of the difference of two cells by which the cells of every tenth perturbation are moved."""
_CHUNK = 50_000


@dataclass(frozen=True)
class Shape:
    """Numbers of a screen: perturbations, cells of each, controls, width, and batches (0: none)."""

    perturbations: int
    cells: int = 200
    controls: int = 75_000
    width: int = 256
    batches: int = 0

    @property
    def n(self) -> int:
        """Number of cells."""
        return self.perturbations * self.cells + self.controls


def papalexi() -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Return PCA-50 [6864, 50] of the controls and five targets of the Papalexi panel, and their labels."""
    path = DATA / "papalexi2021_eccite_thp1_panel.h5ad"
    with open_cells(path, total_counts_key="total_umi_full_transcriptome") as source:
        cells, labels = source.read(), source.obs["perturbation"].astype(str).to_numpy()
    rows = np.flatnonzero(np.isin(labels, PEER_LABELS))
    return pca(cells[rows]).astype(np.float64), labels[rows].astype(str)


def real_components(width: int) -> NDArray[np.float32]:
    """Scores of log CP10k on the first singular vectors, centred, of all cells of Kang et al., [cells, width]."""
    with open_cells(DATA / "kang2018_ifnb_pbmc.h5ad") as source:
        values = log_cp10k(source.read())
    values = values[:, np.flatnonzero(values.getnnz(axis=0) > 50)]
    scores: NDArray[np.float32] = TruncatedSVD(width, n_iter=4, random_state=0).fit_transform(values).astype(np.float32)
    scores -= scores.mean(axis=0)
    return scores


def write_screen(path: Path, components: NDArray[np.float32], shape: Shape) -> None:
    """Write the vectors, float32 .npy [n, width]: the controls, then one perturbation after the other.

    A cell is a real cell plus `MIXED` of the difference of two others, all three drawn at random: no two are copies,
    and the covariance is that of real cells. Cells of every tenth perturbation are moved by `EFFECT` of the difference
    of two real cells, and those of a batch by as much of another.
    """
    rng = np.random.default_rng(0)
    real = components[:, : shape.width]
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(shape.n, shape.width))

    def differences(count: int, share: float) -> NDArray[np.float32]:
        a, b = rng.integers(len(real), size=(2, count))
        found: NDArray[np.float32] = np.float32(share) * (real[a] - real[b])
        return found

    batches = batch_codes(shape)
    offsets = differences(max(shape.batches, 1), EFFECT)
    moves = differences(shape.perturbations, EFFECT)
    moves[np.arange(shape.perturbations) % 10 != 0] = 0
    moves = np.concatenate([np.zeros_like(moves[:1]), moves])
    for start in range(0, shape.n, _CHUNK):
        cells = np.arange(start, min(start + _CHUNK, shape.n))
        rows = real[rng.integers(len(real), size=len(cells))] + differences(len(cells), MIXED)
        rows += moves[np.maximum(cells - shape.controls, -1) // shape.cells + 1]
        out[cells] = rows if batches is None else rows + offsets[batches[cells]]
    out.flush()


def labels_of(shape: Shape) -> NDArray[np.str_]:
    """Return the label of each cell."""
    names = np.array([f"gene{i:05d}" for i in range(shape.perturbations)])
    return np.concatenate([np.full(shape.controls, CONTROL), np.repeat(names, shape.cells)])


def batch_codes(shape: Shape) -> NDArray[np.int64] | None:
    """Draw the batch of each cell."""
    return np.random.default_rng(1).integers(shape.batches, size=shape.n) if shape.batches else None


def score_file(path: Path, shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
    """Score a screen from its memory-mapped file; for a process of its own.

    Returns
    -------
    ``seconds`` in all, ``by_metric`` those of each metric, ``first`` those before the first score, and ``found``: by
    metric, how many of the moved perturbations and of the others have q < 0.05.
    """
    from perturbscope.scoring.control import score_perturbations
    from perturbscope.scoring.results import ScoreOptions

    values = np.load(path, mmap_mode="r")
    labels, batches = labels_of(shape), batch_codes(shape)
    chosen = ScoreOptions.from_dict(options)
    times: dict[int, float] = {}

    def progress(_: str, done: int, __: int) -> None:
        times[done] = time.perf_counter()

    started = time.perf_counter()
    result = score_perturbations(
        values,
        labels.tolist(),
        control=CONTROL,
        batches=None if batches is None else batches.astype(str).tolist(),
        options=chosen,
        progress=progress,
    )
    ended = time.perf_counter()
    ends = [times[shape.perturbations * (i + 1)] for i in range(len(chosen.metrics))]
    table = result.table
    moved = table["perturbation"].str[4:].astype(int) % 10 == 0
    hit = table["q"] < 0.05
    return {
        "seconds": ended - started,
        "by_metric": dict(zip(chosen.metrics, np.diff([started, *ends]).tolist(), strict=True)),
        "first": times[1] - started,
        "found": {
            metric: [int((hit & moved & (table["metric"] == metric)).sum()), int((hit & ~moved & own).sum())]
            for metric in chosen.metrics
            for own in [table["metric"] == metric]
        },
    }
