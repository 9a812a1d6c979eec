"""What scoring takes and gives: options, and the tables with what made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import pandas as pd

from perturbscope.errors import InvalidParameterError

Metric = Literal["e_distance", "cosine_e_distance", "wasserstein"]
Estimator = Literal["U", "V"]
Ground = Literal["euclidean", "sqeuclidean"]
NullMode = Literal["size_matched", "fixed"]
Correction = Literal["bh", "bonferroni"]

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
)
"""Columns of a table of scores, in their order."""
COMPARE_COLUMNS = ("a", "b", "n_a", "n_b", "metric", "distance", "null_mean", "null_sd", "z", "p", "q", "flags")
"""Columns of a table of pairs, in their order."""

FLAGS: dict[str, str] = {
    "too_few_cells": "fewer cells than the floor (min_cells); not scored",
    "similar_label": "the label differs from another only in case or white space",
    "cells_subsampled": "more cells than max_cells; a seeded sample was scored",
    "controls_subsampled": "more controls than max_cells; a seeded sample was used",
    "fewer_controls_than_cells": "not enough controls for a sample of the same size; all controls were used",
    "null_extrapolated": "too few controls for two disjoint groups of this size; the null sd follows from its formula",
    "null_capped": "too few controls for two disjoint groups of this size; samples of half the controls were compared",
    "null_sd_zero": "the controls do not vary, so z is undefined",
    "constant_embeddings": "all cells of both groups have the same vector, which no test can tell apart",
    "duplicated_vectors": "over a tenth of the cells share their vector with other cells; if they are copies, p is off",
    "batch_confounded": "no batch holds cells of both groups, so labels cannot be exchanged and p is undefined",
    "batch_partly_confounded": "some cells are in batches without the other group; they are never exchanged",
    "few_exchanges": "fewer distinct exchanges of labels than permutations; p cannot be small",
    "transport_subsampled": "groups above 2,000 cells were sampled for the transport problem",
}
"""Every flag of a result's row, and what it says."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How perturbations are scored.

    Parameters
    ----------
    metrics
        Distances to report. ``e_distance``: energy distance with the `ground` distance; ``cosine_e_distance``: the same
        with cosine distance; ``wasserstein``: exact optimal transport at Euclidean cost.
    ground
        Ground distance of ``e_distance``: ``euclidean`` (unsquared; Zhao et al. 2025, pertpy) or ``sqeuclidean`` (the
        default of scPerturb, Peidli et al. 2024), which sees a shift of the mean and nothing else.
    estimator
        ``U`` leaves out a cell's distance to itself: unbiased, and may be negative. ``V`` keeps it: never negative,
        and larger the fewer cells there are.
    null
        Control-against-control distribution behind z. ``size_matched``: groups as large as the perturbation's.
        ``fixed``: groups of `null_size` for all (Zhao et al. 2025); biased by size unless every perturbation has that
        many cells.
    null_size
        Cells in a group of the fixed null; twice as many controls are needed.
    null_draws
        Random control groups behind the null of ``wasserstein``. The energy distances need none: their null's mean and
        sd over all draws have a closed form.
    permutations
        Exchanges of labels behind p of the energy distances.
    wasserstein_permutations
        Exchanges of labels behind p of ``wasserstein``, each of which solves a transport problem.
    correction
        ``bh`` (Benjamini-Hochberg) or ``bonferroni`` over the perturbations of one metric.
    min_cells
        Fewest cells of a group; smaller ones are listed with the flag ``too_few_cells``.
    max_cells
        Most cells of a group; larger ones are sampled and flagged. Bounds memory: three matrices of at most
        `max_cells` squared float32 values are held.
    repeats
        Size-matched control samples over which the distance is averaged (Zhao et al. 2025 use one).
    normalize
        Scale every vector to unit length first.
    seed
        Of all random draws.

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
    permutations: int = 1000
    wasserstein_permutations: int = 100
    correction: Correction = "bh"
    min_cells: int = 20
    max_cells: int = 5000
    repeats: int = 10
    normalize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        given: object = self.metrics  # from the wire it may be anything
        if not isinstance(given, list | tuple) or not given:
            raise InvalidParameterError(
                f"metrics must be a list with at least one of {', '.join(get_args(Metric))}, not {given!r}.",
                field="metrics",
            )
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(self.metrics)))
        for metric in self.metrics:
            _one_of("metrics", metric, get_args(Metric))
        _one_of("ground", self.ground, get_args(Ground))
        _one_of("estimator", self.estimator, get_args(Estimator))
        _one_of("null", self.null, get_args(NullMode))
        _one_of("correction", self.correction, get_args(Correction))
        for name, low, high in (
            ("null_size", 2, 100_000),
            ("null_draws", 10, 1_000_000),
            ("permutations", 1, 1_000_000),
            ("wasserstein_permutations", 1, 1_000_000),
            ("min_cells", 2, 1_000_000),
            ("max_cells", 4, 50_000),
            ("repeats", 1, 1_000),
            ("seed", 0, 2**63 - 1),
        ):
            _whole(name, getattr(self, name), low, high)
        if not isinstance(self.normalize, bool):
            raise InvalidParameterError(f"normalize must be true or false, not {self.normalize!r}.", field="normalize")
        if self.min_cells > self.max_cells:
            raise InvalidParameterError(
                f"min_cells ({self.min_cells}) is above max_cells ({self.max_cells}); raise max_cells.",
                field="min_cells",
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; the inverse of :meth:`from_dict`."""
        return {**asdict(self), "metrics": list(self.metrics)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoreOptions:
        """Options from a mapping of their names; what is left out keeps its default.

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
        :data:`FLAGS` joined by ``;``. A number that could not be had is NaN and carries a flag.
    provenance
        What made the numbers (JSON-able): options, seed, estimator, null, sizes, version.
    warnings
        What a careful reader should know, in words.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> pd.DataFrame:
        """Number, median, quartiles and skewness of the perturbations' z, by metric, and how many have q < 0.05.

        Returns
        -------
        One row a metric: ``metric, n, median_z, q25_z, q75_z, iqr_z, skewness_z, n_significant``.
        """
        rows = []
        for metric, part in self.table.groupby("metric", sort=False):
            z = part["z"].dropna()
            low, middle, high = z.quantile([0.25, 0.5, 0.75])
            centred = z - z.mean()
            spread = float((centred**2).mean()) ** 0.5
            rows.append(
                {
                    "metric": metric,
                    "n": len(z),
                    "median_z": middle,
                    "q25_z": low,
                    "q75_z": high,
                    "iqr_z": high - low,
                    "skewness_z": float((centred**3).mean()) / spread**3 if spread > 0 else float("nan"),
                    "n_significant": int((part["q"] < 0.05).sum()),
                }
            )
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class CompareResult:
    """Distances between pairs of perturbations.

    Attributes
    ----------
    table
        One row a pair (a before b) and metric; columns :data:`COMPARE_COLUMNS`.
    provenance, warnings
        As of :class:`ScoreResult`.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidParameterError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.", field=name)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameterError(f"{name} must be a whole number from {low} to {high}, not {value!r}.", field=name)
