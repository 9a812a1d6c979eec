"""All measures beyond distances from control, over one embedding of one screen.

Most ask whether replicates of a perturbation agree, without controls: :mod:`evaluation.retrieval`,
:mod:`evaluation.split_half`, :mod:`evaluation.consistency`, :mod:`evaluation.relations`; and :mod:`evaluation.power`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.consistency import Signal, consistency, magnitude
from evaluation.power import power
from evaluation.profiles import random_halves
from evaluation.relations import relation_recall
from evaluation.retrieval import Retrieval, retrieve
from evaluation.screens import GUIDE_UNKNOWN, EvaluationScreen
from evaluation.separation import SeparationOptions, contexts
from evaluation.split_half import split_half
from perturbscope.errors import InvalidEmbeddingError, InvalidInputError, LimitExceededError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ReplicationOptions:
    """Numbers of draws.

    Parameters
    ----------
    permutations
        Number of exchanges of names behind p of retrieval and of recall.
    draws
        Number of random sets behind p of consistency, and of exchanges of labels behind p of magnitude.
    max_cells
        Most cells of a perturbation, and of the rest beside it, for consistency and magnitude.
    power_grid, power_repeats
        Numbers of cells drawn from each perturbation, and number of draws; 0 repeats leave power out.
    min_cells
        Fewest cells of a profile of one replicate.
    seed
        Seed of all draws.
    """

    permutations: int = 999
    draws: int = 199
    max_cells: int = 500
    power_grid: tuple[int, ...] = (20, 50, 100, 200)
    power_repeats: int = 10
    min_cells: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Replication:
    """Numbers of one embedding of one screen.

    Attributes
    ----------
    tables
        Tables by measure, each with a column ``context``: ``retrieval`` (and ``replicate``: guide, batch or half),
        ``split_half``, ``consistency``, ``magnitude``, ``relations`` (pairs), ``power`` (curves), ``needed``.
    numbers
        Means over perturbations of all contexts (JSON-able).
    warnings
        Sentences that a reader should know before trusting a number.
    """

    tables: dict[str, pd.DataFrame]
    numbers: dict[str, float]
    warnings: list[str] = field(default_factory=list)


def measure_replication(
    values: NDArray[np.float32],
    screen: EvaluationScreen,
    *,
    relations: Mapping[str, Collection[str]] | None = None,
    options: ReplicationOptions | None = None,
    progress: Progress | None = None,
) -> Replication:
    """Run all measures on every context with two perturbations or more.

    Parameters
    ----------
    values
        One vector a cell, [n_cells, width].
    screen
        Labels of the same cells.
    relations
        Gene sets whose genes should resemble each other.
    progress
        Called as ``progress(stage, done, total)``.

    Raises
    ------
    InvalidEmbeddingError
        A vector is not finite.
    """
    options = options or ReplicationOptions()
    collected = _Collector()
    for name, part in contexts(screen):
        rows, subset = values[part], screen[part]
        if len(set(subset.perturbations)) < 3:
            continue
        collect = collected.of(name)
        for kind, labels in _replicates(subset, options.seed).items():
            _retrieval(collect, rows, subset, kind, labels, options)
        common: dict[str, Any] = {"control": subset.control, "batches": subset.batches, "seed": options.seed}
        with collected.skipping(f"split halves {name}"):
            halves = split_half(rows, subset.perturbations, **common)
            collect("split_half", halves.table, halves.warnings)
        for measure in (consistency, magnitude):
            with collected.skipping(f"{measure.__name__} {name}"):
                signal: Signal = measure(
                    rows,
                    subset.perturbations,
                    **common,
                    max_cells=options.max_cells,
                    draws=options.draws,
                    progress=progress,
                )
                collect(signal.name, signal.table, signal.warnings)
        if relations:
            with collected.skipping(f"relations {name}"):
                recall = relation_recall(
                    rows, subset.perturbations, relations, control=subset.control, permutations=options.permutations
                )
                collect("relations", recall.pairs, recall.warnings)
                if recall.status == "ok":
                    summary = {key: value for key, value in recall.to_dict().items() if isinstance(value, int | float)}
                    collect("recall", pd.DataFrame([summary]), [])
        if options.power_repeats:
            with collected.skipping(f"power {name}"):
                curves = power(
                    rows,
                    subset.perturbations,
                    control=subset.control,
                    batches=subset.batches,
                    grid=options.power_grid,
                    repeats=options.power_repeats,
                    options=SeparationOptions(seed=options.seed).score_options(),
                    progress=progress,
                )
                collect("power", pd.concat([curves.curves, curves.false_positives], ignore_index=True), curves.warnings)
                collect("needed", curves.needed, [])
    tables = collected.joined()
    return Replication(tables, _numbers(tables), collected.warnings)


def _replicates(screen: EvaluationScreen, seed: int) -> dict[str, list[str]]:
    """Return replicates by kind: guides and batches if the screen has them, and random halves always."""
    replicates = {}
    if screen.guides is not None:
        replicates["guide"] = screen.guides
    if screen.batches is not None:
        replicates["batch"] = screen.batches
    return {**replicates, "half": random_halves(screen.perturbations, seed=seed, batches=screen.batches)}


def _retrieval(
    collect: Callable[[str, pd.DataFrame, list[str]], None],
    values: NDArray[np.float32],
    screen: EvaluationScreen,
    kind: str,
    labels: list[str],
    options: ReplicationOptions,
) -> None:
    known = np.flatnonzero(np.asarray(labels) != GUIDE_UNKNOWN)
    try:
        retrieval: Retrieval = retrieve(
            values[known],
            [screen.perturbations[row] for row in known],
            [labels[row] for row in known],
            control=screen.control,
            # A batch may shift all of its cells; a guide belongs to one perturbation only.
            centre="replicate" if kind == "batch" else "cells",
            min_cells=options.min_cells,
            permutations=options.permutations,
            seed=options.seed,
        )
    except (InvalidInputError, LimitExceededError) as error:
        collect("retrieval", pd.DataFrame(), [f"retrieval by {kind}: {error.message}"])
        return
    table = retrieval.table.assign(replicate=kind)
    collect("retrieval", table, [f"retrieval by {kind}: {text}" for text in retrieval.warnings])
    collect(
        "map",
        pd.DataFrame([{"replicate": kind, "map": retrieval.map, "chance": retrieval.chance, "p": retrieval.p}]),
        [],
    )


def _numbers(tables: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    retrieval = tables.get("retrieval", pd.DataFrame())
    if len(retrieval):
        for kind, part in retrieval.dropna(subset=["average_precision"]).groupby("replicate"):
            numbers[f"map_{kind}"] = float(part["average_precision"].mean())
            numbers[f"map_{kind}_chance"] = float(part["chance"].mean())
            numbers[f"retrieved_{kind}"] = float((part["q"] < 0.05).mean())
        for kind, part in tables["map"].groupby("replicate"):
            numbers[f"map_{kind}_p"] = float(part["p"].min()) if len(part) == 1 else float("nan")
    for measure, column in (("split_half", "correlation"), ("split_half", "accuracy")):
        if measure in tables and len(tables[measure]):
            numbers[f"{measure}_{column}"] = float(tables[measure][column].mean())
    for measure in ("consistency", "magnitude"):
        if measure in tables and len(tables[measure]):
            rows = tables[measure].dropna(subset=["p"])
            numbers[f"{measure}_detected"] = float((rows["q"] < 0.05).mean())
            numbers[f"{measure}_median_z"] = float(rows["z"].median())
    if "recall" in tables and len(tables["recall"]):
        for column in ("recall", "chance", "p", "nearest", "nearest_chance", "n_known"):
            numbers[f"relations_{column}"] = float(tables["recall"][column].mean())
    return numbers


class _Collector:
    """Collects tables of several contexts, and says why some are missing."""

    def __init__(self) -> None:
        self.tables: dict[str, list[pd.DataFrame]] = {}
        self.warnings: list[str] = []

    def of(self, context: str) -> Callable[[str, pd.DataFrame, list[str]], None]:
        """Return a function that adds a table and its warnings under one context."""

        def collect(measure: str, table: pd.DataFrame, warnings: list[str]) -> None:
            if len(table):
                self.tables.setdefault(measure, []).append(table.assign(context=context))
            self.warnings += [f"{context}: {text}" if context else text for text in warnings]

        return collect

    @contextmanager
    def skipping(self, what: str) -> Iterator[None]:
        """Turn an error about a measure that the screen does not allow into a warning."""
        try:
            yield
        except InvalidEmbeddingError:
            raise
        except InvalidInputError as error:
            self.warnings.append(f"{what.strip()}: {error.message}")

    def joined(self) -> dict[str, pd.DataFrame]:
        """Return the tables by measure, those of all contexts together."""
        return {name: pd.concat(parts, ignore_index=True) for name, parts in self.tables.items()}
