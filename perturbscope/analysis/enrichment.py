"""Enrichment of gene sets at the top of a ranking of perturbations.

For the top n of N ranked perturbations the statistic is k, the number of members of the set among them (Zhao et al.
2025). Two nulls are reported side by side:

plain
    Any n of the N perturbations. 10,000 random draws give ``p``, which cannot be below 1 / 10,001; ``p_exact`` is the
    same probability computed exactly, the tail of the hypergeometric distribution.
stratified
    As many perturbations from each stratum as the top n holds. With deciles of the number of cells as strata this
    removes an effect of the number of cells: perturbations with more cells are measured better, and essential genes
    have fewer. ``p_stratified`` comes from draws, ``p_stratified_exact`` from convolving the strata's distributions.

A draw is a random order of the ranked perturbations, and one order serves all values of n.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special

from perturbscope.cells.genes import GeneResolver
from perturbscope.errors import InvalidParameterError, MalformedMatrixError, MissingColumnError
from perturbscope.scoring.results import release
from perturbscope.scoring.statistics import generator

ENRICHMENT_COLUMNS = (
    "gene_set", "n_genes", "n_members", "n", "k", "expected", "p", "p_exact", "p_adjusted", "p_exact_adjusted",
    "expected_stratified", "p_stratified", "p_stratified_exact", "p_stratified_adjusted", "p_stratified_exact_adjusted",
)  # fmt: skip
"""Columns of a table of enrichment, in order."""
_STEP = 100
_FEW_MEMBERS = 5
_UNKNOWN = (float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class EnrichmentResult:
    """Enrichment of gene sets at the top of a ranking.

    Attributes
    ----------
    table
        One row a set and n, columns :data:`ENRICHMENT_COLUMNS`. `n_genes`: genes of the set; `n_members`: genes of the
        set that were ranked; `k` and `expected`: members among the top n, observed and by chance. The adjusted p-values
        are Bonferroni's over all rows. The stratified columns are NaN without strata.
    provenance
        Options, seed and version that made the numbers (JSON-able).
    warnings
        Sentences that a reader should know before trusting a number.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def best(self) -> pd.DataFrame:
        """Return the row of each set with the smallest exact p, sorted by that p."""
        order = self.table.sort_values(["p_exact", "n"], kind="stable")
        return order.drop_duplicates("gene_set").reset_index(drop=True)


