"""Writes benchmarks/degs.md: genes called where nothing was done, p of rare genes, gene sets, time beside scanpy.

    python -m benchmarks.degs

It takes about a minute and a half of processor time.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse, stats

from perturbscope.analysis.degs import DegOptions, DegScreen
from perturbscope.analysis.expression_sets import rank_sum_z
from perturbscope.analysis.rank_test import RankTester, exchange_p, log_normalized
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import open_cells
from perturbscope.scoring.statistics import benjamini_hochberg

ROOT = Path(__file__).resolve().parents[1]
KANG, PAPALEXI = "kang2018_ifnb_pbmc.h5ad", "papalexi2021_eccite_thp1_panel.h5ad"
TOTALS = {PAPALEXI: "total_umi_full_transcriptome"}
CONTROLS = 1000


def read(name: str) -> tuple[CountMatrix, np.ndarray, np.ndarray]:
    with open_cells(ROOT / "data" / name, total_counts_key=TOTALS.get(name)) as source:
        return source.read(), source.labels("perturbation"), source.labels("cell_type")


def controls_of(name: str) -> sparse.csr_matrix:
    """Values of the controls of the commonest cell type."""
    cells, labels, types = read(name)
    control = labels == "control"
    kinds, counts = np.unique(types[control].astype(str), return_counts=True)
    return log_normalized(cells[np.flatnonzero(control & (types == kinds[counts.argmax()]))])


def splits(
    values: sparse.csr_matrix, n: int, count: int, seed: int = 0
) -> Iterator[tuple[RankTester, sparse.csr_matrix]]:
    rng = np.random.default_rng([seed, n])
    for _ in range(count):
        order = rng.permutation(values.shape[0])[: n + CONTROLS]
        yield RankTester(values[order[n:]]), values[order[:n]]


def null(count: int) -> pd.DataFrame:
    rows = []
    for name in (KANG, PAPALEXI):
        values = controls_of(name)
        for n in (5, 20, 50, 200):
            found: dict[str, list[tuple[int, int]]] = {}
            for tester, group in splits(values, n, count):
                result = tester.test(group)
                either = np.maximum(result.expressed, result.expressed_control) >= 0.05
                for what, tested, p in (
                    ("5 % of either group, normal p", either, result.p_normal),
                    ("5 % of all, normal p", result.pooled >= 0.05, result.p_normal),
                    ("1 % of all, normal p", result.pooled >= 0.01, result.p_normal),
                    ("5 % of all, p of exchanges", result.pooled >= 0.05, result.p),
                    ("1 % of all, p of exchanges (the default)", result.pooled >= 0.01, result.p),
                    ("every gene, p of exchanges", ~result.constant, result.p),
                ):
                    degs = int((benjamini_hochberg(p[tested & ~result.constant]) < 0.05).sum())
                    found.setdefault(what, []).append((degs, int(tested.sum())))
            for what, numbers in found.items():
                degs, tested = np.array(numbers).T
                rows.append((name, n, what, tested.mean(), degs.mean(), (degs > 0).mean()))
    return pd.DataFrame(
        rows, columns=["controls of", "cells", "genes tested", "tested", "genes called", "share with any"]
    )


def exchanges(draws: int) -> pd.DataFrame:
    """p of sparse genes beside random exchanges of labels, at the true p where enough of them reach it."""
    rng = np.random.default_rng(0)
    rates = np.geomspace(0.003, 3, 40)
    rows = []
    for n, m in ((5, 200), (20, 1000), (200, 1000)):
        counts = rng.poisson(rates, size=(n + m, len(rates)))
        values = np.log1p(counts * 10_000 / rng.lognormal(8, 0.4, size=(n + m, 1))).astype(np.float32)
        ranks = stats.rankdata(values, axis=0)
        sums = np.array([ranks[rng.permutation(n + m)[:n]].sum(axis=0) for _ in range(draws)])
        ordered = np.sort(sums, axis=0)
        expecting = (values > 0).sum(axis=0)
        expected = min(n, m) * expecting / (n + m)
        tester = RankTester(sparse.csr_matrix(values[n:]))
        parts = next(iter(tester._batches.values())).against(sparse.csr_matrix(values[:n]))
        for share in (0.05, 0.01, 0.001):
            w = ordered[int((1 - share) * draws)]
            upper = (sums >= w - 1e-6).mean(axis=0)
            true = np.minimum(2 * np.minimum(upper, (sums <= w + 1e-6).mean(axis=0)), 1)
            mine = exchange_p([parts._replace(u=w - n * (n + 1) / 2)])
            z = (w - n * (n + m + 1) / 2) / np.sqrt(n * m / (n + m) * ranks.var(axis=0, ddof=1))
            normal = 2 * stats.norm.sf(np.abs(z))
            for low, high in ((0, 1), (1, 10), (10, 50)):
                of = (expected >= low) & (expected < high) & (true * draws > 60)
                if of.any():
                    ratio, other = mine[of] / true[of], normal[of] / true[of]
                    spread = [f"{ratio.min():.2f} to {ratio.max():.2f}", f"{other.min():.2g} to {other.max():.2g}"]
                    rows.append((n, m, f"{low} to {high}", share, int(of.sum()), *spread))
    columns = [
        "cells",
        "controls",
        "expressing cells expected",
        "upper tail",
        "genes",
        "exchanges / true",
        "normal / true",
    ]
    return pd.DataFrame(rows, columns=columns)


def sets_of_nothing(count: int) -> pd.DataFrame:
    """Share of p below 0.05 for sets of 30 genes between controls and controls."""
    values = controls_of(KANG)
    rng = np.random.default_rng(1)
    dense = np.flatnonzero(np.diff(values.tocsc().indptr) >= 0.1 * values.shape[0])
    correlation = np.corrcoef(values[:, dense].toarray().T)
    chosen = rng.choice(len(dense), 60, replace=False)
    kinds = {
        "random genes": [rng.choice(dense, 30, replace=False) for _ in chosen],
        "genes that are expressed together": [dense[np.argsort(-correlation[gene])[:30]] for gene in chosen],
    }
    inside = [correlation[np.ix_(rows, rows)][np.triu_indices(30, 1)].mean()
              for rows in (np.searchsorted(dense, np.sort(genes)) for genes in kinds["genes that are expressed together"])]  # fmt: skip
    rows = []
    for n in (50, 200):
        p: dict[tuple[str, float], list[np.ndarray]] = {}
        for tester, group in splits(values, n, count, seed=2):
            result = tester.test(group)
            tested = np.flatnonzero((result.pooled >= 0.01) & ~result.constant)
            for kind, sets in kinds.items():
                members = sparse.lil_matrix((len(sets), values.shape[1]))
                for row, genes in enumerate(sets):
                    members[row, genes] = 1
                for assumed in (0.0, 0.01):
                    z = rank_sum_z(result.statistic[tested], members.tocsr()[:, tested], assumed)
                    p.setdefault((kind, assumed), []).append(2 * stats.norm.sf(np.abs(z)))
        for (kind, assumed), values_of in p.items():
            mean = f"{np.mean(inside):.2f}" if "together" in kind else "about 0"
            rows.append((kind, mean, n, assumed, float((np.concatenate(values_of) < 0.05).mean())))
    columns = ["sets of 30", "mean correlation inside", "cells", "correlation assumed", "p below 0.05"]
    return pd.DataFrame(rows, columns=columns)


def beside_scanpy() -> pd.DataFrame:
    import anndata
    import scanpy

    rows = []
    for name in (PAPALEXI, KANG):
        cells, labels, _ = read(name)
        labels = np.array([str(label) for label in labels])
        options = DegOptions(min_expressed=0.0, exclude_target=False, max_controls=10**9)
        started = time.process_time()
        ours = DegScreen(cells, labels.tolist(), control="control", options=options).result().table
        own = time.process_time() - started
        adata = anndata.AnnData(log_normalized(cells), obs=pd.DataFrame({"label": pd.Categorical(labels)}))
        adata.obs_names = [str(row) for row in range(len(labels))]
        adata.var_names = cells.gene_ids.tolist()
        groups = [label for label in sorted(set(labels)) if label != "control"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            started = time.process_time()
            scanpy.tl.rank_genes_groups(
                adata, "label", groups=groups, reference="control", method="wilcoxon", tie_correct=True
            )
            theirs = time.process_time() - started
            table = scanpy.get.rank_genes_groups_df(adata, None if len(groups) > 1 else groups[0])
        table["group"] = table["group"].astype(str) if "group" in table else groups[0]
        both = ours.merge(table, left_on=["perturbation", "gene"], right_on=["group", "names"])
        difference = np.abs(both["statistic"] - both["scores"]).max()
        with np.errstate(divide="ignore"):
            seen = (both["pvals"] > 1e-300) & (both["p_normal"] > 1e-300)
            logs = np.abs(np.log10(both["p_normal"][seen]) - np.log10(both["pvals"][seen])).max()
        rows.append((name, len(groups), len(cells), cells.n_genes, own, theirs, len(both), difference, logs))
    columns = ["file", "perturbations", "cells", "genes", "CPU s", "scanpy's CPU s", "pairs compared",
               "most that z differs", "most that log10 p differs"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def large(n_cells: int = 20_000, n_genes: int = 20_000, n_perturbations: int = 90) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    share = np.minimum(0.9, 0.1 * rng.lognormal(-1, 1.5, n_genes))
    parts = [sparse.random(n_cells, 1000, density=float(share[start : start + 1000].mean()), format="csc", dtype=np.float32,
                           rng=rng) for start in range(0, n_genes, 1000)]  # fmt: skip
    matrix = sparse.hstack(parts, format="csr")
    matrix.data = 1 + np.floor(3 * matrix.data**3)
    cells = CountMatrix.from_matrix(matrix, [f"g{number}" for number in range(n_genes)])
    labels = np.array(["control", *(f"p{number}" for number in range(n_perturbations))])
    of_cell = labels[np.where(rng.random(n_cells) < 0.1, 0, rng.integers(1, n_perturbations + 1, n_cells))].tolist()
    batches = rng.integers(4, size=n_cells).astype(str).tolist()
    del parts, matrix
    rows = []
    for what, within in (("no batches", None), ("four batches", batches)):
        wall, cpu = time.perf_counter(), time.process_time()
        DegScreen(cells, of_cell, control="control", batches=within).counts()
        rows.append((what, int(cells.counts.nnz / 1e6), time.perf_counter() - wall, time.process_time() - cpu))
    columns = ["cells x genes: 20,000 x 20,000", "million counts", "s", "CPU s"]
    return pd.DataFrame(rows, columns=columns)


def shown(table: pd.DataFrame) -> str:
    def text(value: object) -> str:
        return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else (
            f"{value:,.0f}" if isinstance(value, float | int) and not isinstance(value, bool) else str(value))  # fmt: skip

    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(text, row)) + " |" for row in table.itertuples(index=False))])


# ruff: noqa: E501
PAGE = """# Differentially expressed genes

