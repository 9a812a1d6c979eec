"""The rank test of genes: Wilcoxon's rank sum, all genes of a group of cells against controls at once.

The statistic is that of scanpy's ``rank_genes_groups(method="wilcoxon", tie_correct=True)``: the standardised rank sum
with the variance of tied ranks and without continuity correction. Within batches it is van Elteren's (1960): the rank
sums of the batches, each weighted by 1 / (cells of the batch + 1), which is the locally most powerful choice.

Zeros, most of the data, are one tie and are only counted. A screen has thousands of perturbations against the same
controls, so the controls' non-zero values are sorted once; a perturbation then costs a binary search for each of its
own non-zero values.

The normal approximation fails where few cells express a gene: of 20 cells among 1,000 controls none or one is expected
to express a rare gene, and three that do have a normal p of 1e-6 and a true one of 1e-2. There p is taken from the
distribution of the rank sum over all exchanges of labels: the number of expressing cells in the group is
hypergeometric, and given that number the ranks among expressing cells are those of an ordinary rank sum. The first part
is exact; the second is close (:func:`exchange_p`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, special

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError, TooFewCellsError
from perturbscope.threads import checkpoint

STEP_KEYS = 2**20
"""Stored values that are sorted or looked up between two checkpoints: a tenth of a second."""
SPARSE = 50.0
"""Expected number of expressing cells in the smaller group below which a gene is sparse, and its p from exchanges."""
_DOUBTED = 0.1
"""Normal p above which a sparse gene keeps it: it decides nothing there, and exchanges would give about the same."""
_FEW = 3
"""Expressing cells up to which the rank sum among them is taken for a beta variable, which one cell's is exactly."""
_BINS, _BLOCK = 2048, 64
"""Bins of a sum over batches, and genes of which it is computed at a time."""
_QUANTILES = (np.arange(16) + 0.5) / 16
_NEVER = 1e-18
"""Chance of a number of expressing cells that is left out of a sum over batches."""
_FLOOR = 1e-13
"""Smallest p of a sum over batches: rounding of the transforms is not far below."""
Floats = NDArray[np.float64]


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
    """Rank test of one group against the controls, gene by gene: each array is [n_genes].

    Attributes
    ----------
    n_cells, n_controls
        Cells of the group and controls that were compared: with batches, those of batches that hold both.
    statistic
        z of the rank sum, positive where the group's values are higher; 0 if all values of a gene are equal.
    p, p_normal
        Two-sided p, and that of a normal z; 1 if all values are equal.
    from_exchanges
        Whether p is taken from the exchanges of labels, as that of a sparse gene is; else it is the normal one.
    constant
        Whether all values of the gene are equal, within each batch.
    pooled
        Share of the compared cells that express the gene, whatever their label.
    expressed, expressed_control
        Share of the group, and of the controls, that express it. Controls of different batches are weighted as the
        group's cells are divided between the batches.
    mean, mean_control
        Mean counts per 10,000, weighted in the same way.
    """

    n_cells: int
    n_controls: int
    statistic: Floats
    p: Floats
    p_normal: Floats
    from_exchanges: NDArray[np.bool_]
    constant: NDArray[np.bool_]
    pooled: Floats
    expressed: Floats
    expressed_control: Floats
    mean: Floats
    mean_control: Floats

    @property
    def log2_fold_change(self) -> Floats:
        """log2 ratio of the mean counts per 10,000 (plus 1e-9), group over controls, [n_genes]."""
        fold: Floats = np.log2((self.mean + 1e-9) / (self.mean_control + 1e-9))
        return fold


