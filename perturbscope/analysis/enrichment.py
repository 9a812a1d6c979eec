"""Whether a set of genes gathers at the top of a ranking of perturbations.

For the top n of N ranked perturbations the statistic is k, the members of the set among them (Zhao et al. 2025). Two
nulls are reported side by side:

plain
    Any n of the N perturbations. 10,000 random draws give ``p``, which cannot be below 1 / 10,001; the same
    probability is known exactly, the tail of the hypergeometric distribution, and is ``p_exact``.
stratified
    As many perturbations from each stratum as the top n holds. With deciles of the number of cells as strata this
    removes what numbers of cells alone explain: perturbations with more cells are measured better, and essential genes
    have fewer. ``p_stratified`` is by draws, ``p_stratified_exact`` by convolution of the strata's distributions.

What is drawn is a random order of the ranked perturbations, and one order serves all values of n.
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
"""Columns of a table of enrichment, in their order."""
_STEP = 100
_FEW_MEMBERS = 5
_UNKNOWN = (float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class EnrichmentResult:
    """Enrichment of gene sets at the top of a ranking.

    Attributes
    ----------
    table
        One row a set and n, columns :data:`ENRICHMENT_COLUMNS`. `n_genes`: genes of the set; `n_members`: those that
        were ranked; `k` and `expected`: members among the top n, found and by chance. The adjusted p-values are
        Bonferroni's over all rows. The stratified columns are NaN without strata.
    provenance
        What made the numbers (JSON-able).
    warnings
        What a careful reader should know, in words.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def best(self) -> pd.DataFrame:
        """The row of each set with the smallest exact p, the smallest of them first."""
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
    """Count members of gene sets in the top of a ranking, against random rankings.

    Parameters
    ----------
    ranking
        Perturbed genes, strongest first, each once. Only they can be drawn: leave out what is not of interest.
    gene_sets
        Genes of each set. A gene matches by its name, or by any symbol or Ensembl id of the same gene.
    grid
        The values of n; :func:`default_grid` if not given.
    draws
        Random draws behind `p` and `p_stratified`.
    strata
        Stratum of each ranked perturbation, for the second null (:func:`count_strata`).
    seed
        Of the draws.
    progress
        Called as ``progress("enrich", done, total)``, by set.

    Raises
    ------
    InvalidParameterError
        A perturbation that is ranked twice, no set, or a grid or number of draws out of range.
    MalformedMatrixError
        Not one stratum a perturbation.
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
    found = {name: members_of(names, genes) for name, genes in gene_sets.items()}
    tested = [name for name, members in found.items() if members.any()]
    n_tests = len(tested) * len(tops)
    rows = []
    for done, name in enumerate(tested, start=1):
        members = found[name]
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
    return EnrichmentResult(table, facts, _warnings(found, tested, codes, draws, n_tests))


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
    """:func:`enrich` on a table of scores, with deciles of the number of cells as strata.

    Parameters
    ----------
    scores
        As :class:`perturbscope.ScoreResult` holds it.
    metric
        Metric to rank by; may be left out where the table has one.
    rank_by
        Column to rank by, largest first; perturbations without a number in it are left out.
    degs
        Numbers of differentially expressed genes, as :func:`perturbscope.analysis.degs.deg_table` gives them. Only
        perturbations with at most `max_degs` are then ranked: with 0, those whose effect the usual analysis does not
        see.
    gene_sets, grid, draws, seed, progress
        As of :func:`enrich`.

    Raises
    ------
    MissingColumnError
        A column is not there.
    InvalidParameterError
        A metric that the table does not have, or as :func:`enrich`.
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
    n_given = len(table)
    table = table[table[rank_by].notna()]
    warnings = []
    if len(table) < n_given:
        warnings.append(f"{n_given - len(table)} of {n_given} perturbations have no {rank_by} and are not ranked.")
    if degs is not None:
        counts = table["perturbation"].map(degs.drop_duplicates("perturbation").set_index("perturbation")["n_degs"])
        if counts.isna().any():
            unknown = table["perturbation"][counts.isna()].tolist()
            warnings.append(
                f"{len(unknown)} perturbations are not in the table of differentially expressed genes and are not "
                f"ranked: {', '.join(map(str, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}."
            )
        table = table[counts <= max_degs]
    # A number of cells breaks no tie: equal scores are ranked by name, which is arbitrary but the same every time.
    table = table.sort_values([rank_by, "perturbation"], ascending=[False, True])
    found = enrich(
        table["perturbation"].tolist(),
        gene_sets,
        grid=grid,
        draws=draws,
        strata=count_strata(table["n_cells"]),
        seed=seed,
        progress=progress,
    )
    facts = {"metric": metric, "rank_by": rank_by, "max_degs": None if degs is None else max_degs}
    return EnrichmentResult(found.table, {**found.provenance, **facts}, [*warnings, *found.warnings])


