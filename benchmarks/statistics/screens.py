"""Simulated screens and how they are scored; it uses the public functions alone, so that other versions can run it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from perturbscope import ScoreOptions, score_perturbations

Rows = list[dict[str, Any]]
RAW = {"normalize": False, "min_cells": 10}
DESIGNS = ("iso", "correlated", "heavy", "outliers", "mixture")


def cells(kind: str, n: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return n cells of one of five kinds of data, [n, width]."""
    x = rng.normal(size=(n, width))
    if kind == "correlated":
        turn = np.linalg.qr(np.random.default_rng(1).normal(size=(width, width)))[0]
        return x / np.arange(1, width + 1) ** 0.75 @ turn
    if kind == "heavy":
        return rng.standard_t(2.5, size=(n, 1)) * x
    if kind == "outliers":
        x[rng.random(n) < 0.05] *= 10
    if kind == "mixture":
        centres = np.random.default_rng(2).normal(size=(4, width)) * 2
        return x + centres[rng.choice(4, n, p=[0.6, 0.3, 0.08, 0.02])]
    return x


def _rates(table: Any, z: str = "z", p: str = "p") -> dict[str, Any]:
    from scipy.stats import kstest

    values, scores = table[p].dropna().to_numpy(), table[z].dropna().to_numpy()
    if not len(values) or not len(scores):
        return {"tests": 0, "p <= 0.05": "-", "p <= 0.01": "-", "KS": "-", "z mean": "-", "z sd": "-", "z > 3": "-"}
    return {
        "tests": len(values),
        "p <= 0.05": f"{(values <= 0.05).mean():.3f}",
        "p <= 0.01": f"{(values <= 0.01).mean():.4f}",
        "KS": f"{kstest(values, 'uniform').statistic:.3f}",
        "z mean": f"{scores.mean():.2f}",
        "z sd": f"{scores.std():.2f}",
        "z > 3": f"{(scores > 3).mean():.3f}",
    }


