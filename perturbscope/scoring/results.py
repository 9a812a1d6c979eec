"""Options of scoring, and its results: tables with their provenance and warnings."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.statistics import benjamini_hochberg, bonferroni, holm
from perturbscope.threads import checkpoint

Metric = Literal["e_distance", "cosine_e_distance", "wasserstein"]
Estimator = Literal["U", "V"]
Ground = Literal["euclidean", "sqeuclidean"]
NullMode = Literal["size_matched", "fixed"]
Correction = Literal["bh", "bonferroni", "holm"]

CORRECTIONS = {"bh": benjamini_hochberg, "bonferroni": bonferroni, "holm": holm}
"""Corrections for many tests, by name."""
SCORE_COLUMNS = (
    "perturbation",
    "n_cells",
    "n_controls",
    "metric",
    "distance",
    "null_mean",
    "null_sd",
    "z",
    "p",
    "q",
    "flags",
    "n_used",
    "p_source",
    "exchanges",
    "p_tail",
    "p_tail_source",
    "p_omnibus",
    "q_omnibus",
    "fired",
)
"""Columns of a table of scores, in order."""
COMPARE_COLUMNS = (
    "a",
    "b",
    "n_a",
    "n_b",
    "metric",
    "distance",
    "null_mean",
    "null_sd",
    "z",
    "p",
    "q",
    "flags",
    "n_used_a",
    "n_used_b",
    "p_source",
    "exchanges",
    "effect_similarity",
)
"""Columns of a table of pairs, in order."""
NUMBERS = ("distance", "null_mean", "null_sd", "z", "p", "q", "p_tail", "p_omnibus", "q_omnibus", "effect_similarity")
"""Columns of both that hold numbers, NaN where one could not be computed."""

MOST_EXCHANGES = 200_000
"""Most exchanges of labels of a perturbation, unless more are asked for."""

FLAGS: dict[str, str] = {
    "too_few_cells": "fewer cells than the floor (min_cells); not scored",
    "similar_label": "the label differs from another only in case or white space",
    "cells_subsampled": "more cells than max_cells; a seeded sample was scored",
    "controls_subsampled": "more controls than max_cells; a seeded sample was used",
    "fewer_controls_than_cells": "not enough controls for a sample of the same size; all controls were used",
    "few_draws": "fewer than five exchanges of labels were drawn, so z is undefined",
    "null_sd_zero": "no exchange of labels changes the distance, so z is undefined",
    "constant_embeddings": "all cells of both groups have the same vector, which no test can tell apart",
    "duplicated_vectors": "over a tenth of the cells share their vector with other cells; if they are copies, p is off",
    "batch_confounded": "no batch holds cells of both groups, so labels cannot be exchanged; not scored",
    "batch_partly_confounded": "some cells are in batches without the other group; they were left out (see n_used)",
    "batch_too_few_cells": "fewer than min_cells cells are in batches with the other group; not scored",
    "few_exchanges": "fewer distinct exchanges of labels than permutations; all were made, and p cannot be small",
    "few_units": "fewer than 20 different choices of whole units, so p_unit cannot be 0.05 or less",
    "unit_confounded": "no batch holds units of both groups, so whole units cannot be exchanged",
    "unit_sd_zero": "no exchange of whole units changes the distance, so z_unit is undefined",
    "transport_subsampled": "groups above 2,000 cells were sampled for the transport problem",
}
"""Every flag of a result's row, and its meaning."""
_TOLD = (
    "constant_embeddings",
    "duplicated_vectors",
    "batch_confounded",
    "batch_partly_confounded",
    "batch_too_few_cells",
    "few_exchanges",
    "null_sd_zero",
    "few_draws",
    "few_units",
    "unit_confounded",
    "unit_sd_zero",
)
"""Flags that undo a number or cast doubt on it, which a result's warnings explain too."""


