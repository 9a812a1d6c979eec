"""Distances between perturbations, pair by pair, with z, p and q."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.cleaning import cleaned_for
from perturbscope.scoring.distances import pairwise_distances
from perturbscope.scoring.energy.exchanges import BASE, ENUMERATED, EnergyTest, PSource
from perturbscope.scoring.energy.pool import RELATIVE_NOISE, Group, Pool
from perturbscope.scoring.labels import Groups
from perturbscope.scoring.nearest import effects, nearest_pairs, similarity
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
    FEWEST_DRAWS,
    NOT_SCORED,
    GroupMaker,
    Scored,
    batch_score,
    exchange_flags,
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

    z and p come from exchanges of the labels of the two groups, as in :mod:`perturbscope.scoring.scorers`: within
    batches and about their means if they are given, and then of cells in batches with both groups alone. The spread of
    exchanged labels grows with the difference, so that z levels off at about 0.7 times the number of cells. All cells
    of a perturbation are used, up to `max_cells`. Without a number of `permutations` 1,000 are the most.

    Parameters
    ----------
    embeddings, perturbations, batches, options
        See :func:`perturbscope.score_perturbations`; `repeats` and `null` are not used.
    pairs
        Pairs of labels; default all pairs of perturbations, each once.
    control
        Label of the control cells, or several; the default pairs leave them out.
    progress
        Called as ``progress("compare", done, total)``.

    Returns
    -------
    A table with one row a pair and metric, in the order of the pairs, or the closest first if only the `nearest` are
    asked for. ``effect_similarity`` is the cosine between the differences of the two means from that of the controls.

    Raises
    ------
    InvalidParameterError
        A pair names an unknown label, or one label twice.
    InvalidEmbeddingError, MalformedMatrixError, ControlLabelMissingError, TooFewControlsError, TooFewCellsError
        See :func:`perturbscope.score_perturbations`.
    """
    options = options or ScoreOptions()
    cleaned = cleaned_for(options, perturbations, control, batches)
    perturbations, control, pairs = cleaned.labels, cleaned.control, cleaned.pairs(pairs)
    embeddings, batches = cleaned.kept(embeddings), cleaned.kept(batches)
    groups = Groups.of(embeddings, perturbations, batches, options, control=control)
    control_flags = ["duplicated_vectors"] if control is not None and groups.has_copies(control) else []
    to_compare = _Pairs.of(pairs, groups, control)
    names = to_compare.names
    scorable = set(groups.scorable(names, options))
    label_flags = {name: groups.label_flags(name, options) for name in names}
    directions = {} if control is None else effects(groups, [name for name in names if name != control], control)
    rows = Rows(COMPARE_COLUMNS)
    done, total = 0, len(to_compare) * len(options.metrics)
    for metric in options.metrics:
        comparer = _Comparer(metric, groups, control, options)
        for a, b in to_compare:
            flags = list(dict.fromkeys(label_flags[a] + label_flags[b] + control_flags))
            scored = NOT_SCORED
            if a in scorable and b in scorable:
                scored = comparer.compare(a, b)
            columns = scored.columns()
            columns["n_used_a"] = columns.pop("n_used")
            rows.add(
                a=a,
                b=b,
                n_a=groups.sizes[a],
                n_b=groups.sizes[b],
                n_used_b=scored.n_used_b,
                metric=metric,
                effect_similarity=similarity(a, b, directions),
                **columns,
                flags=";".join([*flags, *scored.flags]),
            )
            done += 1
            if progress:
                progress("compare", done, total)
    table = with_q(rows.frame(), options)
    if options.nearest:
        table = nearest_pairs(table, options.nearest)
    warnings = cleaned.warnings + groups.warnings(names, options) + flag_warnings(table, ["a", "b"])
    warnings += resolution_warnings(len(to_compare), options)
    facts = {
        "control": control,
        "n_pairs": len(to_compare),
        "null": {
            metric: "exchanged labels" if metric == "wasserstein" else "exchanged labels, closed form"
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

    def group(self, name: str) -> Group:
        if name not in self.groups_made:
            self.groups_made[name] = self.maker.make(self.groups.members[name])
        return self.groups_made[name]

    def compare(self, a: str, b: str) -> Scored:
        cells_a, cells_b = self.groups.members[a], self.groups.members[b]
        if self.groups.is_constant(np.concatenate([cells_a, cells_b])):
            return replace(CONSTANT, n_used=len(cells_a), n_used_b=len(cells_b))
        return self._transport(a, b) if self.metric == "wasserstein" else self._energy(a, b)

    def _shared(self, a: str, b: str) -> tuple[NDArray[np.intp], NDArray[np.intp]] | Scored:
        """Return the cells of each that are in batches with both, or the score of a pair that has too few."""
        cells = (self.groups.members[a], self.groups.members[b])
        batches = self.groups.batches
        if batches is None:
            return cells
        shared = np.intersect1d(batches[cells[0]], batches[cells[1]])
        used = (cells[0][np.isin(batches[cells[0]], shared)], cells[1][np.isin(batches[cells[1]], shared)])
        for some, whole in zip(used, cells, strict=True):
            if (missing := batch_score(len(some), len(whole), self.options)) is not None:
                return replace(missing, n_used=len(used[0]), n_used_b=len(used[1]))
        return used

    def _energy(self, a: str, b: str) -> Scored:
        options, batches = self.options, self.groups.batches
        cells = self._shared(a, b)
        if isinstance(cells, Scored):
            return cells
        codes: list[NDArray[np.intp] | None] = [None, None]
        count, flags, groups = 1, list[str](), list[Group]()
        for name, some in zip((a, b), cells, strict=True):
            whole = len(some) == len(self.groups.members[name])
            groups.append(self.group(name) if whole else self.maker.make(some))
            flags = flags if whole else ["batch_partly_confounded"]
        if batches is not None:
            shared = np.unique(batches[cells[0]])
            count, codes = len(shared), [np.searchsorted(shared, batches[some]) for some in cells]
        pool = Pool(groups[0], groups[1], options.estimator)
        test = EnergyTest(cells[0], codes[0], pool.observed, *pool.moments(codes[0], codes[1], count), pool.noise)
        exchange = Exchange.of(len(cells[0]), len(cells[1]), self.groups.pooled_batches(*cells))
        most = options.permutations or BASE
        if exchange.log_count < np.log(most + 1):
            flags.append("few_exchanges")
        if exchange.log_count < np.log(ENUMERATED):
            test.count_all(pool.split(exchange.every()))
        else:
            rng = generator(options.seed, "exchange", *map(self.groups.stream, cells))
            for members in exchange.draw(most, rng):
                test.count(pool.split(members), options.exceedances)
                if test.source:
                    break
            test.source = test.source or "exchanges"
        if test.sd == 0:
            flags.append("null_sd_zero")
        sizes = (len(cells[0]), test.source, test.draws)
        return Scored(test.observed, test.mean, test.sd, test.p, tuple(flags), *sizes, n_used_b=len(cells[1]))

    def _transport(self, a: str, b: str) -> Scored:
        options, flags = self.options, []
        found = self._shared(a, b)
        if isinstance(found, Scored):
            return found
        cells = list(found)
        if any(len(some) < len(self.groups.members[name]) for some, name in zip(cells, (a, b), strict=True)):
            flags.append("batch_partly_confounded")
        for i, members in enumerate(cells):
            if len(members) > MAX_TRANSPORT_CELLS:
                flags.append("transport_subsampled")
                rng = generator(options.seed, "transport", self.groups.stream(members))
                cells[i] = rng.choice(members, MAX_TRANSPORT_CELLS, replace=False)
        n = len(cells[0])
        pooled = pairwise_distances(self.maker.rows(np.concatenate(cells)))
        exchange = Exchange.of(n, len(cells[1]), self.groups.pooled_batches(cells[0], cells[1]))
        flags += exchange_flags(exchange, options.wasserstein_permutations)
        rng = generator(options.seed, "exchange", *map(self.groups.stream, cells))
        every = exchange.log_count < np.log(options.wasserstein_permutations + 1)
        draws = [exchange.every()] if every else exchange.draw(options.wasserstein_permutations, rng)
        picks = ((np.flatnonzero(a), np.flatnonzero(~a)) for members in draws for a in members.T > 0)
        null = np.asarray(list(picked_costs(pooled, picks, _optimal)))
        noise = RELATIVE_NOISE * float(pooled.mean(dtype=np.float64))
        distance = _optimal(pooled[:n, n:])
        p = float((null >= distance - noise).mean()) if every else empirical_p(distance, null, noise=noise)
        mean, sd = float("nan"), float("nan")
        if len(null) >= FEWEST_DRAWS:
            mean, sd = float(null.mean()), float(null.std())
            sd = sd if sd > noise else 0.0
        else:
            flags.append("few_draws")
        if sd == 0:
            flags.append("null_sd_zero")
        source: PSource = "enumerated" if every else "exchanges"
        sizes = (n, source, len(null))
        return Scored(distance, mean, sd, p, tuple(dict.fromkeys(flags)), *sizes, n_used_b=len(cells[1]))


def _optimal(cost: NDArray[np.float32]) -> float:
    return assignment_cost(cost) if cost.shape[0] == cost.shape[1] else transport_cost(cost)


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
