"""The tail probability beside a million exchanges of the same labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from benchmarks.statistics.screens import DESIGNS, cells
from perturbscope.scoring.energy.matrix import DenseGroup
from perturbscope.scoring.energy.tail import Spectrum, compare_with_exchanges, generalized_pareto

LEVELS = (1e-2, 1e-3, 1e-4, 2.5e-5)


def tails(scale: float) -> list[dict[str, Any]]:
    """Measure the weighted chi-square and a Pareto tail of 10,000 exchanges at known levels, over the truth."""
    rows = []
    draws = round(1_000_000 * scale)
    for kind in DESIGNS:
        for unit in (False, True):
            for n in (10, 50):
                rng = np.random.default_rng(7)
                x = cells(kind, n + 400, 15, rng)
                if unit:
                    x[:, 0] += 3
                    x /= np.linalg.norm(x, axis=1, keepdims=True)
                z = exchanged(x, n, draws, rng)
                spectrum = Spectrum.of(DenseGroup(x[n:]))
                row: dict[str, Any] = {"data": kind, "unit length": "yes" if unit else "no", "cells": n}
                for level in LEVELS:
                    at = float(np.quantile(z, 1 - level))
                    row[f"{level:g}"] = f"{spectrum.p(at) / level:.2f}"
                agreement = compare_with_exchanges(spectrum, z[:30_000])
                row["guard"] = "holds" if agreement.holds else "trips"
                at = float(np.quantile(z, 1 - 1e-4))
                starts = range(0, min(200_000, draws - 9_999), 10_000)
                parts = [generalized_pareto(at, z[i : i + 10_000]) for i in starts]
                row["Pareto at 1e-4, median"] = f"{np.median(parts) / 1e-4:.2f}"
                rows.append(row)
    return rows


def exchanged(x: np.ndarray, n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return standardised energy distances of random groups of n cells from the others, [draws]."""
    d = cdist(x, x).astype(np.float32)
    size, total, rows = len(x), float(d.sum(dtype=np.float64)), d.sum(axis=1, dtype=np.float64)
    m, found = len(x) - n, []
    for start in range(0, draws, 5000):
        count = min(5000, draws - start)
        chosen = np.argpartition(rng.random((count, size), dtype=np.float32), n, axis=1)[:, :n]
        members = np.zeros((count, size), dtype=np.float32)
        np.put_along_axis(members, chosen, 1, axis=1)
        inside = ((members @ d) * members).sum(axis=1, dtype=np.float64)
        reach = rows[chosen].sum(axis=1)
        rest = total - 2 * reach + inside
        found.append(2 * (reach - inside) / (n * m) - inside / (n * (n - 1)) - rest / (m * (m - 1)))
    value = np.concatenate(found)
    return np.asarray((value - value.mean()) / value.std())
