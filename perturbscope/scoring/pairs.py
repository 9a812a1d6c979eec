"""Distances between perturbations, pair by pair, with z, p and q."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.cleaning import clean_labels
from perturbscope.scoring.distances import pairwise_distances
from perturbscope.scoring.energy.pool import RELATIVE_NOISE, Group, Moments, Pool, null_moments
from perturbscope.scoring.labels import Groups
from perturbscope.scoring.optimal_transport import MAX_TRANSPORT_CELLS, assignment_cost, picked_costs, transport_cost
from perturbscope.scoring.results import (
    COMPARE_COLUMNS,
    CompareResult,
    Metric,
    Rows,
    ScoreOptions,
    flag_warnings,
    permutations_by_metric,
    provenance,
    resolution_warnings,
    with_q,
)
from perturbscope.scoring.scorers import (
    CONSTANT,
    NOT_SCORED,
    GroupMaker,
    Scored,
    control_moments,
    exchange_flags,
    is_constant,
)
from perturbscope.scoring.statistics import Exchange, empirical_p, generator
from perturbscope.threads import checkpoint


def compare_perturbations(
    embeddings: ArrayLike,
    perturbations: Sequence[str],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    control: str | Sequence[str] | None = None,
    batches: Sequence[str] | None = None,
    options: ScoreOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompareResult:
    """Measure the distance between the cells of two perturbations, for each pair.

    p comes from exchanges of the labels of the two groups (within batches if they are given). z has one of two nulls.
    For the energy distances and with `control`, the null is two disjoint groups of controls of the same two sizes, in
    closed form (:mod:`perturbscope.scoring.energy.pool`). Otherwise it is the exchanged labels themselves, whose spread
    grows with the difference, so that z levels off. All cells of a perturbation are used, up to `max_cells`.

    Parameters
    ----------
    embeddings, perturbations, batches, options
        See :func:`perturbscope.score_perturbations`; `repeats` and `null` are not used.
    pairs
        Pairs of labels; default all pairs of perturbations, each once.
    control
        Label of the control cells behind z, or several; the default pairs leave them out.
    progress
        Called as ``progress("compare", done, total)``.

    Returns
    -------
    A table with one row a pair and metric, in the order of the pairs.

    Raises
    ------
    InvalidParameterError
        A pair names an unknown label, or one label twice.
    InvalidEmbeddingError, MalformedMatrixError, ControlLabelMissingError, TooFewControlsError, TooFewCellsError
        See :func:`perturbscope.score_perturbations`.
    """
    options = options or ScoreOptions()
    cleaned = clean_labels(perturbations, control)
    perturbations, control, pairs = cleaned.labels, cleaned.control, cleaned.pairs(pairs)
    groups = Groups.of(embeddings, perturbations, batches, options, control=control)
    control_flags = ["duplicated_vectors"] if control is not None and groups.has_copies(control) else []
    to_compare = _Pairs.of(pairs, groups, control)
    names = to_compare.names
    scorable = set(groups.scorable(names, options))
    label_flags = {name: groups.label_flags(name, options) for name in names}
    rows = Rows(COMPARE_COLUMNS)
    done, total = 0, len(to_compare) * len(options.metrics)
    for metric in options.metrics:
        comparer = _Comparer(metric, groups, control, options)
        for a, b in to_compare:
            flags = list(dict.fromkeys(label_flags[a] + label_flags[b] + control_flags))
            scored = NOT_SCORED
            if a in scorable and b in scorable:
                scored = comparer.compare(a, b)
            rows.add(
                a=a,
                b=b,
                n_a=groups.sizes[a],
                n_b=groups.sizes[b],
                metric=metric,
                **scored.columns(),
                flags=";".join([*flags, *scored.flags]),
            )
            done += 1
            if progress:
                progress("compare", done, total)
    table = with_q(rows.frame(), options)
    warnings = groups.warnings(names, options) + flag_warnings(table, ["a", "b"])
    warnings += resolution_warnings(len(to_compare), options)
    facts = {
        "control": control,
        "n_pairs": len(to_compare),
        "null": {
            metric: "exchanged labels"
            if control is None or metric == "wasserstein"
            else "size-matched controls, closed form"
            for metric in options.metrics
        },
        "permutations": permutations_by_metric(options),
    }
    return CompareResult(table, provenance("compare", options, **groups.facts, **facts, **cleaned.facts), warnings)


class _Comparer:
    """Compares pairs by one metric; sums over one group alone are computed once."""

    def __init__(self, metric: Metric, groups: Groups, control: str | None, options: ScoreOptions) -> None:
        self.metric, self.groups, self.options = metric, groups, options
        self.maker = GroupMaker(metric, groups, options)
        self.groups_made: dict[str, Group] = {}
        self.moments: Moments | None = None
        self.n_controls = 0
        if control is not None and metric != "wasserstein":
            self.n_controls = len(groups.members[control])
            controls = groups.members[control]
            self.moments = control_moments(self.maker.make(controls), self.maker.rows[controls])

    def group(self, name: str) -> Group:
        if name not in self.groups_made:
            self.groups_made[name] = self.maker.make(self.groups.members[name])
        return self.groups_made[name]

    def compare(self, a: str, b: str) -> Scored:
        cells_a, cells_b = self.groups.members[a], self.groups.members[b]
        if is_constant(self.maker.rows[cells_a], self.maker.rows[cells_b]):
            return CONSTANT
        return self._transport(a, b) if self.metric == "wasserstein" else self._energy(a, b)

    def _energy(self, a: str, b: str) -> Scored:
        options = self.options
        cells_a, cells_b = self.groups.members[a], self.groups.members[b]
        n, m = len(cells_a), len(cells_b)
        pool = Pool(self.group(a), self.group(b), options.estimator)
        exchange = Exchange.of(n, m, self.groups.pooled_batches(cells_a, cells_b))
        flags = exchange_flags(exchange, options.permutations)
        draws = exchange.draw(options.permutations, generator(options.seed, "exchange", a, b))
        null = np.concatenate([pool.split(members) for members in draws]) if exchange.blocks else np.empty(0)
        mean, sd = _spread(null, pool.noise)
        if self.moments is not None:
            mean, sd = null_moments(self.moments, n, m, pool=m, repeats=1, estimator=options.estimator)
            if n + m > self.n_controls:
                flags.append("null_extrapolated")
        return _scored(pool.observed, mean, sd, null, pool.noise, flags)

    def _transport(self, a: str, b: str) -> Scored:
        options, flags = self.options, []
        cells = []
        for name in (a, b):
            members = self.groups.members[name]
            if len(members) > MAX_TRANSPORT_CELLS:
                flags = ["transport_subsampled"]
                rng = generator(options.seed, "transport", name)
                members = rng.choice(members, MAX_TRANSPORT_CELLS, replace=False)
            cells.append(members)
        n = len(cells[0])
        pooled = pairwise_distances(self.groups.rows[np.concatenate(cells)])
        exchange = Exchange.of(n, len(cells[1]), self.groups.pooled_batches(cells[0], cells[1]))
        flags += exchange_flags(exchange, options.wasserstein_permutations)
        rng = generator(options.seed, "exchange", a, b)
        draws = exchange.draw(options.wasserstein_permutations if exchange.blocks else 0, rng)
        picks = ((np.flatnonzero(a), np.flatnonzero(~a)) for members in draws for a in members.T > 0)
        null = np.asarray(list(picked_costs(pooled, picks, _optimal)))
        noise = RELATIVE_NOISE * float(pooled.mean(dtype=np.float64))
        return _scored(_optimal(pooled[:n, n:]), *_spread(null, noise), null, noise, flags)


def _optimal(cost: NDArray[np.float32]) -> float:
    return assignment_cost(cost) if cost.shape[0] == cost.shape[1] else transport_cost(cost)


def _spread(null: NDArray[np.float64], noise: float) -> tuple[float, float]:
    """Return mean and sd of a drawn null; an sd within rounding is 0."""
    if len(null) < 2:
        return float("nan"), float("nan")
    sd = float(null.std())
    return float(null.mean()), sd if sd > noise else 0.0


def _scored(
    distance: float, mean: float, sd: float, null: NDArray[np.float64], noise: float, flags: list[str]
) -> Scored:
    p = empirical_p(distance, null, noise=noise) if len(null) else float("nan")
    return Scored(distance, mean, sd, p, tuple([*flags, "null_sd_zero"] if sd == 0 else flags))


@dataclass(frozen=True)
class _Pairs:
    """The pairs to compare: those that were named, or all pairs of `names`, which are never held at a time."""

    names: list[str]
    named: list[tuple[str, str]] | None

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]] | None, groups: Groups, control: str | None) -> _Pairs:
        """Check the pairs; raises as :func:`compare_perturbations`."""
        if pairs is None:
            names = [name for name in groups.members if name != control]
            if len(names) < 2:
                raise InvalidParameterError(
                    "There are no two perturbations to compare; give at least two labels.", field="perturbations"
                )
            return cls(names, None)
        if not len(pairs):
            raise InvalidParameterError("pairs is empty; leave it out to compare all pairs.", field="pairs")
        for pair in pairs:
            checkpoint()
            if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
                raise InvalidParameterError(f"A pair must be two different labels, not {pair!r}.", field="pairs")
            for name in pair:
                if name not in groups.members:
                    raise InvalidParameterError(
                        f"The pair {tuple(pair)!r} names {name!r}, which no cell is labelled with.", field="pairs"
                    )
        named = [(str(a), str(b)) for a, b in pairs]
        return cls(list(dict.fromkeys(name for pair in named for name in pair)), named)

    def __len__(self) -> int:
        return len(self.names) * (len(self.names) - 1) // 2 if self.named is None else len(self.named)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return combinations(self.names, 2) if self.named is None else iter(self.named)
