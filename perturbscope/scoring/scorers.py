"""Score of one perturbation against control by one metric: its distance, the null behind z, and p.

Distance: the mean over `repeats` control samples as large as the perturbation's group (Zhao et al. 2025 use one).

z: ``(distance - null_mean) / null_sd``, where the null is THIS statistic on controls: as many controls as the
perturbation has cells, against `repeats` size-matched samples of other controls. For the energy distances its mean and
sd are exact (:func:`perturbscope.scoring.energy.pool.null_moments`); for Wasserstein they are estimated from
`null_draws` random draws. Against a null of single draws, or of groups of another size, z of an averaged distance would
not have sd 1.

p: the E-test, a permutation test. The labels "perturbed" and "control" are exchanged over the pooled cells, within
batches if they are given. For the energy distances its statistic is the distance to all controls, the limit of the mean
over many samples.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import TooFewControlsError
from perturbscope.scoring.distances import pairwise_distances
from perturbscope.scoring.energy.batch_permutations import BatchPermutations
from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.matrix import HOST, Compute, DenseGroup, DensePart
from perturbscope.scoring.energy.permutations import Permutations
from perturbscope.scoring.energy.pool import RELATIVE_NOISE, Group, Moments, Pool, moments_of, null_moments
from perturbscope.scoring.labels import Groups
from perturbscope.scoring.optimal_transport import MAX_TRANSPORT_CELLS, assignment_cost, picked_costs
from perturbscope.scoring.results import Metric, ScoreOptions
from perturbscope.scoring.statistics import Exchange, empirical_p, generator, random_subsets

NULL_REPEATS = 4
"""Most control samples drawn with one group of a drawn null; with fewer the sd of an averaged distance is uncertain."""


@dataclass(frozen=True)
class Scored:
    """Numbers of one perturbation and metric; one that could not be computed is NaN, and a flag says why."""

    distance: float
    null_mean: float
    null_sd: float
    p: float
    flags: tuple[str, ...]

    @property
    def z(self) -> float:
        """Distance above the null mean in standard deviations of the null; NaN without spread."""
        return (self.distance - self.null_mean) / self.null_sd if self.null_sd > 0 else float("nan")

    def columns(self) -> dict[str, float]:
        """Return the numbers as columns of a table; q is filled in when all rows are known."""
        return {
            "distance": self.distance,
            "null_mean": self.null_mean,
            "null_sd": self.null_sd,
            "z": self.z,
            "p": self.p,
            "q": float("nan"),
        }


CONSTANT = Scored(0.0, 0.0, 0.0, float("nan"), ("constant_embeddings", "null_sd_zero"))
"""Score of two groups whose cells all have the same vector. No exchange of labels changes that, so there is nothing to
test: p = 1 would read as "no effect", although the embedding says nothing at all."""

NOT_SCORED = Scored(float("nan"), float("nan"), float("nan"), float("nan"), ())
"""Score of a group that is too small."""


class DistanceScorer(Protocol):
    """Scores groups of cells against one control group; several threads may call it at once."""

    @property
    def at_a_time(self) -> int | None:
        """Number of groups that may be prepared together; None for any number."""

    def prepare(self, groups: Sequence[NDArray[np.intp]]) -> None:
        """Compute what is cheaper for many groups at once; results of an earlier call are forgotten."""

    def score(self, name: str, cells: NDArray[np.intp]) -> Scored:
        """Score the cells at positions `cells`; `name` seeds its random draws."""


def make_scorer(
    metric: Metric,
    groups: Groups,
    controls: NDArray[np.intp],
    options: ScoreOptions,
    maker: GroupMaker | None = None,
) -> DistanceScorer:
    """Return the scorer of a metric; scorers of one metric with different controls may share a `maker`.

    Raises
    ------
    TooFewControlsError
        The fixed null needs more controls than there are.
    """
    if options.null == "fixed" and len(controls) < 2 * options.null_size:
        raise TooFewControlsError(
            f"The fixed null draws two disjoint groups of {options.null_size} controls, and there are {len(controls)}. "
            "Use null='size_matched', or a null_size of at most half of the controls.",
            field="null_size",
        )
    if metric == "wasserstein":
        return TransportScorer(groups, controls, options)
    return EnergyScorer(groups, controls, options, maker or GroupMaker(metric, groups, options))


class GroupMaker:
    """Makes groups of the same cells for a metric's ground distance."""

    def __init__(self, metric: Metric, groups: Groups, options: ScoreOptions, compute: Compute = HOST) -> None:
        self.metric, self.ground, self.compute = metric, options.ground, compute
        self.rows = groups.rows
        if metric == "cosine_e_distance" and not options.normalize:
            self.rows = groups.rows.scaled()
        self.origin = self.rows.mean()
        self.whole: DenseGroup | None = None
        self.places = np.empty(0, dtype=np.intp)

    def remember(self, cells: NDArray[np.intp]) -> None:
        """Compute the distances among these cells once, for all groups that are made of some of them later."""
        whole = self.make(cells)
        if isinstance(whole, DenseGroup):
            self.whole = whole
            self.places = np.full(len(self.rows), -1)
            self.places[cells] = np.arange(len(cells))

    def make(self, cells: NDArray[np.intp], rows: NDArray[np.float64] | None = None) -> Group:
        """Return the group of the cells at these positions; `rows` are their vectors, if they were read already."""
        if self.whole is not None and (self.places[cells] >= 0).all():
            return DensePart(self.whole, self.places[cells])
        rows = self.rows[cells] if rows is None else rows
        if self.metric == "cosine_e_distance":
            return LinearGroup(rows, 1.0, self.origin)
        if self.ground == "sqeuclidean":
            return LinearGroup(rows, 2.0, self.origin)
        return DenseGroup(rows, self.origin, compute=self.compute)