class RankTester:
    """Tests groups of cells against the same controls.

    Parameters
    ----------
    controls
        Non-negative values of the controls, [n_controls, n_genes].
    batches
        Batch of each control, or None. Groups are then compared within batches.

    Raises
    ------
    TooFewCellsError
        There are no controls.
    """

    def __init__(self, controls: sparse.csr_matrix, batches: ArrayLike | None = None) -> None:
        if controls.shape[0] < 1:
            raise TooFewCellsError("There are no control cells to compare with.", field="control")
        self.n_genes = int(controls.shape[1])
        self.has_batches = batches is not None
        self._batches = {name: _Controls(controls[rows]) for name, rows in _by_batch(batches, controls.shape[0])}

    def test(
        self,
        group: sparse.csr_matrix,
        batches: ArrayLike | None = None,
        *,
        exchanges: bool = True,
        min_expressed: float = 0.0,
    ) -> RankTest:
        """Compare a group with the controls.

        Parameters
        ----------
        group
            Values, [n_cells, n_genes].
        batches
            Batch of each cell, if those of the controls are known.
        exchanges
            Whether p of a sparse gene is taken from the exchanges of labels where its normal p is small.
        min_expressed
            Share of the compared cells below which a gene keeps its normal p: nobody looks at it.

        Raises
        ------
        TooFewCellsError
            The group has no cells, or none in a batch that has controls.
        InvalidParameterError
            Batches are known of the group or of the controls alone.
        """
        if group.shape[0] < 1:
            raise TooFewCellsError("A perturbation without cells cannot be tested.", field="perturbation")
        if (batches is not None) != self.has_batches:
            raise InvalidParameterError("Give the batches of group and controls, or of neither.", field="batches")
        parts = [
            self._batches[name].against(group[rows])
            for name, rows in _by_batch(batches, group.shape[0])
            if name in self._batches
        ]
        if not parts:
            raise TooFewCellsError("No cell of the perturbation is in a batch with controls.", field="batches")
        n, m = sum(part.n for part in parts), sum(part.m for part in parts)
        weights = [1.0 / (part.n + part.m + 1) for part in parts]
        variance = _total(weight**2 * part.variance for weight, part in zip(weights, parts, strict=True))
        excess = _total(weight * (part.u - part.n * part.m / 2) for weight, part in zip(weights, parts, strict=True))
        constant = variance <= 0
        z = np.divide(excess, np.sqrt(variance), out=np.zeros(self.n_genes), where=~constant)
        normal = np.where(constant, 1.0, np.clip(2 * special.ndtr(-np.abs(z)), 0, 1))
        p = normal.copy()
        # The expected number of expressing cells in the smaller group does not depend on the labels.
        expected = _total(min(part.n, part.m) * part.expressing / (part.n + part.m) for part in parts)
        pooled = _total(part.expressing for part in parts) / (n + m)
        chosen = (expected < SPARSE) & ~constant & (normal < _DOUBTED) & (pooled >= min_expressed)
        if exchanges and chosen.any():
            genes = np.flatnonzero(chosen)
            p[genes] = exchange_p([part.of(genes) for part in parts])
        return RankTest(
            n_cells=n,
            n_controls=m,
            statistic=z,
            p=p,
            p_normal=normal,
            from_exchanges=chosen if exchanges else np.zeros(self.n_genes, dtype=bool),
            constant=constant,
            pooled=pooled,
            expressed=_total(part.nonzero for part in parts) / n,
            expressed_control=_total(part.n / n * (part.expressing - part.nonzero) / part.m for part in parts),
            mean=_total(part.n / n * part.mean for part in parts),
            mean_control=_total(part.n / n * part.mean_control for part in parts),
        )


class RankSums(NamedTuple):
    """Rank sums of a group among controls, gene by gene.

    Attributes
    ----------
    n, m
        Cells of the group, and controls.
    u
        U of the group: pairs of a cell and a control in which the cell's value is larger, equal ones half.
    variance
        Its variance over all exchanges of labels.
    nonzero, expressing
        Cells with a value above 0: of the group, and of both.
    ties
        Sum of t^3 - t over the groups of t equal values above 0.
    mean, mean_control
        Mean counts per 10,000.
    """

    n: int
    m: int
    u: Floats
    variance: Floats
    nonzero: Floats
    expressing: Floats
    ties: Floats
    mean: Floats
    mean_control: Floats

    def of(self, genes: NDArray[np.intp]) -> RankSums:
        """Return the rank sums of some genes."""
        return RankSums(self.n, self.m, *(values[genes] for values in self[2:]))


