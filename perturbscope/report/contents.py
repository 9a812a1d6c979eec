"""The contents of a report. A section that is missing says why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbscope.analysis.umap import Projection
from perturbscope.scoring.calibration import Calibration
from perturbscope.scoring.results import ScoreResult


@dataclass(frozen=True)
class Absent:
    """A missing section, and the reason in a sentence for the reader."""

    reason: str


NO_GENE_SETS = Absent("No gene sets were given.")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Distances of perturbations from each other.

    Attributes
    ----------
    names
        Names of rows and columns, the control among them.
    distances
        E-distances, [n, n], symmetric; below 0 (noise of the unbiased estimator) set to 0.
    tree
        Average linkage of `distances` in scipy's format, leaves in optimal order.
    alike
        Groups of perturbations that differ from control and lie closer to each other than to control.
    noise
        Approximate standard deviation of the distance between groups of controls; differences of this size mean
        nothing.
    n_hits
        Number of the perturbations shown that differ from control at q < 0.05.
    n_all
        Number of perturbations that could be compared; above the number of names if only the strongest were.
    table
        One row a pair, the closest first: ``a, b, n_a, n_b, distance, effect_similarity``, the cosine between the
        differences of their means from that of the controls; NaN for pairs with the control.
    """

    names: list[str]
    distances: NDArray[np.float64]
    tree: NDArray[np.float64]
    alike: list[list[str]]
    noise: float
    n_hits: int
    n_all: int
    table: pd.DataFrame


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """The contents of the page, of which only the title and the scores are required.

    Attributes
    ----------
    title
        Heading of the page, such as the name of the screen.
    scores
        Scores of every perturbation against control.
    calibration
        Scores of controls against controls.
    degs
        Numbers of differentially expressed genes, as :func:`perturbscope.analysis.degs.deg_table` returns them.
    projection
        Map of the cells.
    pairs
        Distances of perturbations from each other.
    enrichment
        Table of gene sets, one row a set, best first, which is shown unchanged.
    """

    title: str
    scores: ScoreResult
    calibration: Calibration | Absent = Absent(
        "Controls were not scored against controls, so this page cannot show that its p-values hold for these data."
    )
    degs: pd.DataFrame | Absent = Absent("Genes were not tested one by one.")
    projection: Projection | Absent = Absent("No map was asked for.")
    pairs: Pairs | Absent = Absent("Perturbations were not compared with each other.")
    enrichment: pd.DataFrame | Absent = NO_GENE_SETS