Made by `python -m benchmarks.degs` on {machine}.

## Where nothing was done

Random groups of controls against {controls} others, {splits} times each: no gene differs, and every gene that is called
(q < 0.05 within the group) is false. The first row of each size was this project's rule up to version 0.1: which genes
"5 % of either group" express depends on the labels, and in a small group it picks those that one cell has by chance; the
normal p of such genes is wrong as well. A filter that is blind to labels removes most of them, p of the exchanges of
labels the rest.

{null}

## p of genes that few cells express

p at a tail of the true distribution, found by {draws} random exchanges of labels, beside that distribution: the least and
the largest ratio over simulated genes, by the number of expressing cells that is expected in the smaller group. Below 1
is too bold. p of the exchanges is taken below an expected number of 50.

{exchanges}

## Gene sets where nothing was done

Groups of controls against {controls} others, {set_splits} times 60 sets: a right p is below 0.05 in a twentieth. The
correlation that is assumed by default covers what genes share at random. Sets of genes that rise and fall together in
these cells are called too often all the same: what such a set says is that the group's cells differ in that programme,
which a chance sample of cells can. Compare with the same set in perturbations of as many cells, or raise `correlation`.

{sets}

## Beside scanpy

All genes, `rank_genes_groups(method="wilcoxon", tie_correct=True)`, reference control; both from log-normalised counts.
Ours has p of the exchanges and fold changes in it. p is that of a normal z (`p_normal`).

{scanpy}

## A large screen

A made-up screen of 90 perturbations of about 200 cells and 2,000 controls, on {cores} cores.

{large}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "degs.md")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--draws", type=int, default=20_000)
    given = parser.parse_args()
    from perturbscope.threads import usable_cores

    page = PAGE.format(
        machine=f"{platform.system()}, {platform.machine()}, {usable_cores()} cores shared with other work",
        controls=f"{CONTROLS:,}", splits=given.splits, draws=f"{given.draws:,}", set_splits=20, cores=usable_cores(),
        null=shown(null(given.splits)), exchanges=shown(exchanges(given.draws)), sets=shown(sets_of_nothing(20)),
        scanpy=shown(beside_scanpy()), large=shown(large()),
    )  # fmt: skip
    given.out.write_text(page, encoding="utf-8")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