def control_moments(controls: Group, rows: NDArray[np.float64]) -> Moments:
    """Return moments of the distances between controls with the vectors `rows`; all are 0 if these are one vector.

    Distances from sums of vectors would leave rounding there: a null sd of 1e-17, and so a z of a billion.
    """
    return Moments(0.0, 0.0, 0.0) if is_constant(rows) else moments_of(controls)


class EnergyScorer:
    """Scores energy distances; sums over controls alone are computed once and shared by all perturbations."""

    def __init__(self, groups: Groups, controls: NDArray[np.intp], options: ScoreOptions, maker: GroupMaker) -> None:
        self.groups, self.controls, self.options, self.maker = groups, controls, options, maker
        self.reference = self.maker.make(controls)
        self.control_rows = self.maker.rows[controls]
        self.moments = control_moments(self.reference, self.control_rows)
        self.nulls: dict[tuple[int, int], tuple[float, float]] = {}
        self.permutations = Permutations(self.reference, options.permutations, options.seed)
        self.within_batches = None
        if groups.batches is not None:
            self.within_batches = BatchPermutations(
                self.reference, groups.batches[controls], options.permutations, options.seed
            )

    @property
    def at_a_time(self) -> int | None:
        """See :class:`DistanceScorer`."""
        return None if self.within_batches is None else self.within_batches.at_a_time

    def prepare(self, groups: Sequence[NDArray[np.intp]]) -> None:
        """See :class:`DistanceScorer`."""
        batches = self.groups.batches
        if self.within_batches is not None and batches is not None:
            self.within_batches.prepare([batches[cells] for cells in groups])

    def null(self, n: int, m: int) -> tuple[float, float]:
        """Return mean and sd of the statistic of n controls against samples of m controls (cached)."""
        if (n, m) not in self.nulls:
            self.nulls[n, m] = null_moments(
                self.moments,
                n,
                m,
                pool=len(self.controls),
                repeats=self.options.repeats,
                estimator=self.options.estimator,
            )
        return self.nulls[n, m]

    def score(self, name: str, cells: NDArray[np.intp]) -> Scored:
        """See :class:`DistanceScorer`."""
        options, n, n_controls = self.options, len(cells), len(self.controls)
        rows = self.maker.rows[cells]
        if is_constant(rows, self.control_rows):
            return CONSTANT
        pool = Pool(self.maker.make(cells, rows), self.reference, options.estimator)
        m = min(n, n_controls)
        distance = pool.observed
        if m < n_controls:
            samples = random_subsets(n_controls, m, options.repeats, generator(options.seed, "repeats", name))
            distance = float(pool.sampled(samples).mean())
        fixed = options.null == "fixed"
        mean, sd = self.null(options.null_size, options.null_size) if fixed else self.null(n, m)
        flags = size_flags(n, n_controls, fixed=fixed, beyond="null_extrapolated")
        if sd == 0:
            flags.append("null_sd_zero")
        exchange = Exchange.of(n, n_controls, self.groups.pooled_batches(cells, self.controls))
        flags += exchange_flags(exchange, options.permutations)
        p = float("nan")
        if exchange.blocks:
            chunks = (
                self.permutations.labels(n)
                if self.within_batches is None or self.groups.batches is None
                else self.within_batches.labels(self.groups.batches[cells])
            )
            null = np.concatenate([pool.exchanged(labels) for labels in chunks])
            p = empirical_p(pool.observed, null, noise=pool.noise)
        return Scored(distance, mean, sd, p, tuple(flags))


