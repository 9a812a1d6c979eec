"""Scores of perturbations against control by one metric: the distance, the null behind z, and p.

Energy distances: distance, z and p are of ONE statistic, the energy distance of a perturbation's cells from ALL
controls, and of ONE distribution, that of the statistic when the labels "perturbed" and "control" are exchanged over
the pooled cells. ``z = (distance - mean) / sd`` of all exchanges, in closed form (:meth:`Pool.moments`); p counts drawn
ones (:mod:`perturbscope.scoring.energy.exchanges`). None of the three depends on the order of the cells or on the
spelling of labels, and z on no seed either. z is skewed under the null (about 1 % lie above 3) and grows with the
number of cells, so it compares perturbations of equal size alone; p does not mind either.

With batches, cells are taken about the mean of ALL cells of their batch, whatever their labels, and are exchanged
within batches. So a batch that is shifted as a whole moves neither z nor p, and an effect is not hidden by shifts
between batches. Cells in batches without controls have nothing to be exchanged with and leave the statistic.

The fixed null (Zhao et al. 2025) has another statistic: the mean distance from `repeats` control samples as large as
the group, and z against two groups of `null_size` controls. p stays that of the exchanges.

Wasserstein: the distance is the mean over `repeats` control samples, and z and p come from exchanges of labels, which
are drawn for both (:class:`TransportScorer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import TooFewControlsError
from perturbscope.scoring.distances import STEP_VALUES, pairwise_distances, product
from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.exchanges import BASE, EnergyTest, EnergyTests
from perturbscope.scoring.energy.matrix import HOST, Compute, DenseGroup, DensePart
from perturbscope.scoring.energy.omnibus import MEDIAN_OF, Omnibus, Scales, smallest_p
from perturbscope.scoring.energy.pool import RELATIVE_NOISE, Group, Moments, Pool, moments_of, null_moments
from perturbscope.scoring.energy.tail import Tails, TailSource, Unreached
from perturbscope.scoring.labels import Groups, less
from perturbscope.scoring.optimal_transport import MAX_TRANSPORT_CELLS, Pick, picked_costs
from perturbscope.scoring.results import Metric, ScoreOptions
from perturbscope.scoring.statistics import Exchange, empirical_p, generator, random_subsets
from perturbscope.threads import checkpoint, in_order

NULL_REPEATS = 2
"""Control samples of each exchange of labels; two tell the spread within exchanges from that between them."""
FEWEST_DRAWS = 5
"""Fewest exchanges whose spread makes a z."""
OMNIBUS_DRAWS = 10_000
"""Most exchanges of an omnibus."""
FIRED = 0.05
"""p of an omnibus up to which its smallest members are named."""


@dataclass(frozen=True)
class Scored:
    """Numbers of one perturbation and metric; one that could not be computed is NaN, and a flag says why."""

    distance: float
    null_mean: float
    null_sd: float
    p: float
    flags: tuple[str, ...]
    n_used: int = 0
    p_source: str = ""
    exchanges: int = 0
    p_tail: float = float("nan")
    p_tail_source: str = ""
    n_used_b: int = 0
    p_omnibus: float = float("nan")
    fired: str = ""

    @property
    def z(self) -> float:
        """Distance above the null mean in standard deviations of the null; NaN without spread."""
        return (self.distance - self.null_mean) / self.null_sd if self.null_sd > 0 else float("nan")

    def columns(self) -> dict[str, float | int | str]:
        """Return the values as columns of a table; q is filled in when all rows are known."""
        return {
            "n_used": self.n_used,
            "distance": self.distance,
            "null_mean": self.null_mean,
            "null_sd": self.null_sd,
            "z": self.z,
            "p": self.p,
            "q": float("nan"),
            "p_source": self.p_source,
            "exchanges": self.exchanges,
            "p_tail": self.p_tail,
            "p_tail_source": self.p_tail_source,
            "p_omnibus": self.p_omnibus,
            "q_omnibus": float("nan"),
            "fired": self.fired,
        }


CONSTANT = Scored(0.0, 0.0, 0.0, float("nan"), ("constant_embeddings", "null_sd_zero"))
"""Score of two groups whose cells all have the same vector. No exchange of labels changes that, so there is nothing to
test: p = 1 would read as "no effect", although the embedding says nothing at all."""

NOT_SCORED = Scored(float("nan"), float("nan"), float("nan"), float("nan"), ())
"""Score of a group that is too small."""


class DistanceScorer(Protocol):
    """Scores groups of cells against one control group."""

    def score(self, name: str, cells: NDArray[np.intp]) -> Scored:
        """Score the cells at positions `cells`; `name` is that of their random draws."""

    def score_all(
        self, groups: Sequence[tuple[str, NDArray[np.intp]]], finished: Callable[[], None] = lambda: None
    ) -> list[Scored]:
        """Score groups, each the name of its random draws and its positions; `finished` is called after each."""


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
    """Makes groups of the same cells for a metric's ground distance.

    Parameters
    ----------
    metric, groups, options
        The metric, and the cells: with batches, vectors are taken about the means of their batches.
    compute
        Library and device of the distances.
    """

    def __init__(self, metric: Metric, groups: Groups, options: ScoreOptions, compute: Compute = HOST) -> None:
        self.metric, self.ground, self.compute = metric, options.ground, compute
        self.vectors = groups.rows
        if metric == "cosine_e_distance" and not options.normalize:
            self.vectors = groups.rows.scaled()
        self._centres, self._batches, self._keys = groups.centres(self.vectors), groups.batches, groups.keys
        self.centre, self.origin = self._centres[0], np.zeros(groups.rows.width)
        self.whole: DenseGroup | None = None
        self.places = np.empty(0, dtype=np.intp)

    def rows(self, cells: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the vectors of some cells about the means of their batches, float64 [n, width]."""
        centres = self._centres[0] if self._batches is None else self._centres[self._batches[cells]]
        return less(self.vectors[cells], centres)

    def scales(self) -> Scales:
        """Return axes and scales of ALL cells about the means of their batches, whatever their labels."""
        order = np.argsort(self._keys, kind="stable")
        step = max(1, STEP_VALUES // self.vectors.width)
        covariance = np.zeros((self.vectors.width, self.vectors.width))
        for start in range(0, len(order), step):
            rows = self.rows(order[start : start + step])
            covariance += product(rows.T, rows)
        some = order[np.linspace(0, len(order) - 1, min(len(order), MEDIAN_OF)).round().astype(np.intp)]
        return Scales.of(covariance / len(order), self.rows(some))

    def remember(self, cells: NDArray[np.intp]) -> None:
        """Compute the distances among these cells once, for all groups that are made of some of them later."""
        whole = self.make(cells)
        if isinstance(whole, DenseGroup):
            self.whole = whole
            self.places = np.full(len(self.vectors), -1)
            self.places[cells] = np.arange(len(cells))

    def make(self, cells: NDArray[np.intp], rows: NDArray[np.float64] | None = None) -> Group:
        """Return the group of the cells at these positions; `rows` are their vectors, if they were read already."""
        if self.whole is not None and (self.places[cells] >= 0).all():
            return DensePart(self.whole, self.places[cells])
        rows = self.rows(cells) if rows is None else rows
        if self.metric == "cosine_e_distance":
            return LinearGroup(rows, 1.0, self.origin)
        if self.ground == "sqeuclidean":
            return LinearGroup(rows, 2.0, self.origin)
        return DenseGroup(rows, self.origin, compute=self.compute)


class EnergyScorer:
    """Scores energy distances; sums over controls alone are computed once and shared by all perturbations."""

    def __init__(self, groups: Groups, controls: NDArray[np.intp], options: ScoreOptions, maker: GroupMaker) -> None:
        self.groups, self.controls, self.options, self.maker = groups, controls, options, maker
        self.reference = self.maker.make(controls)
        self.batches = None if groups.batches is None else groups.batches[controls]
        n_batches = 1 if groups.batches is None else int(groups.batches.max()) + 1
        self.held = np.bincount(
            np.zeros(1, dtype=np.intp) if self.batches is None else self.batches, minlength=n_batches
        )
        self.constant = groups.is_constant(controls)
        self.fixed: tuple[float, float] | None = None
        if options.null == "fixed":
            size = options.null_size
            moments = Moments(0.0, 0.0, 0.0) if self.constant else moments_of(self.reference)
            self.fixed = null_moments(
                moments, size, size, pool=len(controls), repeats=options.repeats, estimator=options.estimator
            )
        self.tests = EnergyTests(
            self.reference,
            self.batches,
            n_batches,
            self.pool,
            permutations=options.permutations,
            exceedances=options.exceedances,
            seed=options.seed,
        )

    def pool(self, cells: NDArray[np.intp]) -> Pool:
        """Return the pool of the cells at these positions and all controls."""
        return Pool(self.maker.make(cells), self.reference, self.options.estimator)

    def score(self, name: str, cells: NDArray[np.intp]) -> Scored:
        """Score one group; `name` is that of its random draws."""
        return self.score_all([(name, cells)])[0]

    def score_all(
        self, groups: Sequence[tuple[str, NDArray[np.intp]]], finished: Callable[[], None] = lambda: None
    ) -> list[Scored]:
        """See :class:`DistanceScorer`."""
        scores: list[Scored | EnergyTest] = [self._prepared(cells) for _, cells in groups]
        tests = {id(test): i for i, test in enumerate(scores) if isinstance(test, EnergyTest)}
        sampled: dict[int, float] = {}

        def begun(test: EnergyTest, pool: Pool) -> None:
            if self.fixed is not None:
                name = groups[tests[id(test)]][0]
                sampled[id(test)] = self._sampled(name, pool)

        for score in scores:
            if isinstance(score, Scored):
                finished()
        self.tests.run([test for test in scores if isinstance(test, EnergyTest)], begun, finished)
        tails = self._tails([test for test in scores if isinstance(test, EnergyTest)])
        found = []
        for score, (_, cells) in zip(scores, groups, strict=True):
            if isinstance(score, EnergyTest):
                p_tail, source = tails.get(id(score), (float("nan"), ""))
                score = self._scored(score, len(cells), sampled.get(id(score)))
                score = replace(score, p_tail=p_tail, p_tail_source=source)
            found.append(score)
        if self.options.omnibus:
            self._add_omnibus(scores, found)
        return found

    def _add_omnibus(self, scores: list[Scored | EnergyTest], found: list[Scored]) -> None:
        """Test by all members of the omnibus, and write their p into the scores."""
        scales = self.maker.scales()
        if not scales.useful:
            return
        omnibus = Omnibus(scales, self.reference)
        tests = [(i, test) for i, test in enumerate(scores) if isinstance(test, EnergyTest)]
        draws = min(self.options.permutations or BASE, OMNIBUS_DRAWS)

        def one(item: tuple[int, EnergyTest]) -> tuple[int, Scored]:
            i, test = item
            pool = self.pool(test.cells)
            members = omnibus.members(pool, self.tests.parts(test, draws))
            p, fired = smallest_p(members, RELATIVE_NOISE * np.abs(members).max(axis=1))
            return i, replace(found[i], p_omnibus=p, fired="+".join(fired) if p <= FIRED else "")

        with closing(in_order(one, tests)) as done:
            for i, score in done:
                found[i] = score

    def _tails(self, tests: list[EnergyTest]) -> dict[int, tuple[float, TailSource]]:
        """Return the tail probabilities of the tests whose distance no exchange has reached."""
        unreached = [test for test in tests if test.exceeding == 0 and test.draws >= BASE and test.sd > 0]
        if not unreached:
            return {}
        tails = Tails(self.reference, self.batches, self.options.estimator, self.options.seed)
        found = tails.of(
            [
                Unreached(
                    (test.observed - test.mean) / test.sd,
                    np.array([len(test.cells)])
                    if test.batches is None
                    else np.bincount(test.batches, minlength=len(self.held)),
                    test.observed,
                    np.concatenate(test.null),
                )
                for test in unreached
            ]
        )
        return {id(test): tail for test, tail in zip(unreached, found, strict=True)}

    def _prepared(self, cells: NDArray[np.intp]) -> Scored | EnergyTest:
        """Return the test of a group, or its score if there is nothing to test."""
        used, batches = cells, None
        if self.groups.batches is not None:
            used = cells[self.held[self.groups.batches[cells]] > 0]
            batches = self.groups.batches[used]
            if (missing := batch_score(len(used), len(cells), self.options)) is not None:
                return missing
        if self.constant and self.groups.is_constant(np.concatenate([self.controls, used])):
            return replace(CONSTANT, n_used=len(used))
        return EnergyTest(used, batches)

    def _sampled(self, name: str, pool: Pool) -> float:
        """Return the mean distance from control samples as large as the group."""
        n, m = pool.a.size, pool.b.size
        if n >= m:
            return pool.observed
        samples = random_subsets(m, n, self.options.repeats, generator(self.options.seed, "repeats", name))
        return float(pool.sampled(samples).mean())

    def _scored(self, test: EnergyTest, n_cells: int, sampled: float | None) -> Scored:
        n = len(test.cells)
        flags = ["batch_partly_confounded"] if n < n_cells else []
        if self.tests.different(test.batches, n) < (self.options.permutations or BASE) + 1:
            flags.append("few_exchanges")
        distance, mean, sd = test.observed, test.mean, test.sd
        if self.fixed is not None and sampled is not None:
            flags += ["fewer_controls_than_cells"] if n > len(self.controls) else []
            distance, (mean, sd) = sampled, self.fixed
        if sd == 0:
            flags.append("null_sd_zero")
        return Scored(distance, mean, sd, test.p, tuple(flags), n, test.source, test.draws)


class TransportScorer:
    """Scores Wasserstein distances between samples of equal size, so that every problem is a linear assignment.

    The distance falls as cells get more, so the cells of the perturbation, at most as many as there are controls, meet
    samples of as many controls, and the mean over `repeats` of them is the distance. z and p are of exchanges of labels
    over all cells of both groups: after each, the cells that are called perturbed meet samples of those that are called
    controls. p compares means over :data:`NULL_REPEATS` samples; the spread within and between exchanges gives the sd
    of a mean over any number. Groups that are all drawn from the controls are no such null: what one of them
    has, the others lack, which made z too wide by up to a half.

    With batches, cells are taken about the means of their batches and exchanged within them, as for energy distances.
    """

    def __init__(self, groups: Groups, controls: NDArray[np.intp], options: ScoreOptions) -> None:
        self.groups, self.controls, self.options = groups, controls, options
        self.maker = GroupMaker("wasserstein", groups, options)
        self.control_rows = self.maker.rows(controls)
        self.reference = pairwise_distances(self.control_rows)

    def score_all(
        self, groups: Sequence[tuple[str, NDArray[np.intp]]], finished: Callable[[], None] = lambda: None
    ) -> list[Scored]:
        """See :class:`DistanceScorer`."""
        scores = []
        with closing(in_order(lambda group: self.score(*group), groups)) as found:
            for score in found:
                scores.append(score)
                finished()
        return scores

    def null(self, size: int) -> tuple[float, float]:
        """Return mean and sd of the distance between disjoint groups of `size` controls, the fixed null.

        Each draw takes one group X and a few groups Y of other controls; the variance between and within draws then
        gives the sd of the mean over any number of repeats.
        """
        options = self.options
        rng = generator(options.seed, "null", size)
        few = min(options.repeats, NULL_REPEATS)
        orders = (rng.permutation(len(self.controls)) for _ in range(options.null_draws))
        picks = ((order[:size], rng.choice(order[size:], size, replace=False)) for order in orders for _ in range(few))
        return self._moments(np.array(list(picked_costs(self.reference, picks))).reshape(-1, few))

    def _moments(self, draws: NDArray[np.float64]) -> tuple[float, float]:
        """Return mean and sd of the mean over `repeats` samples, from draws of a few samples each, [draws, few]."""
        few = draws.shape[1]
        within = float(draws.var(axis=1, ddof=1).mean()) if few > 1 else 0.0
        between = max(float(draws.mean(axis=1).var(ddof=1)) - within / few, 0.0)
        mean, sd = float(draws.mean()), float(np.sqrt(between + within / self.options.repeats))
        return mean, sd if sd > RELATIVE_NOISE * mean else 0.0

    def score(self, name: str, cells: NDArray[np.intp]) -> Scored:
        """Score one group; `name` is that of its random draws."""
        options, batches = self.options, self.groups.batches
        used = cells if batches is None else cells[np.isin(batches[cells], batches[self.controls])]
        if (missing := batch_score(len(used), len(cells), options)) is not None:
            return missing
        n, m = len(used), len(self.controls)
        if self.groups.is_constant(np.concatenate([self.controls, used])):
            return replace(CONSTANT, n_used=n)
        flags = ["batch_partly_confounded"] if n < len(cells) else []
        size = min(n, m, MAX_TRANSPORT_CELLS)
        if n > m:
            flags.append("fewer_controls_than_cells")
        if min(n, m) > size:
            flags.append("transport_subsampled")
        exchange = Exchange.of(n, m, self.groups.pooled_batches(used, self.controls))
        flags += exchange_flags(exchange, options.wasserstein_permutations)
        pooled = _Pooled(self.maker.rows(used), self.control_rows, self.reference)
        few = min(options.repeats, NULL_REPEATS)
        rng = generator(options.seed, "repeats", name)
        observed = np.zeros(n + m, dtype=bool)
        observed[:n] = True
        sampled = list(picked_costs(pooled.part, _samples([observed], size, options.repeats, rng)))
        distance, compared = float(np.mean(sampled)), float(np.mean(sampled[:few]))
        rng = generator(options.seed, "exchange", name)
        every = exchange.log_count < np.log(options.wasserstein_permutations + 1)
        chunks = [exchange.every()] if every else exchange.draw(options.wasserstein_permutations, rng)
        marked = (column > 0 for members in chunks for column in members.T)
        others = (labels for labels in marked if not every or (labels != observed).any())
        null = np.array(list(picked_costs(pooled.part, _samples(others, size, few, rng)))).reshape(-1, few)
        noise = RELATIVE_NOISE * pooled.mean
        p = empirical_p(compared, null.mean(axis=1), noise=noise)
        if options.null == "fixed":
            mean, sd = self.null(options.null_size)
        else:
            mean, sd = self._moments(null) if len(null) >= FEWEST_DRAWS else (float("nan"), float("nan"))
            flags += ["few_draws"] if len(null) < FEWEST_DRAWS else []
        if sd == 0:
            flags.append("null_sd_zero")
        return Scored(distance, mean, sd, p, tuple(flags), n, "enumerated" if every else "exchanges", len(null) + every)


class _Pooled:
    """Distances among the cells of a group and the controls, [a, b], of which those among controls are shared."""

    def __init__(
        self, rows: NDArray[np.float64], control_rows: NDArray[np.float64], reference: NDArray[np.float32]
    ) -> None:
        self._n, self._reference = len(rows), reference
        self._own = np.concatenate([pairwise_distances(rows), pairwise_distances(rows, control_rows)], axis=1)

    @property
    def mean(self) -> float:
        """Mean distance from the group's cells to all."""
        return float(self._own.mean(dtype=np.float64))

    def part(self, a: NDArray[np.intp], b: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the distances from the cells at ascending positions `a` to those at `b`, float32 [a, b]."""
        n, own = self._n, self._own
        i, j = (int(np.searchsorted(places, n)) for places in (a, b))
        found = np.empty((len(a), len(b)), dtype=np.float32)
        found[:i] = own[np.ix_(a[:i], b)]
        found[i:, :j] = own[np.ix_(b[:j], a[i:])].T
        found[i:, j:] = self._reference[np.ix_(a[i:] - n, b[j:] - n)]
        return found


def _samples(labels: Iterable[NDArray[np.bool_]], size: int, repeats: int, rng: np.random.Generator) -> Iterator[Pick]:
    """Yield samples of `size` marked and of `size` other cells, ascending, `repeats` for each labelling."""
    for marked in labels:
        checkpoint()
        a, b = np.flatnonzero(marked), np.flatnonzero(~marked)
        for _ in range(repeats):
            yield _some(a, size, rng), _some(b, size, rng)


def _some(cells: NDArray[np.intp], size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    return cells if len(cells) == size else np.sort(rng.choice(cells, size, replace=False))


def batch_score(n_used: int, n: int, options: ScoreOptions) -> Scored | None:
    """Return the score of a group of n cells of which too few are in batches with the other group; None if enough."""
    if not n_used:
        return replace(NOT_SCORED, flags=("batch_confounded",))
    if n_used < max(2, min(options.min_cells, n)):
        return replace(NOT_SCORED, flags=("batch_partly_confounded", "batch_too_few_cells"), n_used=n_used)
    return None


def exchange_flags(exchange: Exchange, permutations: int) -> list[str]:
    """Return flags of batches that leave few or no exchanges of labels."""
    if not exchange.blocks:
        return ["batch_confounded"]
    flags = ["batch_partly_confounded"] if len(exchange.fixed) else []
    return [*flags, "few_exchanges"] if exchange.log_count < np.log(permutations + 1) else flags
