"""Retrieval of a perturbation's replicates among those of all perturbations, without controls.

Every profile (:mod:`evaluation.profiles`) is a query. The profiles of other replicates are ranked by cosine similarity
to it, and the average precision says how high those of the same perturbation rank. Its mean over queries (mAP) is the
measure of image-based profiling (Kalinin et al. 2025, "A versatile information retrieval framework for evaluating
profile strength and similarity"). Two differences: the null exchanges the names of whole profiles, so that the queries
of one perturbation stay as dependent as they are (independent random rankings would give p-values that are too small);
and ties are broken at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from evaluation.profiles import Centre, Profiles, Whitening, label_warnings, make_profiles
from perturbscope.errors import InvalidParameterError, LimitExceededError
from perturbscope.scoring.statistics import benjamini_hochberg, empirical_p, generator

MAX_PROFILES = 12_000
"""Most profiles, since the ranks of all by all are held (int32)."""
_BLOCK = 512
_NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Retrieval of replicates, as numbers.

    Attributes
    ----------
    table
        One row a perturbation: ``perturbation``, ``n_cells``, ``n_replicates``, ``average_precision`` (mean over its
        queries), ``chance`` (its expectation over random rankings), ``recall@k``, ``p``, ``q`` (Benjamini-Hochberg) and
        ``flags``. Perturbations that cannot be queried come last, with NaN and a flag.
    map
        Mean of ``average_precision`` over the perturbations that have one.
    chance
        Expectation of `map` over random rankings; exact.
    p
        Permutation p-value of `map`, from exchanged names.
    recall
        k -> mean over perturbations of the share of a query's matches among its k nearest.
    recall_chance
        The same for random rankings.
    n_queries, n_profiles, n_perturbations
        Numbers of queries, of profiles ranked, and of perturbations with a query.
    warnings
        Sentences that a reader should know before trusting a number.
    """

    table: pd.DataFrame
    map: float
    chance: float
    p: float
    recall: dict[int, float]
    recall_chance: dict[int, float]
    n_queries: int
    n_profiles: int
    n_perturbations: int
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON-able values, without the table."""
        return {name: value for name, value in vars(self).items() if name != "table"}


def retrieve(
    values: ArrayLike,
    perturbations: Sequence[str],
    replicates: Sequence[str],
    *,
    control: str | None = None,
    exclude_same: bool = True,
    centre: Centre = "cells",
    whitening: Whitening = "none",
    recall_at: Sequence[int] = (1, 5, 10),
    min_cells: int = 5,
    permutations: int = 999,
    seed: int = 0,
) -> Retrieval:
    """Rank the profiles of other replicates by similarity to each profile.

    Parameters
    ----------
    values
        One vector a cell, [n, width].
    perturbations, replicates
        Labels of each cell. A replicate is a guide, a batch, or a random half
        (:func:`evaluation.profiles.random_halves`).
    control
        Label of the controls, which are left out.
    exclude_same
        Whether to rank only profiles of other replicates; profiles that share a batch resemble each other for that
        alone.
    centre, whitening, min_cells
        See :func:`evaluation.profiles.make_profiles` and :meth:`evaluation.profiles.Profiles.directions`.
    recall_at
        Values of k in recall@k.
    permutations
        Number of exchanges of perturbation names, within replicates if these hold several perturbations. With two
        replicates, p cannot be below about one over the number of perturbations, the chance that an exchange pairs the
        two again.
    seed
        Seed of the exchanges, and of the order of ties.

    Raises
    ------
    InvalidEmbeddingError, MalformedMatrixError, InvalidParameterError, TooFewCellsError
        See :func:`evaluation.profiles.make_profiles`.
    LimitExceededError
        There are more than 12,000 profiles.
    """
    if permutations < 1 or not recall_at or min(recall_at) < 1:
        raise InvalidParameterError(
            f"permutations ({permutations}) and every k of recall_at ({list(recall_at)}) must be 1 or more.",
            field="permutations" if permutations < 1 else "recall_at",
        )
    profiles = make_profiles(
        values, perturbations, replicates, control=control, min_cells=min_cells, whitening=whitening
    )
    if len(profiles) > MAX_PROFILES:
        raise LimitExceededError(
            f"{len(profiles):,} profiles; at most {MAX_PROFILES:,} can be ranked against each other. "
            "Take coarser replicates or a larger min_cells.",
            field="replicates",
        )
    vectors, directed = profiles.directions(centre)
    rng = generator(seed, "retrieve")
    groups = np.unique(profiles.replicates, return_inverse=True)[1] if exclude_same else np.arange(len(profiles))
    ranks, candidates = _ranks(vectors, groups, rng)
    names, codes = np.unique(profiles.perturbations, return_inverse=True)
    ks = tuple(dict.fromkeys(int(k) for k in recall_at))
    judge = _Judge(ranks, candidates, groups, directed, len(names), ks)
    observed = judge.by_perturbation(codes)
    null = np.array([judge.by_perturbation(drawn)[0] for drawn in _exchanges(profiles, codes, permutations, rng)])
    asked = np.flatnonzero(~np.isnan(observed[0]))
    p = np.full(len(names), _NAN)
    for name in asked:
        known = null[:, name]
        p[name] = empirical_p(observed[0][name], known[~np.isnan(known)], noise=1e-12)
    table = pd.DataFrame(
        {
            "perturbation": names.astype(object),
            "n_cells": np.bincount(codes, weights=profiles.sizes).astype(int),
            "n_replicates": np.bincount(codes),
            "average_precision": observed[0],
            "chance": observed[1],
            **{f"recall@{k}": observed[2 + 2 * i] for i, k in enumerate(ks)},
            "p": p,
            "q": benjamini_hochberg(p),
            "flags": _flags(codes, directed, observed[0]),
        }
    )
    means = [float(np.mean(column[asked])) if len(asked) else _NAN for column in observed[:-1]]
    overall = empirical_p(means[0], np.nanmean(null[:, asked], axis=1), noise=1e-12) if len(asked) else _NAN
    return Retrieval(
        table.sort_values(["average_precision", "perturbation"], ascending=[False, True], ignore_index=True),
        means[0],
        means[1],
        overall,
        {k: means[2 + 2 * i] for i, k in enumerate(ks)},
        {k: means[3 + 2 * i] for i, k in enumerate(ks)},
        int(observed[-1].sum()),
        len(profiles),
        len(asked),
        [*label_warnings(names.tolist()), *_warnings(profiles, directed, len(names), len(asked))],
    )


class _Judge:
    """Computes average precision and recall of every perturbation, for any naming of the same ranked profiles."""

    def __init__(
        self,
        ranks: NDArray[np.int32],
        candidates: NDArray[np.intp],
        groups: NDArray[np.intp],
        directed: NDArray[np.bool_],
        n_names: int,
        ks: tuple[int, ...],
    ) -> None:
        self.ranks, self.candidates, self.groups, self.directed = ranks, candidates, groups, directed
        self.n_names, self.ks = n_names, ks

    def matches(self, codes: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return queries and matches: every ordered pair of profiles of one name and different groups."""
        order = np.argsort(codes, kind="stable")
        sizes = np.bincount(codes, minlength=self.n_names)
        queries, matches = [], []
        for size in np.unique(sizes[sizes > 1]).tolist():
            starts = (np.cumsum(sizes) - sizes)[sizes == size]
            members = order[starts[:, None] + np.arange(size)]
            left, right = np.nonzero(~np.eye(size, dtype=bool))
            queries.append(members[:, left].ravel())
            matches.append(members[:, right].ravel())
        if not queries:
            return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp)
        query, match = np.concatenate(queries), np.concatenate(matches)
        fair = (self.groups[query] != self.groups[match]) & self.directed[query]
        return query[fair], match[fair]

    def by_perturbation(self, codes: NDArray[np.intp]) -> list[NDArray[np.float64]]:
        """Return means over each name's queries: average precision and its chance level, then recall@k and its, k by k.

        The last column is the number of queries. A query whose candidates all match says nothing and is not counted.
        """
        query, match = self.matches(codes)
        contested = np.bincount(query, minlength=len(codes))[query] < self.candidates[query]
        query, match = query[contested], match[contested]
        rank = self.ranks[query, match].astype(np.float64)
        order = np.lexsort((rank, query))
        query, rank = query[order], rank[order]
        asked, start, count = np.unique(query, return_index=True, return_counts=True)
        place = np.arange(len(query)) - np.repeat(start, count) + 1
        total = self.candidates[asked].astype(np.float64)

        def per_query(values: NDArray[np.float64]) -> NDArray[np.float64]:
            sums: NDArray[np.float64] = np.add.reduceat(values, start) if len(start) else values
            return sums / count

        columns = [per_query(place / rank), chance_average_precision(count, total)]
        for k in self.ks:
            columns += [per_query((rank <= k).astype(np.float64)), np.minimum(k / total, 1.0)]
        queries = np.bincount(codes[asked], minlength=self.n_names)
        means: list[NDArray[np.float64]] = []
        for column in columns:
            sums = np.bincount(codes[asked], column, self.n_names)
            means.append(np.where(queries > 0, sums / np.maximum(queries, 1), _NAN))
        return [*means, queries.astype(np.float64)]


