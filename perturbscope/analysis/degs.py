"""Differentially expressed genes of each perturbation: the Mann-Whitney U test, all genes at once.

Two-sided, asymptotic, with tie and continuity correction, as ``scipy.stats.mannwhitneyu(method="asymptotic")``. A
screen has thousands of perturbations against the same controls, so the controls' non-zero values are sorted once; a
perturbation then costs a binary search for each of its own non-zero values. Zeros, most of the data, are only counted.

A count is no measure of effect on its own. It grows with the number of cells, so :func:`deg_table` lists that number
too; and in small groups of shallow cells it is wrong: the approximation fails for a gene that is seen in one or two
cells of a group, and "expressed in 5 % of either group" picks just those genes. :func:`deg_null` counts such genes
between controls and controls, which do not differ, and so shows from which size on a count can be trusted.
:func:`correlate_degs` compares counts with distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse, special

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneResolver
from perturbscope.errors import InvalidParameterError, MissingColumnError, TooFewCellsError
from perturbscope.scoring.cleaning import clean_labels
from perturbscope.scoring.labels import check_labels, codes_of, require_control
from perturbscope.scoring.statistics import benjamini_hochberg, correlation, generator
from perturbscope.threads import checkpoint

STEP_KEYS = 2**20
"""Stored values that are sorted or looked up between two checkpoints: a tenth of a second."""
DEG_COLUMNS = ("perturbation", "n_cells", "n_degs", "n_tested")
"""Columns of a table of counts, in order."""


@dataclass(frozen=True, kw_only=True)
class DegOptions:
    """Thresholds for calling a gene differentially expressed.

    Raises
    ------
    InvalidParameterError
        A value outside its range.
    """

    alpha: float = 0.05
    """Benjamini-Hochberg q, within the perturbation, below which a gene is differentially expressed."""
    min_expressed: float = 0.05
    """Smallest share of cells of either group that must express a gene for it to be tested."""
    min_log2_fold_change: float = 0.0
    """Smallest absolute log2 fold change of the mean counts per 10,000."""
    exclude_target: bool = True
    """Whether to leave the perturbed gene itself out."""
    max_controls: int = 5000
    """Most controls to compare with; of more, a seeded sample is used."""

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("alpha", self.alpha, 0.0, 1.0),
            ("min_expressed", self.min_expressed, 0.0, 1.0),
            ("min_log2_fold_change", self.min_log2_fold_change, 0.0, float("inf")),
            ("max_controls", self.max_controls, 2, float("inf")),
        ):
            if not low <= value <= high:
                limit = f"from {low:g} to {high:g}" if np.isfinite(high) else f"at least {low:g}"
                raise InvalidParameterError(f"{name} is {value}; it must be {limit}.", field=name)


class DegCount(NamedTuple):
    """Number of differentially expressed genes of one perturbation, and number of tested genes."""

    n_degs: int
    n_tested: int


def log_normalized(cells: CountMatrix) -> sparse.csr_matrix:
    """Return log(1 + counts per 10,000 of the cell's total), float32 [n_cells, n_genes]."""
    counts, scale = cells.counts, 10_000.0 / cells.totals
    values = np.empty(len(counts.data), dtype=np.float32)
    for first, last in _spans(counts.indptr):
        checkpoint()
        part = slice(counts.indptr[first], counts.indptr[last])
        sizes = np.diff(counts.indptr[first : last + 1])
        values[part] = np.log1p(counts.data[part] * np.repeat(scale[first:last], sizes))
    return sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


@dataclass(frozen=True)
class RankTest:
    """Mann-Whitney U test of one group against the controls.

    Attributes
    ----------
    u
        U of the group, [n_genes].
    p
        Two-sided p, [n_genes]; 1 if all values are equal.
    expressed
        Share of cells that express the gene, the larger of the two groups, [n_genes].
    log2_fold_change
        log2 ratio of the mean counts per 10,000 (plus 1e-9), group over controls, [n_genes].
    """

    u: NDArray[np.float64]
    p: NDArray[np.float64]
    expressed: NDArray[np.float64]
    log2_fold_change: NDArray[np.float64]


class RankTester:
    """Tests groups of cells against the same controls.

    Parameters
    ----------
    controls
        Non-negative values of the controls, [n_controls, n_genes].

    Raises
    ------
    TooFewCellsError
        There are no controls.
    """

    def __init__(self, controls: sparse.csr_matrix) -> None:
        self._n = int(controls.shape[0])
        self._n_genes = int(controls.shape[1])
        if self._n < 1:
            raise TooFewCellsError("There are no control cells to compare with.", field="control")
        keys = self._keys = _sorted(_keys(controls), self._n_genes)
        self._starts = np.searchsorted(keys, np.arange(self._n_genes + 1) << 32)
        self._nonzero = np.diff(self._starts)
        self._ties = np.zeros(self._n_genes)
        for first, last in _spans(self._starts):
            unique, counts = _runs(keys[self._starts[first] : self._starts[last]])
            self._ties += np.bincount(unique >> 32, weights=_tie(counts), minlength=self._n_genes)
        self._mean = _mean_counts(controls)

    def test(self, group: sparse.csr_matrix) -> RankTest:
        """Compare a group, [n_cells, n_genes], with the controls.

        Raises
        ------
        TooFewCellsError
            The group has no cells.
        """
        n, m = int(group.shape[0]), self._n
        if n < 1:
            raise TooFewCellsError("A perturbation without cells cannot be tested.", field="perturbation")
        unique, counts = _runs(_sorted(_keys(group), self._n_genes))
        genes = unique >> 32
        below, upto = (_places(self._keys, unique, side) for side in ("left", "right"))
        zeros_m = m - self._nonzero
        nonzero_n = np.bincount(genes, weights=counts, minlength=self._n_genes)
        zeros_n = n - nonzero_n
        # A value beats the controls' zeros, the smaller non-zeros, and half of its equals.
        beaten = zeros_m[genes] + (below - self._starts[genes]) + (upto - below) / 2
        u = np.bincount(genes, weights=counts * beaten, minlength=self._n_genes) + zeros_n * zeros_m / 2
        equal = upto - below
        more_ties = np.bincount(genes, weights=_tie(counts + equal) - _tie(equal), minlength=self._n_genes)
        ties = self._ties + more_ties + _tie(zeros_n + zeros_m)
        total = n + m
        variance = n * m / 12 * ((total + 1) - ties / (total * (total - 1)))
        larger = np.maximum(u, n * m - u)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (larger - n * m / 2 - 0.5) / np.sqrt(variance)
        p = np.where(variance > 0, np.clip(2 * special.ndtr(-z), 0, 1), 1.0)
        fold = np.log2((_mean_counts(group) + 1e-9) / (self._mean + 1e-9))
        expressed = np.maximum(nonzero_n / n, self._nonzero / m)
        return RankTest(u, p, expressed, fold)


def count_degs(
    tester: RankTester, group: sparse.csr_matrix, options: DegOptions, *, target: int | None = None
) -> DegCount:
    """Count differentially expressed genes of one perturbation.

    Parameters
    ----------
    tester
        Tester that holds the controls.
    group
        Values of the perturbed cells, [n_cells, n_genes].
    options
        Thresholds.
    target
        Column of the perturbed gene, which is neither tested nor counted if `options` says so.
    """
    result = tester.test(group)
    tested = result.expressed >= options.min_expressed
    if target is not None and options.exclude_target:
        tested[target] = False
    if not tested.any():
        return DegCount(0, 0)
    q = benjamini_hochberg(result.p[tested])
    changed = np.abs(result.log2_fold_change[tested]) >= options.min_log2_fold_change
    return DegCount(int(((q < options.alpha) & changed).sum()), int(tested.sum()))


def deg_table(
    cells: CountMatrix,
    perturbations: Sequence[str],
    *,
    control: str | Sequence[str],
    targets: Mapping[str, int] | None = None,
    options: DegOptions | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> pd.DataFrame:
    """Count differentially expressed genes of every perturbation.

    Parameters
    ----------
    cells
        Raw counts; the cells' totals are the size factors.
    perturbations
        Label of each cell.
    control
        Label of the control cells, or several.
    targets
        Column of the gene that each perturbation targets, if it is measured; by default a label that is a gene's name
        stands for that gene (:func:`target_columns`).
    options
        Thresholds; default :class:`DegOptions`.
    seed
        Seed of the sample of controls, if there are more than `max_controls`.
    progress
        Called as ``progress("degs", done, total)``.

    Returns
    -------
    A table with one row a perturbation, by name; columns :data:`DEG_COLUMNS`.

    Raises
    ------
    MalformedMatrixError, InvalidParameterError
        The number of labels differs from the number of cells, or a target's column does not exist.
    ControlLabelMissingError
        No cell has the control label.
    """
    options = options or DegOptions()
    cleaned = clean_labels(perturbations, control)
    control = str(cleaned.control)
    labels = check_labels(cleaned.labels, len(cells), "perturbations")
    names, codes = codes_of(labels)
    sizes = np.bincount(codes)
    require_control(control, names)
    others = [name for name in names if name != control]
    columns = target_columns(cells.gene_ids, others) if targets is None else dict(targets)
    outside = [name for name, column in columns.items() if not 0 <= column < cells.n_genes]
    if outside:
        raise InvalidParameterError(
            f"The target of {outside[0]!r} is column {columns[outside[0]]}; there are {cells.n_genes} genes.",
            field="targets",
        )
    rows = np.flatnonzero(labels == control)
    if len(rows) > options.max_controls:
        rows = np.sort(generator(seed, "degs", control).choice(rows, options.max_controls, replace=False))
    tester = RankTester(log_normalized(cells[rows]))
    members = np.argsort(codes, kind="stable")
    starts = dict(zip(names, (np.cumsum(sizes) - sizes).tolist(), strict=True))
    size_of = dict(zip(names, sizes.tolist(), strict=True))
    counts = []
    for name in others:
        group = members[starts[name] : starts[name] + size_of[name]]
        count = count_degs(tester, log_normalized(cells[group]), options, target=columns.get(name))
        counts.append((name, size_of[name], *count))
        if progress:
            progress("degs", len(counts), len(others))
    return pd.DataFrame(counts, columns=list(DEG_COLUMNS))


def deg_null(
    cells: CountMatrix,
    perturbations: Sequence[str],
    *,
    control: str | Sequence[str],
    sizes: Sequence[int] | None = None,
    splits: int = 20,
    options: DegOptions | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Count genes that are called differentially expressed between random controls and the other controls.

    Parameters
    ----------
    cells, perturbations, control, options, seed
        See :func:`deg_table`.
    sizes
        Numbers of cells of the pretended perturbation; default the smallest, the lower quartile and the median of the
        perturbations' sizes. Sizes above half of the controls are left out.
    splits
        Number of random splits for each size.

    Returns
    -------
    A table with one row a size: ``n_cells, median_degs, max_degs, share_with_degs``.

    Raises
    ------
    MalformedMatrixError, InvalidParameterError, ControlLabelMissingError
        See :func:`deg_table`.
    """
    options = options or DegOptions()
    cleaned = clean_labels(perturbations, control)
    control = str(cleaned.control)
    labels = check_labels(cleaned.labels, len(cells), "perturbations")
    names, codes = codes_of(labels)
    counts = np.bincount(codes)
    require_control(control, names)
    if splits < 1:
        raise InvalidParameterError(f"splits is {splits}; it must be 1 or more.", field="splits")
    if sizes is None:
        others = np.delete(counts, names.index(control))
        sizes = np.quantile(others, [0, 0.25, 0.5], method="lower").tolist() if len(others) else []
    rng = generator(seed, "deg null", control)
    rows = np.flatnonzero(labels == control)
    if len(rows) > options.max_controls:
        rows = rng.choice(rows, options.max_controls, replace=False)
    values = log_normalized(cells[rows])
    rows_by_size = []
    for size in sorted({int(size) for size in sizes if 1 <= size <= len(rows) // 2}):
        degs = np.empty(splits)
        for split in range(splits):
            order = rng.permutation(len(rows))
            degs[split] = count_degs(RankTester(values[order[size:]]), values[order[:size]], options).n_degs
        rows_by_size.append((size, float(np.median(degs)), int(degs.max()), float((degs > 0).mean())))
    return pd.DataFrame(rows_by_size, columns=["n_cells", "median_degs", "max_degs", "share_with_degs"])


def target_columns(gene_ids: Sequence[str] | NDArray[np.str_], perturbations: Sequence[str]) -> dict[str, int]:
    """Return the column of each perturbation's own gene, for labels that name a measured gene.

    Symbols, aliases and Ensembl ids of one gene are equivalent (:class:`perturbscope.cells.genes.GeneResolver`); other
    names must be spelled alike.
    """
    resolver = GeneResolver.default()
    by_id = {resolver.resolve(gene)[0] or gene: column for column, gene in enumerate(map(str, gene_ids))}
    columns = {name: by_id.get(resolver.resolve(name)[0] or name) for name in perturbations}
    return {name: column for name, column in columns.items() if column is not None}


def correlate_degs(scores: pd.DataFrame, degs: pd.DataFrame) -> pd.DataFrame:
    """Correlate the number of differentially expressed genes with distance and z, by metric.

    Parameters
    ----------
    scores
        Table with ``perturbation, metric, distance, z``, as in :class:`perturbscope.ScoreResult`.
    degs
        Table with ``perturbation, n_degs``, as :func:`deg_table` returns it.

    Returns
    -------
    A table ``metric, against, n, pearson, spearman``: `n` perturbations have both numbers; the correlations are NaN if
    fewer than three have, or all have the same. Zhao et al. 2025 report Pearson 0.54 for the E-distance of principal
    components in K562.

    Raises
    ------
    MissingColumnError
        A column is missing.
    """
    for what, table, needed in (
        ("scores", scores, ("perturbation", "metric", "distance", "z")),
        ("degs", degs, ("perturbation", "n_degs")),
    ):
        for name in needed:
            if name not in table.columns:
                raise MissingColumnError(f"The table of {what} has no column {name!r}.", field=what)
    counts = degs.drop_duplicates("perturbation").set_index("perturbation")["n_degs"]
    rows = []
    for metric, part in scores.groupby("metric", sort=False):
        n_degs = part["perturbation"].map(counts).to_numpy(dtype=np.float64)
        for against in ("distance", "z"):
            result = correlation(part[against].to_numpy(dtype=np.float64), n_degs)
            rows.append((metric, against, result.n, result.pearson, result.spearman))
    return pd.DataFrame(rows, columns=["metric", "against", "n", "pearson", "spearman"])


def _spans(starts: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield runs of rows or genes, which begin at `starts`, of about :data:`STEP_KEYS` stored values each."""
    first, n = 0, len(starts) - 1
    while first < n:
        last = int(np.searchsorted(starts, starts[first] + STEP_KEYS, side="right")) - 1
        last = min(max(last, first + 1), n)
        yield first, last
        first = last


def _keys(values: sparse.csr_matrix) -> NDArray[np.int64]:
    """Return stored values as integers that sort by gene, then value: bits of positive floats sort as the floats."""
    data = np.ascontiguousarray(values.data, dtype=np.float32)
    keys = np.empty(len(data), dtype=np.int64)
    for start in range(0, len(data), STEP_KEYS):
        checkpoint()
        part = slice(start, start + STEP_KEYS)
        np.left_shift(values.indices[part], 32, out=keys[part], dtype=np.int64)
        keys[part] |= data[part].view(np.int32)
    positive = data > 0
    return keys if positive.all() else keys[positive]


def _sorted(keys: NDArray[np.int64], n_genes: int) -> NDArray[np.int64]:
    """Return sorted keys; many are sorted some genes at a time, with a checkpoint between."""
    if len(keys) <= STEP_KEYS:
        checkpoint()
        return np.sort(keys)
    starts = np.zeros(n_genes + 1, dtype=np.int64)
    for start in range(0, len(keys), STEP_KEYS):
        checkpoint()
        starts[1:] += np.bincount(keys[start : start + STEP_KEYS] >> 32, minlength=n_genes)
    starts = np.cumsum(starts)
    ordered = np.empty_like(keys)
    for first, last in _spans(starts):
        checkpoint()
        part = ordered[starts[first] : starts[last]]
        part[:] = keys[(keys >= first << 32) & (keys < last << 32)]
        checkpoint()
        part.sort()
    return ordered


def _runs(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Return the different values of sorted keys, and how often each occurs."""
    checkpoint()
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.empty(0, dtype=np.intp)
    checkpoint()
    return keys[first], np.diff(np.append(first, len(keys)))


def _places(keys: NDArray[np.int64], values: NDArray[np.int64], side: Literal["left", "right"]) -> NDArray[np.intp]:
    """Return ``np.searchsorted(keys, values, side)``, with checkpoints."""
    places = np.empty(len(values), dtype=np.intp)
    for start in range(0, len(values), STEP_KEYS):
        checkpoint()
        part = slice(start, start + STEP_KEYS)
        places[part] = np.searchsorted(keys, values[part], side)
    return places


def _tie(counts: NDArray[np.number]) -> NDArray[np.float64]:
    """Return t^3 - t, the tie correction of groups of t equal values."""
    t = counts.astype(np.float64)
    return t**3 - t


def _mean_counts(values: sparse.csr_matrix) -> NDArray[np.float64]:
    """Return mean counts per 10,000 of log-normalised values, [n_genes]."""
    totals = np.bincount(values.indices, weights=np.expm1(values.data.astype(np.float64)), minlength=values.shape[1])
    return totals / values.shape[0]