class _Controls:
    """The controls of one batch, sorted by gene and value."""

    def __init__(self, values: sparse.csr_matrix) -> None:
        self._m, self._n_genes = int(values.shape[0]), int(values.shape[1])
        keys = self._keys = _sorted(_keys(values), self._n_genes)
        self._starts = np.searchsorted(keys, np.arange(self._n_genes + 1) << 32)
        self._nonzero = np.diff(self._starts)
        self._ties = np.zeros(self._n_genes)
        for first, last in _spans(self._starts):
            unique, counts = _runs(keys[self._starts[first] : self._starts[last]])
            self._ties += np.bincount(unique >> 32, weights=_tie(counts), minlength=self._n_genes)
        self._mean = _mean_counts(values)

    def against(self, group: sparse.csr_matrix) -> RankSums:
        """Return the rank sums of a group, [n_cells, n_genes]."""
        n, m = int(group.shape[0]), self._m
        unique, counts = _runs(_sorted(_keys(group), self._n_genes))
        genes = unique >> 32
        below, upto = (_places(self._keys, unique, side) for side in ("left", "right"))
        zeros_m = m - self._nonzero
        nonzero = np.bincount(genes, weights=counts, minlength=self._n_genes).astype(np.float64)
        zeros_n = n - nonzero
        # A value beats the controls' zeros, the smaller non-zeros, and half of its equals.
        beaten = zeros_m[genes] + (below - self._starts[genes]) + (upto - below) / 2
        u = np.bincount(genes, weights=counts * beaten, minlength=self._n_genes) + zeros_n * zeros_m / 2
        equal = upto - below
        more = np.bincount(genes, weights=_tie(counts + equal) - _tie(equal), minlength=self._n_genes)
        ties = self._ties + more
        total = n + m
        variance = n * m / 12 * ((total + 1) - (ties + _tie(zeros_n + zeros_m)) / max(1, total * (total - 1)))
        # Rounding leaves a trace where all values are tied.
        variance[variance < 1e-9 * n * m] = 0.0
        return RankSums(n, m, u, variance, nonzero, nonzero + self._nonzero, ties, _mean_counts(group), self._mean)


def exchange_p(parts: Sequence[RankSums]) -> Floats:
    """Return two-sided p of rank sums over all exchanges of labels, within batches if there are several `parts`.

    The number K of the group's cells that express a gene is hypergeometric. Given K, the group's U is a constant plus
    the U of K cells among the expressing ones. Its distribution is taken for a normal one with the exact variance, or,
    of up to three cells on either side, for a beta one with exact variance and range; it lies beside the point where
    few cells express, since K decides there. Over batches the distributions are convolved, on a grid. p is twice the
    smaller tail, which holds the observed value.

    Returns
    -------
    float64 [n_genes]. Beside random exchanges it is within a quarter down to 1e-3 for groups of 20 cells and more; for
    smaller groups it is conservative.
    """
    if len(parts) == 1:
        return _one_batch_p(parts[0])
    blocks = np.split(np.arange(len(parts[0].u)), np.arange(_BLOCK, len(parts[0].u), _BLOCK))
    return np.concatenate([_sum_p([part.of(genes) for part in parts]) for genes in blocks])


def _one_batch_p(sums: RankSums) -> Floats:
    above, below = np.zeros(len(sums.u)), np.zeros(len(sums.u))
    for genes, number, chance in _numbers(sums):
        left, sd, span = _given(sums, genes, number)
        above[genes] += chance * _tail(sums.u[genes] - left, sd, span, number, sums.expressing[genes])
        # The distribution of U among expressing cells is symmetric.
        below[genes] += chance * _tail(left + span - sums.u[genes], sd, span, number, sums.expressing[genes])
    p: Floats = np.clip(2 * np.minimum(above, below), 0, 1)
    return p


def _numbers(sums: RankSums) -> Iterator[tuple[NDArray[np.intp], int, Floats]]:
    """Yield each number of expressing cells that a group can have: the genes with such a chance, and the chance."""
    m, k = sums.m, sums.expressing
    for number in range(int(min(sums.n, k.max())) + 1):
        if number % 64 == 0:
            checkpoint()
        genes = np.flatnonzero((number <= k) & (k - number <= m))
        if len(genes):
            yield genes, number, np.exp(_hypergeometric(sums, k[genes], number))


def _given(sums: RankSums, genes: NDArray[np.intp], number: int | Floats) -> tuple[Floats, Floats, Floats]:
    """Return the least U if `number` of the group's cells express a gene, and the sd and range of U above it."""
    k = sums.expressing[genes]
    others = k - number
    left = (sums.n + number) * (sums.m - others) / 2
    ties = sums.ties[genes] / np.maximum(k * (k - 1), 1)
    return left, np.sqrt(np.maximum(number * others / 12 * (k + 1 - ties), 0)), number * others