def chance_average_precision(matches: ArrayLike, candidates: ArrayLike) -> NDArray[np.float64]:
    """Return the expected average precision of a random ranking of n candidates with m matches among them.

    It is ``(H_n + (n - H_n) (m - 1) / (n - 1)) / n`` with the harmonic number H_n: a match is at place i with
    probability m / n, and then (i - 1) (m - 1) / (n - 1) others are expected above it.
    """
    m, n = np.asarray(matches, dtype=np.float64), np.asarray(candidates, dtype=np.float64)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(n.max(initial=1)) + 1))])[n.astype(int)]
    more = np.where(n > 1, (m - 1) / np.maximum(n - 1, 1), 0.0)
    chance: NDArray[np.float64] = (harmonic + (n - harmonic) * more) / n
    return chance


def _ranks(
    vectors: NDArray[np.float64], groups: NDArray[np.intp], rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Return every profile's rank (from 1) by similarity to the row's profile among other groups, and their number."""
    n = len(vectors)
    ranks = np.empty((n, n), dtype=np.int32)
    shuffled = rng.permutation(n)
    for start in range(0, n, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, n))
        similarity = vectors[rows] @ vectors.T
        similarity[groups[rows][:, None] == groups] = -np.inf
        # A stable sort of shuffled columns breaks ties at random. Rounding makes near-ties of exact ones.
        order = shuffled[np.argsort(-np.round(similarity[:, shuffled], 12), axis=1, kind="stable")]
        np.put_along_axis(ranks[rows[0] : rows[-1] + 1], order, np.arange(1, n + 1, dtype=np.int32)[None, :], axis=1)
    return ranks, n - np.bincount(groups)[groups]


def _exchanges(
    profiles: Profiles, codes: NDArray[np.intp], permutations: int, rng: np.random.Generator
) -> Iterator[NDArray[np.intp]]:
    """Yield names exchanged within replicates; replicates of a single profile (guides) exchange with each other."""
    _, strata, sizes = np.unique(profiles.replicates, return_inverse=True, return_counts=True)
    strata = np.where(sizes[strata] == 1, -1, strata)
    blocks = [np.flatnonzero(strata == name) for name in np.unique(strata)]
    for _ in range(permutations):
        exchanged = codes.copy()
        for block in blocks:
            exchanged[block] = codes[rng.permutation(block)]
        yield exchanged


def _flags(codes: NDArray[np.intp], directed: NDArray[np.bool_], precision: NDArray[np.float64]) -> list[str]:
    flags = []
    for name, value in enumerate(precision):
        own = codes == name
        flat = "no_direction" if not directed[own].all() else ""
        single = "no_other_replicate" if np.isnan(value) and directed[own].any() else ""
        flags.append(";".join(filter(None, (flat, single))))
    return flags


def _warnings(profiles: Profiles, directed: NDArray[np.bool_], n_names: int, n_asked: int) -> list[str]:
    warnings = []
    if n_names < 2:
        warnings.append("There is one perturbation, so there is nothing to tell it from.")
    if not directed.all():
        warnings.append(
            f"{int((~directed).sum())} of {len(profiles)} profiles equal the centre (constant embeddings, or a "
            "replicate of one perturbation centred by itself); they have no direction and were not queried."
        )
    if not n_asked:
        warnings.append("No perturbation has two replicates that can be compared, so there is no mAP.")
    elif n_asked < n_names:
        warnings.append(f"{n_names - n_asked} of {n_names} perturbations have no other replicate and were not queried.")
    if profiles.dropped:
        warnings.append(f"{len(profiles.dropped)} profiles had too few cells and were left out.")
    return warnings
