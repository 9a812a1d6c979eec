"""Tail probabilities of the energy distance that no affordable number of exchanges reaches.

With B exchanges of labels no p-value is below ``1 / (B + 1)``, and a screen of P perturbations with few real ones needs
values near ``0.05 / P``. Where no exchange exceeds the observed distance, its limit law answers instead: for a negative
definite ground distance d and controls drawn from one population, the U estimator of n and m cells follows::

    D(X, Y) ~ (1 / n + 1 / m) sum_k w_k (Z_k^2 - 1)          Z_k standard normal

where the weights w are the eigenvalues of the doubly centred ``-d(i, j) / m`` of the controls (Szekely and Rizzo 2013;
Gretton et al. 2009 for kernels); one eigendecomposition serves a screen. For exchanges within batches it is centred
within batches.
The probability of the weighted sum is a saddlepoint approximation (Kuonen 1999, in the form of Barndorff-Nielsen,
which is never above 1 or below 0).

Only the shape is taken from this law. The place and the spread are those of the exchanges: :meth:`Spectrum.p` takes z,
the observed distance in standard deviations of its exchange distribution above that one's mean. So p falls as z grows,
and what the law says wrongly about the scale (5 to 35 % with a few hundred controls) does no harm.

The law is a limit: with few cells and heavy tails (some cells ten times as far out as others) it is too small by
orders of magnitude. :class:`Tails` therefore compares it with drawn exchanges where those still count, and falls back
on a generalized Pareto tail of the perturbation's own exchanges (Knijnenburg et al. 2009), or on nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.special import log_ndtr

from perturbscope.scoring.distances import product
from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.matrix import DenseGroup, DensePart, Subsets, to_numpy
from perturbscope.scoring.energy.pool import RELATIVE_NOISE, Group, energy
from perturbscope.scoring.results import Estimator
from perturbscope.scoring.statistics import generator, random_subsets
from perturbscope.threads import checkpoint, in_order

TailSource = Literal["", "chi_square", "pareto"]
"""Where a tail probability comes from: the weighted chi-square or a generalized Pareto tail; empty if there is none."""

LEAST = 1e-10
"""Smallest tail probability that is given; nothing so rare was ever compared with exchanges."""
LEVELS = (1e-2, 1e-3)
"""Levels at which the weighted chi-square is compared with drawn exchanges."""
LEAST_RATIO = 2 / 3
"""Smallest share of the truth that the weighted chi-square may say at these levels. It was chosen by looking at 40
simulated settings, and not tried on fresh ones: those within a half to twice the truth at 4e-5 had 0.70 or more at
1e-3, and those that were off by more than five times had 0.57 or less."""
COMPARED_DRAWS = 10_000
"""Fewest draws of a comparison, ten of which lie beyond the level 1e-3."""
DRAWS = 30_000
"""Draws of a screen's comparison: 30 beyond 1e-3, so that the ratio there is known to 18 %."""
PART = 250
"""Draws that are made at a time."""
LARGEST_GROUP = 256
"""Most cells of a group of the comparison; the law only gets better with more."""
COMPARED_CONTROLS = 1000
"""Most controls of a comparison, which asks for the shape of the law and not for its scale."""
PARETO_DRAWS = 10_000
"""Fewest exchanges that a generalized Pareto tail is fitted to."""
PARETO_TOP = 250
"""Largest exchanges that it is fitted to."""
WHOLE = 1500
"""Cells up to which all eigenvalues are computed (0.3 s); above, the largest and the sums of the others."""
LARGEST = 200
"""Eigenvalues that are computed above."""