_LATER = ("missing_labels", "normalize_combinations", "nearest")
"""Options that do nothing by default, and that a server of an earlier version does not know."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of scoring.

    Parameters
    ----------
    metrics
        Distances to report. ``e_distance``: energy distance with the `ground` distance; ``cosine_e_distance``: energy
        distance with cosine distance; ``wasserstein``: exact optimal transport at Euclidean cost.
    ground
        Ground distance of ``e_distance``: ``euclidean`` (unsquared; Zhao et al. 2025, pertpy) or ``sqeuclidean`` (the
        default of scPerturb, Peidli et al. 2024), which detects a shift of the mean and nothing else.
    estimator
        ``U`` leaves out a cell's distance to itself: unbiased, and may be negative. ``V`` keeps it: never negative,
        and larger the fewer cells there are.
    null
        Distribution behind z. ``size_matched``: the exchanges of labels that p counts, whose mean and sd have a closed
        form for the energy distances. ``fixed``: groups of `null_size` controls for all (Zhao et al. 2025), which is
        biased by size unless every perturbation has that many cells.
    null_size
        Cells in each group of the fixed null, which needs twice as many controls.
    null_draws
        Random groups of controls behind the fixed null of ``wasserstein``. The energy distances need none.
    permutations
        Most exchanges of labels behind p of the energy distances. None: 1,000, and for those whose p is small as many
        as tell it from chance among all perturbations, at most 200,000.
    exceedances
        Exchanges that reach the observed energy distance after which no more are drawn (Besag and Clifford 1991), which
        leaves p exact; 0: all `permutations` are drawn.
    wasserstein_permutations
        Exchanges of labels behind z and p of ``wasserstein``, each of which solves two transport problems.
    correction
        ``bh`` (Benjamini-Hochberg: the expected share of false hits), ``holm`` or ``bonferroni`` (the probability of a
        single false hit; Holm finds all that Bonferroni does and more) over the perturbations of one metric.
    min_cells
        Fewest cells of a group; smaller groups are listed with the flag ``too_few_cells``.
    max_cells
        Most cells of a group; larger groups are sampled and flagged. This bounds memory: three matrices of at most
        `max_cells` squared float32 values are held.
    repeats
        Size-matched control samples over which the distance is averaged for ``wasserstein`` and with the fixed null
        (Zhao et al. 2025 use one). Other distances are those from all controls.
    normalize
        Scale every vector to unit length first.
    centre
        Take the mean of all cells, whatever their labels, from every vector before it is scaled. Where the mean is a
        large part of every vector, scaling takes shifts along it away, and the result warns of it.
    omnibus
        Also test by members that see changes of variance, states and narrow axes, on the same exchanges; see
        :mod:`perturbscope.scoring.energy.omnibus`. Energy distances alone.
    seed
        Seed of all random draws.
    missing_labels
        Labels, such as ``nan`` and ``NA``, that stand for a missing one: their cells are left out.
    normalize_combinations
        Write each combination of perturbations in one way, ``A+B`` for ``B,A`` too, and ``A`` for ``A+ctrl``.
    nearest
        Of a comparison, return for each perturbation its nearest ones by cells and by effects, this many of each, the
        closest pairs first; 0: all pairs, in their order. q is over all pairs.

    Raises
    ------
    InvalidParameterError
        A value outside its range.
    """

    metrics: tuple[Metric, ...] = ("e_distance",)
    ground: Ground = "euclidean"
    estimator: Estimator = "U"
    null: NullMode = "size_matched"
    null_size: int = 300
    null_draws: int = 100
    permutations: int | None = None
    exceedances: int = 20
    wasserstein_permutations: int = 100
    correction: Correction = "bh"
    min_cells: int = 20
    max_cells: int = 5000
    repeats: int = 10
    normalize: bool = True
    centre: bool = False
    omnibus: bool = False
    seed: int = 0
    missing_labels: tuple[str, ...] = ()
    normalize_combinations: bool = False
    nearest: int = 0

    def __post_init__(self) -> None:
        metrics: object = self.metrics  # a request may hold anything here
        if not isinstance(metrics, list | tuple) or not metrics:
            raise InvalidParameterError(
                f"metrics must be a list with at least one of {', '.join(get_args(Metric))}, not {metrics!r}.",
                field="metrics",
            )
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(self.metrics)))
        for metric in self.metrics:
            one_of("metrics", metric, get_args(Metric))
        one_of("ground", self.ground, get_args(Ground))
        one_of("estimator", self.estimator, get_args(Estimator))
        one_of("null", self.null, get_args(NullMode))
        one_of("correction", self.correction, get_args(Correction))
        for name, low, high in (
            ("null_size", 2, 100_000),
            ("null_draws", 10, 1_000_000),
            ("exceedances", 0, 1_000_000),
            ("wasserstein_permutations", 1, 1_000_000),
            ("min_cells", 2, 1_000_000),
            ("max_cells", 4, 50_000),
            ("repeats", 1, 1_000),
            ("seed", 0, 2**63 - 1),
            ("nearest", 0, 1_000_000),
        ):
            _whole(name, getattr(self, name), low, high)
        if self.permutations is not None:
            _whole("permutations", self.permutations, 1, 1_000_000)
        for name in ("normalize", "centre", "omnibus", "normalize_combinations"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameterError(f"{name} must be true or false, not {getattr(self, name)!r}.", field=name)
        missing: object = self.missing_labels
        if isinstance(missing, str):
            missing = (missing,)
        if not isinstance(missing, list | tuple) or not all(isinstance(label, str) for label in missing):
            raise InvalidParameterError(
                f"missing_labels must be a list of labels, not {missing!r}.", field="missing_labels"
            )
        object.__setattr__(self, "missing_labels", tuple(dict.fromkeys(missing)))
        if self.min_cells > self.max_cells:
            raise InvalidParameterError(
                f"min_cells ({self.min_cells}) is above max_cells ({self.max_cells}); raise max_cells.",
                field="min_cells",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON-able values; the inverse of :meth:`from_dict`.

        Those that a server of an earlier version does not know are left out where they do nothing.
        """
        values = {**asdict(self), "metrics": list(self.metrics), "missing_labels": list(self.missing_labels)}
        return {name: value for name, value in values.items() if value or name not in _LATER}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoreOptions:
        """Return options from a mapping of their names; those left out keep their defaults.

        Raises
        ------
        InvalidParameterError
            An unknown name, or a value outside its range.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InvalidParameterError(
                f"Unknown option {unknown[0]!r}; the options are {', '.join(known)}.", field=str(unknown[0])
            )
        return cls(**values)


@dataclass(frozen=True)
class ScoreResult:
    """Scores of perturbations against control.

    Attributes
    ----------
    table
        One row a perturbation and metric, strongest first; columns :data:`SCORE_COLUMNS`. ``flags`` holds names of
        :data:`FLAGS` joined by ``;``. A number that could not be computed is NaN, and its row carries a flag.
    provenance
        Options, seed, estimator, null, sizes and version that made the numbers (JSON-able).
    warnings
        Sentences that a reader should know before trusting a number.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> pd.DataFrame:
        """Return number, median, quartiles and skewness of the perturbations' z by metric, and how many have q < 0.05.

        Returns
        -------
        One row a metric: ``metric, n, median_z, q25_z, q75_z, iqr_z, skewness_z, n_significant``.
        """
        rows = []
        for metric, part in self.table.groupby("metric", sort=False):
            z = part["z"].dropna()
            shape = {f"{name}_z": value for name, value in distribution(z).items()}
            rows.append({"metric": metric, "n": len(z), **shape, "n_significant": int((part["q"] < 0.05).sum())})
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class CompareResult:
    """Distances between pairs of perturbations.

    Attributes
    ----------
    table
        One row a pair (a before b) and metric; columns :data:`COMPARE_COLUMNS`.
    provenance, warnings
        See :class:`ScoreResult`.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def distribution(values: pd.Series[float]) -> dict[str, float]:
    """Return ``median``, ``q25``, ``q75``, ``iqr`` and ``skewness`` of numbers without NaN."""
    low, middle, high = (float(values.quantile(share)) for share in (0.25, 0.5, 0.75))
    centred = values - values.mean()
    spread = float((centred**2).mean()) ** 0.5
    skewness = float((centred**3).mean()) / spread**3 if spread > 0 else float("nan")
    return {"median": middle, "q25": low, "q75": high, "iqr": high - low, "skewness": skewness}


def with_q(table: pd.DataFrame, options: ScoreOptions) -> pd.DataFrame:
    """Fill the column q of a table: p corrected over the rows of each metric."""
    for p, q in (("p", "q"), ("p_omnibus", "q_omnibus")):
        if p in table:
            table[q] = table.groupby("metric")[p].transform(CORRECTIONS[options.correction])
    return table


def release() -> str:
    """Return the version of the installed package."""
    try:
        return version("perturbscope")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def provenance(
    kind: str, options: ScoreOptions, *, n_cells: int, width: int, batches: int | None, **facts: Any
) -> dict[str, Any]:
    """Return a JSON-able record of what made the numbers; `batches` is the number of batches, if there are any."""
    return {
        "kind": kind,
        "version": release(),
        "metrics": list(options.metrics),
        "ground": options.ground,
        "estimator": options.estimator,
        "seed": options.seed,
        "n_cells": n_cells,
        "width": width,
        "unit_length": options.normalize,
        "batches": batches,
        "correction": options.correction,
        "options": options.to_dict(),
        **facts,
    }


class Rows:
    """Rows of a table, collected as columns: a million of them take a tenth of the memory of a million dictionaries.

    Parameters
    ----------
    columns
        Names of the columns, in order. Those of :data:`NUMBERS` hold numbers.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns: dict[str, Any] = {name: array("d") if name in NUMBERS else [] for name in columns}
        self._texts: dict[str, str] = {}

    def add(self, **values: Any) -> None:
        """Add a row, all columns by name."""
        checkpoint()
        for name, column in self._columns.items():
            value = values[name]
            # Flags are a few texts, which all rows share.
            column.append(self._texts.setdefault(value, value) if name == "flags" else value)

    def frame(self) -> pd.DataFrame:
        """Return the table; the rows are used up."""
        columns = {}
        for name in list(self._columns):
            checkpoint()
            values = self._columns.pop(name)
            columns[name] = np.frombuffer(values) if isinstance(values, array) else pd.Series(values)
        return pd.DataFrame(columns)


def flag_warnings(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return warnings for the flags that undo a number or cast doubt on it; `names` are columns that name a row."""
    warnings = []
    codes, texts = pd.factorize(table["flags"])
    flags = [str(text).split(";") for text in texts]
    for flag in _TOLD:
        checkpoint()
        hits = table.loc[np.isin(codes, [i for i, some in enumerate(flags) if flag in some]), list(names)]
        if len(hits):
            different = hits[~hits.duplicated()]
            listed = [" - ".join(row) for row in different.head(5).itertuples(index=False)]
            more = f" and {len(different) - 5} more" if len(different) > 5 else ""
            warnings.append(f"{flag}: {FLAGS[flag]} ({', '.join(listed)}{more}).")
    return warnings


def permutations_by_metric(options: ScoreOptions) -> dict[str, int | None]:
    """Return the most exchanges of labels behind p that were asked for, by metric; None: as many as are needed."""
    return {
        metric: options.wasserstein_permutations if metric == "wasserstein" else options.permutations
        for metric in options.metrics
    }


def resolution_warnings(n_tests: int, options: ScoreOptions) -> list[str]:
    """Return warnings for metrics whose smallest possible p could not reach q < 0.05 on its own."""
    by_count: dict[int, list[str]] = {}
    for metric, count in permutations_by_metric(options).items():
        by_count.setdefault(MOST_EXCHANGES if count is None else count, []).append(metric)
    return [
        f"{', '.join(metrics)}: {count} permutations over {n_tests} tests; the smallest p is {1 / (1 + count):.2g}, so "
        f"a single hit cannot reach q < 0.05. Use {20 * n_tests:,} permutations or more if hits are few."
        for count, metrics in by_count.items()
        if n_tests / (1 + count) > 0.05
    ]


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise InvalidParameterError unless the value of the parameter `name` is one of `allowed`."""
    if value not in allowed:
        raise InvalidParameterError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.", field=name)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameterError(f"{name} must be a whole number from {low} to {high}, not {value!r}.", field=name)