def enrich(
    ranking: Sequence[str],
    gene_sets: Mapping[str, Collection[str]],
    *,
    grid: Sequence[int] | None = None,
    draws: int = 10_000,
    strata: ArrayLike | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> EnrichmentResult:
    """Count members of gene sets at the top of a ranking, and compare with random rankings.

    Parameters
    ----------
    ranking
        Perturbed genes, strongest first, each once. Draws are made from these only, so leave out perturbations of no
        interest.
    gene_sets
        Genes of each set. A gene matches by its name, or by any symbol or Ensembl id of the same gene.
    grid
        Values of n; default :func:`default_grid`.
    draws
        Number of random draws behind `p` and `p_stratified`.
    strata
        Stratum of each ranked perturbation, for the second null (:func:`count_strata`).
    seed
        Seed of the draws.
    progress
        Called as ``progress("enrich", done, total)``, by set.

    Raises
    ------
    InvalidParameterError
        A perturbation is ranked twice, there is no set, or the grid or the number of draws is out of range.
    MalformedMatrixError
        The number of strata differs from the number of perturbations.
    """
    names = [str(name) for name in ranking]
    n_ranked = len(names)
    _check_ranking(names)
    if not gene_sets:
        raise InvalidParameterError("There are no gene sets.", field="gene_sets")
    if draws < 1:
        raise InvalidParameterError(f"draws is {draws}; it must be 1 or more.", field="draws")
    tops = default_grid(n_ranked) if grid is None else _check_grid(grid, n_ranked)
    codes = None if strata is None else _codes(strata, n_ranked)
    members_by_set = {name: members_of(names, genes) for name, genes in gene_sets.items()}
    tested = [name for name, members in members_by_set.items() if members.any()]
    n_tests = len(tested) * len(tops)
    rows = []
    for done, name in enumerate(tested, start=1):
        members = members_by_set[name]
        rng = generator(seed, "enrich", name)
        plain = _null(members, np.zeros(n_ranked, dtype=np.intp), tops, draws, rng)
        within = [_UNKNOWN] * len(tops) if codes is None else _null(members, codes, tops, draws, rng)
        for at, n in enumerate(tops):
            row = {"gene_set": name, "n_genes": len(set(gene_sets[name])), "n_members": int(members.sum())}
            row |= {"n": n, "k": int(members[:n].sum())}
            for suffix, (expected, p, exact) in (("", plain[at]), ("_stratified", within[at])):
                row |= {f"expected{suffix}": expected, f"p{suffix}": p, f"p{suffix}_exact": exact}
                row[f"p{suffix}_adjusted"] = min(p * n_tests, 1.0) if p == p else p
                row[f"p{suffix}_exact_adjusted"] = min(exact * n_tests, 1.0) if exact == exact else exact
            rows.append(row)
        if progress:
            progress("enrich", done, len(tested))
    facts = {
        "kind": "enrichment",
        "version": release(),
        "n_ranked": n_ranked,
        "grid": list(tops),
        "draws": draws,
        "seed": seed,
        "n_gene_sets": len(gene_sets),
        "n_tests": n_tests,
        "correction": "bonferroni",
        "strata": None if codes is None else np.bincount(codes).tolist(),
        "gene_sets_without_members": [name for name in gene_sets if name not in tested],
    }
    table = pd.DataFrame(rows, columns=list(ENRICHMENT_COLUMNS))
    return EnrichmentResult(table, facts, _warnings(members_by_set, tested, codes, draws, n_tests))


def enrich_scores(
    scores: pd.DataFrame,
    gene_sets: Mapping[str, Collection[str]],
    *,
    metric: str | None = None,
    rank_by: str = "z",
    degs: pd.DataFrame | None = None,
    max_degs: int = 0,
    grid: Sequence[int] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> EnrichmentResult:
    """Run :func:`enrich` on a table of scores, with deciles of the number of cells as strata.

    Parameters
    ----------
    scores
        Table of scores, as in :class:`perturbscope.ScoreResult`.
    metric
        Metric to rank by; it may be left out if the table has only one.
    rank_by
        Column to rank by, largest first; perturbations without a number in it are left out.
    degs
        Numbers of differentially expressed genes, as :func:`perturbscope.analysis.degs.deg_table` returns them. Only
        perturbations with at most `max_degs` are then ranked: with 0, those whose effect a test gene by gene misses.
    gene_sets, grid, draws, seed, progress
        See :func:`enrich`.

    Raises
    ------
    MissingColumnError
        A column is missing.
    InvalidParameterError
        The table does not have the metric, or :func:`enrich` refuses an argument.
    """
    _require_columns(scores, "scores", "perturbation", "metric", "n_cells", rank_by)
    if degs is not None:
        _require_columns(degs, "degs", "perturbation", "n_degs")
    metrics = scores["metric"].drop_duplicates().tolist()
    if metric is None and len(metrics) == 1:
        metric = metrics[0]
    if metric not in metrics:
        raise InvalidParameterError(f"Choose one metric of the table: {', '.join(map(str, metrics))}.", field="metric")
    table = scores[scores["metric"] == metric]
    n_scored = len(table)
    table = table[table[rank_by].notna()]
    warnings = []
    if len(table) < n_scored:
        warnings.append(f"{n_scored - len(table)} of {n_scored} perturbations have no {rank_by} and are not ranked.")
    if degs is not None:
        counts = table["perturbation"].map(degs.drop_duplicates("perturbation").set_index("perturbation")["n_degs"])
        if counts.isna().any():
            unknown = table["perturbation"][counts.isna()].tolist()
            warnings.append(
                f"{len(unknown)} perturbations are not in the table of differentially expressed genes and are not "
                f"ranked: {', '.join(map(str, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}."
            )
        table = table[counts <= max_degs]
    # The number of cells must not break ties: equal scores are ranked by name, arbitrary but the same every time.
    table = table.sort_values([rank_by, "perturbation"], ascending=[False, True])
    result = enrich(
        table["perturbation"].tolist(),
        gene_sets,
        grid=grid,
        draws=draws,
        strata=count_strata(table["n_cells"]),
        seed=seed,
        progress=progress,
    )
    facts = {"metric": metric, "rank_by": rank_by, "max_degs": None if degs is None else max_degs}
    return EnrichmentResult(result.table, {**result.provenance, **facts}, [*warnings, *result.warnings])


def default_grid(n_ranked: int) -> tuple[int, ...]:
    """Return every 100th number below `n_ranked`; with fewer than 1,000 about ten evenly spaced values."""
    step = _STEP if n_ranked >= 10 * _STEP else max(1, round(n_ranked / 10))
    return tuple(range(step, n_ranked, step))


def count_strata(n_cells: ArrayLike, *, parts: int = 10) -> NDArray[np.intp]:
    """Return the stratum of each perturbation by its number of cells: deciles; equal numbers share a stratum."""
    counts = np.asarray(n_cells, dtype=np.float64)
    if counts.ndim != 1 or not np.isfinite(counts).all():
        raise MalformedMatrixError("Numbers of cells must be a list of finite numbers.", field="n_cells")
    if not counts.size:
        return np.zeros(0, dtype=np.intp)
    edges = np.unique(np.quantile(counts, np.linspace(0, 1, parts + 1)[1:-1]))
    return np.searchsorted(edges, counts, side="left")


def members_of(ranking: Sequence[str], genes: Collection[str]) -> NDArray[np.bool_]:
    """Return a mask of the ranked names in a set, by the name itself or another unambiguous name of the same gene."""
    wanted = {str(gene) for gene in genes}
    ids = {gene_id for gene in wanted if (gene_id := _ensembl(gene)) is not None}
    return np.asarray([name in wanted or _ensembl(name) in ids for name in ranking], dtype=bool)


def _ensembl(name: str) -> str | None:
    gene_id, ambiguous = GeneResolver.default().resolve(name)
    return None if ambiguous else gene_id


def _null(
    members: NDArray[np.bool_], codes: NDArray[np.intp], tops: Sequence[int], draws: int, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """Return expected members among the top n, p by draws, and exact p of the observed number, for each n of `tops`."""
    bounds = np.array([0, *tops, len(members)])
    n_strata = int(codes.max()) + 1
    of_stratum = codes == np.arange(n_strata)[:, None]
    reach = np.concatenate([np.zeros((n_strata, 1), dtype=np.int64), of_stratum.cumsum(axis=1)], axis=1)[:, bounds]
    sizes, marked = of_stratum.sum(axis=1), (of_stratum & members).sum(axis=1)
    # Positions of a stratum's members in a random order of it, counted by stretches of the ranking.
    drawn = np.zeros((draws, len(bounds) - 1), dtype=np.int64)
    for stretch, m in zip(np.diff(reach, axis=1), marked, strict=True):
        if m:
            drawn += rng.multivariate_hypergeometric(stretch, m, size=draws, method="count")
    counts, observed = drawn.cumsum(axis=1), np.cumsum(members)
    expectations = []
    for at, n in enumerate(tops):
        k, taken = int(observed[n - 1]), reach[:, at + 1]
        p = float((1 + np.count_nonzero(counts[:, at] >= k)) / (1 + draws))
        expectations.append((float((marked * taken / sizes).sum()), p, _tail(sizes, marked, taken, k)))
    return expectations


def _tail(sizes: NDArray[np.int64], marked: NDArray[np.int64], taken: NDArray[np.int64], k: int) -> float:
    """Return the probability of k members or more if `taken` of the `sizes` perturbations of each stratum are drawn."""
    mass = np.ones(1)
    for size, members, drawn in zip(sizes, marked, taken, strict=True):
        few, many = max(0, drawn + members - size), min(members, drawn)
        inside = np.arange(few, many + 1)
        log = _choose(members, inside) + _choose(size - members, drawn - inside) - _choose(size, drawn)
        mass = np.convolve(mass, np.concatenate([np.zeros(few), np.exp(log)]))
    # Summed from the small end to keep digits; rounding of a convolution may leave zeros below 0.
    return float(np.clip(mass[k:][::-1].sum(), 0.0, 1.0))


def _choose(n: ArrayLike, k: ArrayLike) -> NDArray[np.float64]:
    """Return the logarithm of the binomial coefficient."""
    n, k = np.asarray(n, dtype=np.float64), np.asarray(k, dtype=np.float64)
    value: NDArray[np.float64] = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return value


def _require_columns(table: pd.DataFrame, what: str, *names: str) -> None:
    for name in names:
        if name not in table.columns:
            raise MissingColumnError(f"The table of {what} has no column {name!r}.", field=what)


def _check_ranking(names: list[str]) -> None:
    if len(names) < 2:
        raise InvalidParameterError(
            f"The ranking holds {len(names)} perturbations; at least 2 are needed to draw from.", field="ranking"
        )
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidParameterError(
            f"{twice!r} is ranked more than once; give each perturbation one place, e.g. choose one metric.",
            field="ranking",
        )


def _check_grid(grid: Sequence[int], n_ranked: int) -> tuple[int, ...]:
    tops = sorted({int(n) for n in grid})
    if not tops or tops[0] < 1 or tops[-1] > n_ranked:
        raise InvalidParameterError(
            f"The grid must hold numbers from 1 to {n_ranked}, the ranked perturbations; it is {list(grid)!r}.",
            field="grid",
        )
    return tuple(tops)


def _codes(strata: ArrayLike, n_ranked: int) -> NDArray[np.intp]:
    values = np.asarray(strata)
    if values.shape != (n_ranked,):
        raise MalformedMatrixError(
            f"{n_ranked} ranked perturbations, but strata has shape {values.shape}; give one a perturbation.",
            field="strata",
        )
    return np.unique(values, return_inverse=True)[1].astype(np.intp)


def _warnings(
    members: Mapping[str, NDArray[np.bool_]],
    tested: list[str],
    codes: NDArray[np.intp] | None,
    draws: int,
    n_tests: int,
) -> list[str]:
    warnings = []
    absent = [name for name in members if name not in tested]
    if absent:
        warnings.append(
            f"{len(absent)} of {len(members)} gene sets {'have' if len(absent) > 1 else 'has'} no gene in the ranking, "
            f"not tested: {', '.join(absent)}. Check that perturbations are named by their gene."
        )
    few = [name for name in tested if members[name].sum() < _FEW_MEMBERS]
    if few:
        warnings.append(
            f"{len(few)} {'gene sets have' if len(few) > 1 else 'gene set has'} fewer than {_FEW_MEMBERS} genes in the "
            "ranking, too few to say much: "
            f"{', '.join(few)}."
        )
    if n_tests and n_tests / (1 + draws) > 0.05:
        warnings.append(
            f"{draws} draws over {n_tests} tests: the smallest p is {1 / (1 + draws):.2g}, so none can be below 0.05 "
            f"after correction. Read p_exact, or use {20 * n_tests:,} draws or more."
        )
    if codes is not None and len(np.unique(codes)) == 1:
        warnings.append("All perturbations are in one stratum, so the stratified null is the plain one.")
    return warnings
