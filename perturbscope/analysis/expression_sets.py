"""Gene sets in the expression of each perturbation: which sets move, and which hold more changed genes than chance.

Two questions, side by side, about each set of genes and each perturbation:

moved together
    Do the genes of the set rank higher, or lower, than the other tested genes by the z of their own rank tests? The
    statistic is Mann and Whitney's, with the variance of Barry, Nobel and Wright (2008) for genes that are correlated:
    genes of a pathway rise and fall together without any perturbation, and a plain test takes that for proof. A
    correlation of 0.01 between genes is the preset of limma's camera (Wu and Smyth 2012; its function
    ``rankSumTestWithCorrelation``), and 0 the plain test.
hold changed genes
    Are there more differentially expressed genes in the set than among all tested ones? The upper tail of the
    hypergeometric distribution.

Both are competitive: a set is compared with the other genes, so a change of all genes alike is no finding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse, special, stats

from perturbscope.analysis.degs import DegScreen, Tested
from perturbscope.cells.genes import GeneResolver
from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.statistics import benjamini_hochberg

SET_COLUMNS = (
    "perturbation", "gene_set", "n_genes", "n_members", "direction", "statistic", "p", "q", "n_degs", "expected_degs",
    "p_degs", "q_degs",
)  # fmt: skip
"""Columns of a table of gene sets, in order."""


@dataclass(frozen=True)
class SetResult:
    """Gene sets in the expression of perturbations.

    Attributes
    ----------
    table
        One row a perturbation and set, columns :data:`SET_COLUMNS`, the smallest p of a perturbation first. `n_genes`:
        genes of the set; `n_members`: those that were tested; `direction`, `statistic` (z), `p`, `q`: whether they move
        together; `n_degs`, `expected_degs`, `p_degs`, `q_degs`: differentially expressed genes among them. q is
        Benjamini and Hochberg's, over the sets of a perturbation or over all, as that of the genes.
    provenance
        Options and version that made the numbers (JSON-able).
    warnings
        Sentences that a reader should know before trusting a number.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def enrich_expression(
    screen: DegScreen,
    gene_sets: Mapping[str, Collection[str]],
    *,
    correlation: float = 0.01,
    min_members: int = 5,
    max_members: int = 500,
    progress: Callable[[str, int, int], None] | None = None,
) -> SetResult:
    """Test gene sets in the expression of each perturbation.

    Parameters
    ----------
    screen
        The cells and their labels.
    gene_sets
        Genes of each set; a gene matches by its name, or by any symbol or Ensembl id of the same gene.
    correlation
        Assumed correlation between the genes of a set; 0 gives the plain Mann-Whitney test.
    min_members, max_members
        Fewest and most tested genes of a set; other sets are left out.
    progress
        Called as ``progress("degs", done, total)``.

    Raises
    ------
    InvalidParameterError
        There is no set, no set has a measured gene, or an option is out of range.
    """
    if not 0 <= correlation < 1:
        raise InvalidParameterError(f"correlation is {correlation}; it must be from 0 to below 1.", field="correlation")
    if not 1 <= min_members <= max_members:
        raise InvalidParameterError(
            f"min_members is {min_members} and max_members {max_members}; give 1 or more, the most no less.",
            field="min_members",
        )
    members = _members(screen, gene_sets)
    sizes = [len(set(genes)) for genes in gene_sets.values()]
    parts, left_out, counts = [], np.ones(len(gene_sets), dtype=bool), []
    with closing(screen.run(progress)) as results:
        for found in results:
            counts.append(screen.row(found))
            if found.result is None or not len(found.genes):
                continue
            part = _of_perturbation(screen, found, members, correlation, (min_members, max_members))
            left_out[part["set"]] = False
            parts.append(part)
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"set": np.zeros(0, dtype=np.intp)})
    names = np.array([*gene_sets, ""], dtype=object)
    table = table.assign(gene_set=names[table["set"]], n_genes=np.array([*sizes, 0])[table["set"]])
    by = np.zeros(len(table)) if screen.options.correction == "screen" or not parts else table["perturbation"]
    for p, q in (("p", "q"), ("p_degs", "q_degs")):
        table[q] = table.groupby(by)[p].transform(benjamini_hochberg) if parts else np.zeros(0)
    table = table.reindex(columns=list(SET_COLUMNS))
    table = table.sort_values(["perturbation", "p", "gene_set"], kind="stable", ignore_index=True)
    warnings = screen.warnings(pd.DataFrame(counts, columns=["perturbation", "n_cells", "n_degs", "n_tested", "flags"]))
    few = [name for name, absent in zip(gene_sets, left_out, strict=True) if absent]
    if few:
        warnings.append(
            f"{len(few)} of {len(gene_sets)} gene sets have fewer than {min_members} or more than {max_members} tested "
            f"genes in every perturbation and were left out: {', '.join(few[:5])}{', ...' if len(few) > 5 else ''}."
        )
    facts = {**screen.facts(), "kind": "enrich_genes", "n_gene_sets": len(gene_sets), "correlation": correlation}
    return SetResult(table, {**facts, "min_members": min_members, "max_members": max_members}, warnings)


