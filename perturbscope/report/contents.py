"""What a report is made of. A part that is not there says why."""

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
    """A part that is missing, and why, in a sentence for the reader."""

    reason: str


NO_GENE_SETS = Absent("No gene sets were given.")


@dataclass(frozen=True, eq=False)
class Pairs:
    """How far perturbations lie from each other.

    Attributes
    ----------
    names
        Of rows and columns; the control among them.
    distances
        E-distances, [n, n], symmetric; below 0 (noise of the unbiased estimator) set to 0.
    tree
        Average linkage of `distances`, as scipy's, leaves in optimal order.
    alike
        Groups of perturbations that differ from control and lie closer to each other than to control.
    noise
        Standard deviation of the distance between groups of controls, about: differences of this size mean nothing.
    n_hits
        Perturbations shown that differ from control at q < 0.05.
    n_all
        Perturbations that could have been compared; more than there are names where only the strongest were.
    table
        ``a, b, n_a, n_b, distance``, one row a pair.
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
    """All that the page shows; only the scores must be there.

    Attributes
    ----------
    title
        Heading of the page, such as the name of the screen.
    scores
        Every perturbation against control.
    calibration
        Controls against controls.
    degs
        ``perturbation, n_cells, n_degs, n_tested``, as :func:`perturbscope.analysis.degs.deg_table` gives it.
    projection
        A map of the cells.
    pairs
        Perturbations against each other.
    enrichment
        Gene sets, one row a set, best first; shown as it is.
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