def _tail(x: Floats, sd: Floats, span: Floats, number: int, k: Floats) -> Floats:
    """Return the chance that U of `number` cells among the others that express a gene, k in all, is at least `x`."""
    sd = np.where(sd > 1e-6, sd, 0)
    fixed = np.where(x <= span / 2 + 1e-9, 1.0, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Half a step and a twelfth: U is a whole number where no values are equal.
        normal = special.ndtr(-(x - 0.5 - span / 2) / sd)
        few = (np.minimum(number, k - number) <= _FEW) & (sd > 0)
        if few.any():
            shape = np.maximum((span + 1) ** 2 / (4 * (sd**2 + 1 / 12)) - 1, 1e-3)[few] / 2
            normal[few] = special.betainc(shape, shape, 1 - np.clip(x[few] / (span[few] + 1), 0, 1))
    chance: Floats = np.where(sd > 0, np.where(x <= 0, 1.0, np.where(x > span, 0.0, normal)), fixed)
    return chance


def _sum_p(parts: Sequence[RankSums]) -> Floats:
    """Return p of the weighted sum over batches: the batches' distributions on a grid, convolved."""
    n_genes = len(parts[0].u)
    genes = np.arange(n_genes)[:, None]
    observed, least, span = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
    atoms = []
    for sums in parts:
        checkpoint()
        weight = 1.0 / (sums.n + sums.m + 1)
        observed += weight * sums.u
        k, number = sums.expressing[:, None], np.arange(min(sums.n, int(sums.expressing.max())) + 1.0)
        possible = (number <= k) & (k - number <= sums.m)
        chance = np.where(possible, np.exp(_hypergeometric(sums, k, number)), 0)
        used = (chance > _NEVER).any(axis=0)
        number, chance = number[used], chance[:, used]
        left, sd, width = _given(sums, genes, number)
        alone = np.minimum(number, k - number) == 1
        spread = np.where(
            (alone & (sd > 0))[:, :, None],
            width[:, :, None] * _QUANTILES,
            width[:, :, None] / 2 + sd[:, :, None] * special.ndtri(_QUANTILES),
        )
        values = weight * (left[:, :, None] + np.clip(spread, 0, width[:, :, None]))
        seen = chance[:, :, None] > _NEVER
        lowest = np.where(seen, values, np.inf).min(axis=(1, 2))
        least += lowest
        span += np.where(seen, values, -np.inf).max(axis=(1, 2)) - lowest
        atoms.append((np.where(seen, values - lowest[:, None, None], 0), np.where(chance > _NEVER, chance, 0)))
    width = np.maximum(span, 1e-12) / (_BINS - len(atoms) - 1)
    product = np.ones((n_genes, _BINS + 1), dtype=np.complex128)
    for values, chance in atoms:
        checkpoint()
        bins = np.rint(values / width[:, None, None]).astype(np.intp) + 2 * _BINS * genes[:, :, None]
        weights = np.broadcast_to(chance[:, :, None] / len(_QUANTILES), bins.shape)
        mass = np.bincount(bins.ravel(), weights.ravel(), minlength=2 * _BINS * n_genes)
        product *= np.fft.rfft(mass.reshape(n_genes, 2 * _BINS), axis=1)
    mass = np.maximum(np.fft.irfft(product, 2 * _BINS, axis=1), 0)
    # A bin more on either side, for values that were rounded away from the observed one.
    place = ((observed - least) / width)[:, None]
    every = np.arange(2 * _BINS)
    above = (mass * (every >= np.floor(place) - 1)).sum(axis=1)
    below = (mass * (every <= np.ceil(place) + 1)).sum(axis=1)
    p: Floats = np.clip(2 * np.minimum(above, below), _FLOOR, 1)
    return p


def _hypergeometric(sums: RankSums, k: Floats, number: Floats | int) -> Floats:
    """Return the logarithm of the chance that `number` of the `k` expressing cells are the group's."""
    n, m = sums.n, sums.m
    others = np.clip(n - number, 0, n + m - k)
    log: Floats = _choose(k, np.minimum(number, k)) + _choose(n + m - k, others) - _choose(n + m, n)
    return log


def _choose(n: ArrayLike, k: ArrayLike) -> Floats:
    """Return the logarithm of the binomial coefficient."""
    n, k = np.asarray(n, dtype=np.float64), np.asarray(k, dtype=np.float64)
    value: Floats = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return value


def _total(parts: Iterator[Floats]) -> Floats:
    total: Floats = sum(parts, start=np.zeros(1))
    return total


def _by_batch(batches: ArrayLike | None, n: int) -> Iterator[tuple[Any, NDArray[np.intp]]]:
    """Yield each batch and its rows; without batches all rows are one."""
    if batches is None:
        yield None, np.arange(n)
        return
    names = np.asarray(batches)
    if names.shape != (n,):
        raise InvalidParameterError(
            f"{n} cells, but batches has shape {names.shape}; give one a cell.", field="batches"
        )
    for name in sorted(set(names.tolist())):
        yield name, np.flatnonzero(names == name)


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