def type1(scale: float) -> Rows:
    """Error rates of perturbations without effect: five kinds of data, equal and unequal sizes, three tests."""
    import pandas as pd

    rows = []
    for kind in DESIGNS:
        for sizes in ("equal", "unequal"):
            found: dict[str, list[Any]] = {"plain": [], "batches": [], "units": []}
            for seed in range(max(2, round(8 * scale))):
                rng = np.random.default_rng(seed)
                n = np.full(25, 50)
                if sizes == "unequal":
                    n = np.exp(rng.uniform(np.log(12), np.log(300), 25)).astype(int)
                wells = np.concatenate([np.arange(25).repeat(n), 25 + np.arange(600) // 25])
                labels = np.array([f"p{i}" for i in range(25)] + ["c"])[np.minimum(wells, 25)]
                x = cells(kind, len(wells), 15, rng)
                options = ScoreOptions(seed=seed, permutations=999, **RAW)
                found["plain"].append(score_perturbations(x, labels, control="c", options=options).table)
                batch = rng.integers(4, size=len(x))
                shifted = x + 1.5 * rng.normal(size=(4, 15))[batch]
                found["batches"].append(
                    score_perturbations(shifted, labels, control="c", batches=batch.astype(str), options=options).table
                )
                effect = np.sqrt(0.05) * rng.normal(size=(wells.max() + 1, 15))[wells]
                units = wells.astype(str)
                found["units"].append(
                    score_perturbations(x + effect, labels, control="c", units=units, options=options).table
                )
            for test, tables in found.items():
                table = pd.concat(tables)
                names = {"z": "z_unit", "p": "p_unit"} if test == "units" else {}
                rows.append({"data": kind, "sizes": sizes, "test": test, **_rates(table, **names)})
    return rows


def batches(scale: float) -> Rows:
    """Screens with six batches one sd apart, and other compositions than the controls have."""
    rows = []
    plans = {
        "no shift": (0.0, 1.0),
        "same composition": (1.0, 1e6),
        "other compositions": (1.0, 1.0),
        "one batch each": (1.0, 0.01),
    }
    for name, (shift, concentration) in plans.items():
        p, z, top = [], [], []
        for seed in range(max(2, round(8 * scale))):
            rng = np.random.default_rng(seed)
            places = rng.normal(size=(6, 15))
            places *= shift / np.linalg.norm(places, axis=1)[:, None]
            batch = [rng.choice(6, 60, p=rng.dirichlet(np.full(6, concentration))) for _ in range(25)]
            batch.append(rng.choice(6, 600))
            codes = np.concatenate(batch)
            labels = np.array([f"p{i}" for i in range(25)] + ["c"]).repeat([60] * 25 + [600])
            x = rng.normal(size=(len(codes), 15)) + places[codes]
            x[:60] += 0.45 * np.eye(15)[0]
            options = ScoreOptions(seed=seed, permutations=499, **RAW)
            table = score_perturbations(x, labels, control="c", batches=codes.astype(str), options=options).table
            top.append(table["perturbation"].iloc[0] == "p0")
            null = table[table["perturbation"] != "p0"]
            p.append(null["p"].to_numpy())
            z.append(null["z"].to_numpy())
        p_all, z_all = np.concatenate(p), np.concatenate(z)
        rows.append(
            {
                "screen": name,
                "null tests": int(np.isfinite(p_all).sum()),
                "p <= 0.05": f"{np.nanmean(p_all[np.isfinite(p_all)] <= 0.05):.3f}",
                "z mean": f"{np.nanmean(z_all):.2f}",
                "z sd": f"{np.nanstd(z_all):.2f}",
                "z > 3": f"{np.nanmean(z_all[np.isfinite(z_all)] > 3):.3f}",
                "a real effect of 0.45 sd ranks first": f"{np.mean(top):.2f}",
            }
        )
    return rows


def units(scale: float) -> Rows:
    """Wells with an intra-class correlation, one for each perturbation, and 40 of controls."""
    import pandas as pd

    rows = []
    plans = ((0.0, 50, 0.0), (0.05, 50, 0.0), (0.05, 25, 0.0), (0.05, 100, 0.0), (0.05, 50, 1.0), (0.05, 50, 2.0))
    for icc, n, effect in plans:
        tables = []
        for seed in range(max(2, round(12 * scale))):
            rng = np.random.default_rng(seed)
            wells = np.concatenate([np.arange(12).repeat(n), 12 + np.arange(2000) // 50])
            x = np.sqrt(icc) * rng.normal(size=(52, 15))[wells] + np.sqrt(1 - icc) * rng.normal(size=(len(wells), 15))
            directions = rng.normal(size=(12, 15))
            directions *= effect / np.linalg.norm(directions, axis=1)[:, None]
            x[: 12 * n] += directions.repeat(n, axis=0)
            labels = np.array([f"p{i}" for i in range(12)] + ["c"])[np.minimum(wells, 12)]
            options = ScoreOptions(seed=seed, permutations=499, **RAW)
            tables.append(score_perturbations(x, labels, control="c", units=wells.astype(str), options=options).table)
        table = pd.concat(tables)
        rows.append(
            {
                "icc": icc,
                "cells": n,
                "shift": effect,
                "tests": len(table),
                "p <= 0.05 over cells": f"{(table['p'] <= 0.05).mean():.3f}",
                "p_unit <= 0.05": f"{(table['p_unit'] <= 0.05).mean():.3f}",
                "z_unit mean": f"{table['z_unit'].mean():.2f}",
                "z_unit sd": f"{table['z_unit'].std():.2f}",
            }
        )
    return rows


def wasserstein(scale: float) -> Rows:
    """z and p of the Wasserstein distance without effect, by the share of cells to controls."""
    rows = []
    for n, m in ((30, 400), (50, 200), (50, 100)):
        rng = np.random.default_rng(n + m)
        count = max(20, round(150 * scale))
        x = rng.normal(size=(count * n + m, 6))
        labels = np.array([f"p{i}" for i in range(count)] + ["c"]).repeat([n] * count + [m])
        options = ScoreOptions(metrics=("wasserstein",), wasserstein_permutations=99, **RAW)
        table = score_perturbations(x, labels, control="c", options=options).table
        rows.append({"cells": n, "controls": m, **_rates(table)})
    return rows


def sparse(scale: float) -> Rows:
    """Screens in which few perturbations are real."""
    rows = []
    for count, n, real in ((1000, 40, 15), (round(10_000 * min(scale, 1)), 200, round(50 * min(scale, 1)))):
        rng = np.random.default_rng(1)
        scales = 1 / np.arange(1, 21) ** 0.5
        x = (rng.normal(size=(count * n + 1000, 20)) * scales).astype(np.float32)
        x[:, 0] += 2
        for hit in range(real):
            x[hit * n : (hit + 1) * n] += 1.5 * rng.normal(size=20) * scales
        labels = np.array([f"p{i:05d}" for i in range(count)] + ["c"], dtype=object).repeat([n] * count + [1000])
        began = time.perf_counter()
        table = score_perturbations(x, labels, control="c").table.set_index("perturbation")
        seconds = time.perf_counter() - began
        hits = table.loc[[f"p{i:05d}" for i in range(real)]]
        rows.append(
            {
                "perturbations": count,
                "cells": n,
                "real": real,
                "real with q < 0.05": int((hits["q"] < 0.05).sum()),
                "others with q < 0.05": int((table["q"] < 0.05).sum() - (hits["q"] < 0.05).sum()),
                "real with p_tail": int(hits["p_tail"].notna().sum()),
                "largest p_tail": f"{hits['p_tail'].max():.1e}",
                "exchanges, mean": f"{table['exchanges'].mean():.0f}",
                "seconds": f"{seconds:.1f}",
            }
        )
    return rows


def seconds(scale: float) -> Rows:
    """Time of a screen without effects, by exchanges asked for and perturbations."""
    rows = []
    for count, draws in ((100, 999), (100, 1000), (100, 1001), (100, 4000), (100, None), (300, None), (1000, None)):
        rng = np.random.default_rng(1)
        x = rng.normal(size=(count * 40 + 1000, 20)) + 2
        labels = np.array([f"p{i}" for i in range(count)] + ["c"]).repeat([40] * count + [1000])
        row: dict[str, Any] = {"perturbations": count, "permutations": "default" if draws is None else draws}
        for name, stop in (("sequential, s", 20), ("all drawn, s", 0)):
            if stop == 0 and draws is None:
                row[name] = "-"
                continue
            began = time.perf_counter()
            score_perturbations(x, labels, control="c", options=ScoreOptions(permutations=draws, exceedances=stop))
            row[name] = f"{time.perf_counter() - began:.1f}"
        rows.append(row)
    return rows