@dataclass(frozen=True)
class Spectrum:
    """Weights of the chi-squares that the energy distance is a sum of under the null.

    Attributes
    ----------
    weights
        Different weights, above 0, descending.
    counts
        Number of chi-squares of each weight, 1 but for a remainder that is known by its sums alone.
    """

    weights: NDArray[np.float64]
    counts: NDArray[np.float64]

    @classmethod
    def of(cls, controls: Group, batches: NDArray[np.intp] | None = None) -> Spectrum:
        """Return the spectrum of the distances between controls.

        Parameters
        ----------
        controls
            The group of all controls, of either kind.
        batches
            Batch of each control, [m]; distances are then centred within batches, as for exchanges within batches.
        """
        codes = np.zeros(controls.size, dtype=np.intp)
        if batches is not None:
            codes = np.unique(batches, return_inverse=True)[1]
        if isinstance(controls, LinearGroup):
            return _of_rows(controls.rows - _means(controls.rows, codes)[codes])
        if isinstance(controls, DenseGroup):
            return _of_distances(controls, codes)
        raise TypeError(f"{type(controls).__name__} is no group whose spectrum is known.")

    @property
    def sd(self) -> float:
        """Standard deviation of the weighted sum; that of the energy distance is ``(1 / n + 1 / m)`` times this."""
        return float(np.sqrt(2 * (self.counts @ self.weights**2)))

    def p(self, z: ArrayLike) -> NDArray[np.float64]:
        """Return the probability of a standardised sum of `z` or more, at least :data:`LEAST`; NaN without spread.

        Parameters
        ----------
        z
            Standard deviations above the mean, of any shape.
        """
        values = np.asarray(z, dtype=np.float64)
        if not len(self.weights):
            return np.full(values.shape, np.nan)
        at, log_p = self._curve
        found = np.exp(np.interp(values, at, log_p, left=0.0))
        return np.where(np.isnan(values), np.nan, np.maximum(found, LEAST))

    @cached_property
    def _curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return standardised sums, ascending, and the logarithms of their tail probabilities.

        The saddlepoint t of a sum x solves K'(t) = x for the cumulant function K. No equation is solved: x is computed
        from t, since a curve is wanted.
        """
        w, counts = self.weights / self.sd, self.counts
        end = 1 / (2 * w[0])
        above, below = 1 - np.exp(-np.geomspace(1e-3, 12, 600)), -np.geomspace(1e-3, 1e6, 400)
        t = end * np.concatenate([below[::-1], above])
        x, log_p = np.empty_like(t), np.empty_like(t)
        for i, point in enumerate(t):
            left = 1 - 2 * point * w
            x[i] = counts @ (w / left - w)
            second = 2 * (counts @ (w / left) ** 2)
            # point * x - K(point), which is never negative
            depth = max(point * x[i] + point * (counts @ w) + 0.5 * (counts @ np.log(left)), 0.0)
            root, u = np.sign(point) * np.sqrt(2 * depth), point * np.sqrt(second)
            log_p[i] = log_ndtr(-(root + np.log(u / root) / root))
        # The least sum is -sum(w); beyond rounding the curve falls from 1.
        keep = np.concatenate([[True], np.diff(x) > 0])
        return x[keep], np.minimum.accumulate(np.minimum(log_p[keep], 0.0))


def _means(rows: NDArray[np.float64], codes: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the mean row of each batch, [S, width]."""
    sums = np.zeros((int(codes.max()) + 1, rows.shape[1]))
    np.add.at(sums, codes, rows)
    return sums / np.bincount(codes)[:, None]


def _of_rows(rows: NDArray[np.float64]) -> Spectrum:
    """Return the spectrum of squared distances, from centred rows [m, width]."""
    m, width = rows.shape
    side = rows if width <= m else rows.T
    total = float(np.einsum("nw,nw->", rows, rows))
    if side.shape[1] <= WHOLE:
        return _spectrum(np.linalg.eigvalsh(product(side.T, side)) / m)
    squares = 0.0
    for start in range(0, side.shape[1], WHOLE):
        part = product(side.T[start : start + WHOLE], side)
        squares += float(np.vdot(part, part))
    top = _largest(lambda v: side.T @ (side @ v), side.shape[1])
    return _spectrum(top / m, total / m, squares / m**2)