def _members(screen: DegScreen, gene_sets: Mapping[str, Collection[str]]) -> sparse.csr_matrix:
    """Return which column is in which set, float64 [n_sets, n_genes]."""
    if not gene_sets:
        raise InvalidParameterError("There are no gene sets.", field="gene_sets")
    resolve = GeneResolver.default().resolve
    columns: dict[str, int] = {}
    for column, gene in enumerate(map(str, screen.gene_ids)):
        columns.setdefault(resolve(gene)[0] or gene, column)
        columns.setdefault(gene, column)
    rows, places = [], []
    for number, genes in enumerate(gene_sets.values()):
        found = {columns.get(gene, columns.get(resolve(gene)[0] or gene, -1)) for gene in map(str, genes)} - {-1}
        rows += [number] * len(found)
        places += sorted(found)
    if not rows:
        raise InvalidParameterError(
            f"None of the {len(gene_sets)} gene sets has a gene that was measured. Check that both name genes of one "
            f"species, by symbol or Ensembl id: the cells have {', '.join(map(str, screen.gene_ids[:3]))}, ....",
            field="gene_sets",
        )
    shape = (len(gene_sets), len(screen.gene_ids))
    return sparse.csr_matrix((np.ones(len(rows)), (rows, places)), shape=shape)


def _of_perturbation(
    screen: DegScreen, found: Tested, members: sparse.csr_matrix, correlation: float, bounds: tuple[int, int]
) -> pd.DataFrame:
    assert found.result is not None  # noqa: S101  the caller looked
    inside = members[:, found.genes]
    held = np.asarray(inside.sum(axis=1)).ravel()
    n = len(found.genes)
    sets = np.flatnonzero((held >= bounds[0]) & (held <= bounds[1]) & (held < n))
    inside, held = inside[sets], held[sets]
    z = rank_sum_z(found.result.statistic[found.genes], inside, correlation)
    changed = found.q < screen.options.alpha
    changed &= np.abs(found.result.log2_fold_change[found.genes]) >= screen.options.min_log2_fold_change
    k, n_changed = inside @ changed.astype(np.float64), int(changed.sum())
    return pd.DataFrame(
        {
            "perturbation": np.full(len(sets), found.perturbation, dtype=object),
            "set": sets,
            "n_members": held.astype(np.int64),
            "direction": np.where(z > 0, "up", np.where(z < 0, "down", "none")).astype(object),
            "statistic": z,
            "p": np.clip(2 * special.ndtr(-np.abs(z)), 0, 1),
            "n_degs": k.astype(np.int64),
            "expected_degs": held * n_changed / n,
            "p_degs": np.clip(stats.hypergeom.sf(k - 1, n, n_changed, held), 0, 1),
        }
    )


def rank_sum_z(
    values: NDArray[np.float64], members: sparse.csr_matrix, correlation: float = 0.0
) -> NDArray[np.float64]:
    """Return z of the rank sum of each set's members among all values, for values correlated within a set.

    The variance is that of Barry, Nobel and Wright (2008), corrected for ties, and half a step of continuity; with a
    correlation of 0 it is Mann and Whitney's.

    Parameters
    ----------
    values
        One value a gene, [n_genes].
    members
        Which gene is in which set, 1 or 0, [n_sets, n_genes].
    correlation
        Correlation between the members of a set.
    """
    n = len(values)
    a = np.asarray(members.sum(axis=1)).ravel()
    b = n - a
    u = members @ stats.rankdata(values) - a * (a + 1) / 2
    independent = np.arcsin(1.0) + np.arcsin(0.5) * (b - 1)
    dependent = np.arcsin(correlation / 2) * (a - 1) * (b - 1) + np.arcsin((correlation + 1) / 2) * (a - 1)
    _, ties = np.unique(values, return_counts=True)
    tied = float((ties.astype(np.float64) ** 3 - ties).sum()) / max(1, n * (n * n - 1))
    sd = np.sqrt(a * b * (independent + dependent) / (2 * np.pi) * (1 - tied))
    away = u - a * b / 2
    z: NDArray[np.float64] = np.divide(
        np.sign(away) * np.maximum(np.abs(away) - 0.5, 0), sd, out=np.zeros(len(a)), where=sd > 0
    )
    return z