def default_grid(n_ranked: int) -> tuple[int, ...]:
    """Every 100 perturbations below the last; with fewer than 1,000 about ten values of equal distance."""
    step = _STEP if n_ranked >= 10 * _STEP else max(1, round(n_ranked / 10))
    return tuple(range(step, n_ranked, step))


def count_strata(n_cells: ArrayLike, *, parts: int = 10) -> NDArray[np.intp]:
    """Stratum of each perturbation by its number of cells: deciles, with equal numbers never in two of them."""
    counts = np.asarray(n_cells, dtype=np.float64)
    if counts.ndim != 1 or not np.isfinite(counts).all():
        raise MalformedMatrixError("Numbers of cells must be a list of finite numbers.", field="n_cells")
    if not counts.size:
        return np.zeros(0, dtype=np.intp)
    edges = np.unique(np.quantile(counts, np.linspace(0, 1, parts + 1)[1:-1]))
    return np.searchsorted(edges, counts, side="left")


def members_of(ranking: Sequence[str], genes: Collection[str]) -> NDArray[np.bool_]:
    """Which ranked names are in a set: by the name itself, or as another unambiguous name of the same gene."""
    wanted = {str(gene) for gene in genes}
    ids = {gene_id for gene in wanted if (gene_id := _ensembl(gene)) is not None}
    return np.asarray([name in wanted or _ensembl(name) in ids for name in ranking], dtype=bool)


def _ensembl(name: str) -> str | None:
    gene_id, ambiguous = GeneResolver.default().resolve(name)
    return None if ambiguous else gene_id


def _null(
    members: NDArray[np.bool_], codes: NDArray[np.intp], tops: Sequence[int], draws: int, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """Expected members among the top n, p by draws, and exact p of as many as were found, for each n of `tops`."""
    bounds = np.array([0, *tops, len(members)])
    n_strata = int(codes.max()) + 1
    of_stratum = codes == np.arange(n_strata)[:, None]
    reach = np.concatenate([np.zeros((n_strata, 1), dtype=np.int64), of_stratum.cumsum(axis=1)], axis=1)[:, bounds]
    sizes, marked = of_stratum.sum(axis=1), (of_stratum & members).sum(axis=1)
    # The places of a stratum's members in a random order of it, counted by the stretch of the ranking they fall into.
    drawn = np.zeros((draws, len(bounds) - 1), dtype=np.int64)
    for stretch, m in zip(np.diff(reach, axis=1), marked, strict=True):
        if m:
            drawn += rng.multivariate_hypergeometric(stretch, m, size=draws, method="count")
    counts, observed = drawn.cumsum(axis=1), np.cumsum(members)
    found = []
    for at, n in enumerate(tops):
        k, taken = int(observed[n - 1]), reach[:, at + 1]
        p = float((1 + np.count_nonzero(counts[:, at] >= k)) / (1 + draws))
        found.append((float((marked * taken / sizes).sum()), p, _tail(sizes, marked, taken, k)))
    return found


def _tail(sizes: NDArray[np.int64], marked: NDArray[np.int64], taken: NDArray[np.int64], k: int) -> float:
    """Probability of k members or more, when `taken` of the `sizes` perturbations of each stratum are drawn."""
    mass = np.ones(1)
    for size, members, chosen in zip(sizes, marked, taken, strict=True):
        few, many = max(0, chosen + members - size), min(members, chosen)
        inside = np.arange(few, many + 1)
        log = _choose(members, inside) + _choose(size - members, chosen - inside) - _choose(size, chosen)
        mass = np.convolve(mass, np.concatenate([np.zeros(few), np.exp(log)]))
    # Summed from the small end, where the digits are; a convolution leaves zeros below 0 by rounding.
    return float(np.clip(mass[k:][::-1].sum(), 0.0, 1.0))


def _choose(n: ArrayLike, k: ArrayLike) -> NDArray[np.float64]:
    """Logarithm of the binomial coefficient."""
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
    found: Mapping[str, NDArray[np.bool_]], tested: list[str], codes: NDArray[np.intp] | None, draws: int, n_tests: int
) -> list[str]:
    warnings = []
    absent = [name for name in found if name not in tested]
    if absent:
        warnings.append(
            f"{len(absent)} of {len(found)} gene sets {'have' if len(absent) > 1 else 'has'} no gene in the ranking, "
            f"not tested: {', '.join(absent)}. Check that perturbations are named by their gene."
        )
    few = [name for name in tested if found[name].sum() < _FEW_MEMBERS]
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