def _of_distances(controls: DenseGroup, codes: NDArray[np.intp]) -> Spectrum:
    """Return the spectrum of a matrix of distances, centred within batches on both sides."""
    m, sizes = controls.size, np.bincount(codes)
    if m <= WHOLE:
        centred = -to_numpy(controls.matrix).astype(np.float64)
        centred -= _means(centred, codes)[codes]
        centred -= _means(centred.T, codes)[codes].T
        checkpoint()
        return _spectrum(np.linalg.eigvalsh(centred) / m)
    compute = controls.points.compute

    def times(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        checkpoint()
        of_cells = compute.put(np.ascontiguousarray(vectors, dtype=np.float32))
        found: NDArray[np.float64] = to_numpy(controls.matrix @ of_cells).astype(np.float64)
        return found

    def centre(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        return vector - (np.bincount(codes, vector, len(sizes)) / sizes)[codes]

    to_batches = times((codes[:, None] == np.arange(len(sizes))).astype(np.float64))
    between = _means(to_batches, codes) * sizes[:, None]
    total = float((np.diag(between) / sizes).sum())
    squares = controls.squares() - 2 * float((to_batches**2 / sizes).sum())
    squares += float((between**2 / np.outer(sizes, sizes)).sum())
    top = _largest(lambda v: -centre(times(centre(v.ravel()))), m)
    return _spectrum(top / m, total / m, squares / m**2)


def _largest(times: Callable[[NDArray[np.float64]], NDArray[np.float64]], size: int) -> NDArray[np.float64]:
    """Return the largest eigenvalues of a symmetric operator; the start is fixed, so the result is too."""
    operator = LinearOperator((size, size), matvec=times, dtype=np.float64)
    start = np.cos(np.arange(size, dtype=np.float64))
    found: NDArray[np.float64] = eigsh(operator, k=LARGEST, which="LA", v0=start, tol=1e-4, return_eigenvectors=False)
    return found


def _spectrum(values: NDArray[np.float64], total: float = 0.0, squares: float = 0.0) -> Spectrum:
    """Return a spectrum of eigenvalues and, where they are not all, of the sums of all and of their squares."""
    values = np.sort(values)[::-1]
    values = values[values > 1e-9 * max(values[0], 0.0)] if len(values) else values
    counts = np.ones(len(values))
    rest, rest_squares = total - values.sum(), squares - values @ values
    if rest > 0 and rest_squares > 0:
        # As many chi-squares of one weight as have the same mean and variance.
        weight = min(rest_squares / rest, values[-1])
        values, counts = np.append(values, weight), np.append(counts, rest / weight)
    return Spectrum(values, counts)


@dataclass(frozen=True)
class Agreement:
    """Tail probabilities of the weighted chi-square at drawn exchanges whose share is known.

    Attributes
    ----------
    draws
        Number of exchanges.
    ratios
        Probability at the draws' quantile of each of :data:`LEVELS`, over the level; below 1 it is too small.
    """

    draws: int
    ratios: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether the weighted chi-square may be used: enough draws, and at no level far too small."""
        return self.draws >= COMPARED_DRAWS and all(ratio >= LEAST_RATIO for ratio in self.ratios)


def compare_with_exchanges(spectrum: Spectrum, z: ArrayLike) -> Agreement:
    """Compare the weighted chi-square with drawn exchanges.

    Parameters
    ----------
    spectrum
        Spectrum of the controls.
    z
        Distances after exchanges of labels, each less the mean of its perturbation's exchanges, over their standard
        deviation. Those of perturbations of similar size are pooled; sizes that are apart are compared apart, since the
        smallest groups depart first.
    """
    values = np.asarray(z, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    if not len(values):
        return Agreement(0, (float("nan"),) * len(LEVELS))
    at = np.quantile(values, [1 - level for level in LEVELS])
    return Agreement(len(values), tuple((spectrum.p(at) / np.asarray(LEVELS)).tolist()))


def generalized_pareto(observed: float, null: ArrayLike) -> float:
    """Return the tail probability of `observed` by a generalized Pareto law of the largest exchanges.

    It is fitted by probability-weighted moments (Hosking and Wallis 1987) to the :data:`PARETO_TOP` largest of at least
    :data:`PARETO_DRAWS` exchanges. A shape below 0 would give the tail an end, and p = 0 beyond it, which so few draws
    cannot know; it is taken as 0, an exponential tail. NaN with fewer exchanges, or where they hold no tail.

    Parameters
    ----------
    observed
        Observed distance; below the fitted tail the exchanges are counted.
    null
        Distances after exchanges of the same perturbation's labels.
    """
    values = np.sort(np.asarray(null, dtype=np.float64))
    if len(values) < PARETO_DRAWS:
        return float("nan")
    start = 0.5 * (values[-PARETO_TOP - 1] + values[-PARETO_TOP])
    if observed <= start:
        return float((1 + np.count_nonzero(values >= observed)) / (1 + len(values)))
    beyond = values[-PARETO_TOP:] - start
    first = float(beyond.mean())
    second = float(beyond @ np.arange(PARETO_TOP - 1, -1, -1)) / (PARETO_TOP * (PARETO_TOP - 1))
    if first <= 0 or first <= 2 * second:
        return float("nan")
    shape, scale = 2 - first / (first - 2 * second), 2 * first * second / (first - 2 * second)
    if shape <= 0:
        shape, scale = 0.0, first
    x = (observed - start) / scale
    log_p = -x if shape == 0 else -np.log1p(shape * x) / shape
    return float(max(PARETO_TOP / len(values) * np.exp(log_p), LEAST))


@dataclass(frozen=True)
class Unreached:
    """A perturbation whose distance no exchange of its labels has reached.

    Attributes
    ----------
    z
        Standard deviations of its distance above the mean of its exchanges.
    counts
        Number of its cells in each batch, [S]; one number without batches.
    observed, null
        See :func:`generalized_pareto`.
    """

    z: float
    counts: NDArray[np.integer[Any]]
    observed: float
    null: NDArray[np.floating[Any]]


class Tails:
    """Tail probabilities of a screen's perturbations beyond their exchanges.

    The comparison with exchanges is made of random groups of controls against the other controls, which are the
    exchanges of a perturbation without an effect, and apart for each doubling of the number of cells: it takes the
    smallest perturbation of each, since the law is furthest off there. The exchanges that perturbations share would not
    do, since those of perturbations of one size are almost the same ones.

    Parameters
    ----------
    controls
        The group of all controls.
    batches
        Batch of each control, below the length of :attr:`Unreached.counts`, or None.
    estimator
        Estimator of the distance.
    seed
        Seed of the comparison's draws.
    """

    def __init__(self, controls: Group, batches: NDArray[np.intp] | None, estimator: Estimator, seed: int) -> None:
        self._whole, self._estimator, self._seed, self._batches = controls, estimator, seed, batches
        codes = np.zeros(controls.size, dtype=np.intp) if batches is None else batches
        some = np.linspace(0, controls.size - 1, min(controls.size, COMPARED_CONTROLS)).round().astype(np.intp)
        self._codes, self._some = codes[some], some
        self.agreements: dict[int, Agreement] = {}
        """Comparisons so far, by the number of cells of the groups that were drawn."""

    @cached_property
    def spectrum(self) -> Spectrum:
        """Spectrum of the controls."""
        return Spectrum.of(self._whole, self._batches)

    @cached_property
    def _controls(self) -> Group:
        """Controls of the comparison, evenly from all of them, which are in the order of their batches."""
        if len(self._some) == self._whole.size:
            return self._whole
        if isinstance(self._whole, DenseGroup):
            return DensePart(self._whole, self._some)
        return LinearGroup(self._whole.rows[self._some], 1.0, np.zeros(self._whole.rows.shape[1]))

    def of(self, perturbations: Sequence[Unreached]) -> list[tuple[float, TailSource]]:
        """Return the tail probability of each, and where it comes from; NaN and nothing where there is none."""
        found: dict[int, tuple[float, TailSource]] = {}
        order = sorted(range(len(perturbations)), key=lambda i: int(perturbations[i].counts.sum()))
        agreement, above = None, 0
        for i in order:
            one = perturbations[i]
            if agreement is None or one.counts.sum() >= above:
                agreement, above = self._agreement(one.counts), 2 * int(one.counts.sum())
            found[i] = tail_p(one, agreement, self.spectrum)
        return [found[i] for i in range(len(perturbations))]

    def _agreement(self, counts: NDArray[np.integer[Any]]) -> Agreement:
        """Compare the law with groups of controls that have `counts` cells in the batches, at most half of each's."""
        members = [np.flatnonzero(self._codes == code) for code in range(len(counts))]
        most = int(np.asarray(counts).sum())
        share = min(1.0, LARGEST_GROUP / max(most, 1))
        sizes = [min(int(np.ceil(share * k)), len(cells) // 2) for k, cells in zip(counts, members, strict=True)]
        n, m = sum(sizes), self._controls.size - sum(sizes)
        if n < 2 or m < 2:
            return Agreement(0, (float("nan"),) * len(LEVELS))
        total = float(self._controls.row_sums.sum())

        def draw(number: int) -> NDArray[np.float64]:
            checkpoint()
            rng = generator(self._seed, "tail", n, number)
            chosen = np.concatenate(
                [
                    cells[random_subsets(len(cells), k, PART, rng)]
                    for cells, k in zip(members, sizes, strict=True)
                    if k > 0
                ],
                axis=1,
            )
            subsets = Subsets(chosen.ravel(), np.full(PART, n), self._controls.size)
            inside = self._controls.within(self._controls.mark(subsets))
            reach = to_numpy(subsets.sums(self._controls.row_sums))
            return energy(reach - inside, inside, total - 2 * reach + inside, n, m, self._estimator)

        values = np.concatenate(list(in_order(draw, range(-(-DRAWS // PART)))))
        sd = values.std()
        agreement = Agreement(0, (float("nan"),) * len(LEVELS))
        if sd > RELATIVE_NOISE * total / (self._controls.size * (self._controls.size - 1)):
            agreement = compare_with_exchanges(self.spectrum, (values - values.mean()) / sd)
        self.agreements[n] = agreement
        return agreement


def tail_p(one: Unreached, agreement: Agreement, spectrum: Spectrum) -> tuple[float, TailSource]:
    """Return a tail probability and its source; NaN and nothing if neither tail can be had.

    Parameters
    ----------
    one
        The perturbation.
    agreement
        Comparison with exchanges for perturbations of its size; where it does not hold, the Pareto tail stands in.
    spectrum
        Spectrum of the controls.
    """
    p = float(spectrum.p(one.z)) if agreement.holds else float("nan")
    if not np.isnan(p):
        return p, "chi_square"
    p = generalized_pareto(one.observed, one.null)
    return (p, "") if np.isnan(p) else (p, "pareto")