class TransportScorer:
    """Scores Wasserstein distances between samples of equal size, so that every problem is a linear assignment.

    The distance falls as cells get more, so a null of another size would be of no use. Null groups have the size of the
    perturbation's group, to within 1.25 % (sizes share a null so that it can be cached). A perturbation with more cells
    than half of the controls is sampled to that many, since no larger null can be drawn (`null_capped`).
    """

    def __init__(self, groups: Groups, controls: NDArray[np.intp], options: ScoreOptions) -> None:
        self.groups, self.controls, self.options = groups, controls, options
        self.reference = pairwise_distances(groups.rows[controls])
        self.nulls: dict[int, tuple[float, float]] = {}
        self.lock = threading.Lock()

    @property
    def at_a_time(self) -> int | None:
        """See :class:`DistanceScorer`."""
        return None

    def prepare(self, groups: Sequence[NDArray[np.intp]]) -> None:
        """See :class:`DistanceScorer`."""

    def null(self, size: int) -> tuple[float, float]:
        """Return mean and sd of the statistic between groups of `size` controls (cached).

        Each draw takes one group X and a few groups Y of other controls; the variance between and within draws then
        gives the sd of the mean over any number of repeats.
        """
        with self.lock:
            if size not in self.nulls:
                self.nulls[size] = self._null(size)
            return self.nulls[size]

    def _null(self, size: int) -> tuple[float, float]:
        options = self.options
        rng = generator(options.seed, "null", size)
        few = min(options.repeats, NULL_REPEATS)
        orders = (rng.permutation(len(self.controls)) for _ in range(options.null_draws))
        picks = ((order[:size], rng.choice(order[size:], size, replace=False)) for order in orders for _ in range(few))
        draws = np.array(list(picked_costs(self.reference, picks))).reshape(-1, few)
        within = float(draws.var(axis=1, ddof=1).mean()) if few > 1 else 0.0
        between = max(float(draws.mean(axis=1).var(ddof=1)) - within / few, 0.0)
        mean, sd = float(draws.mean()), float(np.sqrt(between + within / options.repeats))
        return mean, sd if sd > RELATIVE_NOISE * mean else 0.0

    def score(self, name: str, cells: NDArray[np.intp]) -> Scored:
        """See :class:`DistanceScorer`."""
        options, n, n_controls = self.options, len(cells), len(self.controls)
        rows = self.groups.rows
        of_controls = rows[self.controls]
        if is_constant(rows[cells], of_controls):
            return CONSTANT
        fixed = options.null == "fixed"
        limit = n_controls if fixed else n_controls // 2
        size = min(n, limit, MAX_TRANSPORT_CELLS)
        between = pairwise_distances(rows[cells], of_controls)
        rng = generator(options.seed, "repeats", name)
        picks = [
            (rng.choice(n, size, replace=False), rng.choice(n_controls, size, replace=False))
            for _ in range(options.repeats)
        ]
        distance = float(np.mean(list(picked_costs(between, picks))))
        flags = size_flags(n, n_controls, fixed=fixed, beyond="null_capped")
        if min(n, limit) > size:
            flags.append("transport_subsampled")
        mean, sd = self.null(options.null_size if fixed else min(shared_size(size), limit))
        if sd == 0:
            flags.append("null_sd_zero")
        a, b = cells[picks[0][0]], self.controls[picks[0][1]]
        exchange = Exchange.of(size, size, self.groups.pooled_batches(a, b))
        flags += exchange_flags(exchange, options.wasserstein_permutations)
        p = float("nan")
        if exchange.blocks:
            pooled = pairwise_distances(rows[np.concatenate([a, b])])
            null = list(transport_splits(pooled, exchange, options, name))
            observed = assignment_cost(pooled[:size, size:])
            p = empirical_p(observed, null, noise=RELATIVE_NOISE * float(pooled.mean(dtype=np.float64)))
        return Scored(distance, mean, sd, p, tuple(flags))


def transport_splits(
    pooled: NDArray[np.float32], exchange: Exchange, options: ScoreOptions, name: str
) -> Iterator[float]:
    """Yield Wasserstein distances of groups of equal size after exchanges of labels; `pooled` holds all distances."""
    rng = generator(options.seed, "exchange", name)
    draws = exchange.draw(options.wasserstein_permutations, rng)
    return picked_costs(pooled, ((np.flatnonzero(a), np.flatnonzero(~a)) for members in draws for a in members.T > 0))


def shared_size(size: int) -> int:
    """Return the size whose null is used for this one: at most 1.25 % away, and the same up to 40 cells."""
    step = max(1, size // 40)
    return round(size / step) * step


def size_flags(n: int, n_controls: int, *, fixed: bool, beyond: str) -> list[str]:
    """Return flags of the numbers of cells and controls; `beyond` is the flag of a null that cannot be drawn."""
    flags = []
    if n > n_controls:
        flags.append("fewer_controls_than_cells")
    if not fixed and 2 * min(n, n_controls) > n_controls:
        flags.append(beyond)
    return flags


def exchange_flags(exchange: Exchange, permutations: int) -> list[str]:
    """Return flags of batches that leave few or no exchanges of labels."""
    if not exchange.blocks:
        return ["batch_confounded"]
    flags = ["batch_partly_confounded"] if len(exchange.fixed) else []
    return [*flags, "few_exchanges"] if exchange.log_count < np.log(permutations + 1) else flags


def is_constant(*groups: NDArray[np.float64]) -> bool:
    """Whether all rows of all groups are the same vector, up to the rounding of a model in float32.

    A model's vectors of copies of a cell differ by a few units in the last place, depending on the batch they were in.
    """
    first = groups[0][0]
    tolerance = 16 * np.finfo(np.float32).eps * float(np.abs(first).max())
    return all(float(np.abs(rows - first).max()) <= tolerance for rows in groups)
