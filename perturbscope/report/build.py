"""Building a whole report from scores and the scored cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbscope.analysis.degs import deg_table
from perturbscope.analysis.umap import Projection, Projector, project
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidInputError, ProviderUnavailableError
from perturbscope.report.contents import NO_GENE_SETS, Absent, Report
from perturbscope.report.pairs import make_pairs
from perturbscope.scoring.calibration import Calibration, calibrate
from perturbscope.scoring.results import ScoreOptions, ScoreResult

Progress = Callable[[str, int, int], None]
NO_COUNTS = Absent("The counts were not given, so no gene was tested.")


def build_report(
    embeddings: NDArray[np.float32],
    labels: Sequence[str],
    scores: ScoreResult,
    *,
    title: str,
    options: ScoreOptions,
    batches: Sequence[str] | None = None,
    cells: CountMatrix | Absent = NO_COUNTS,
    enrichment: pd.DataFrame | Absent = NO_GENE_SETS,
    projector: Projector | None = None,
    progress: Progress | None = None,
) -> Report:
    """Build a report with every section that these cells allow.

    Parameters
    ----------
    embeddings, labels, batches, options
        Cells and options as they were scored.
    scores
        Scores of these cells.
    title
        Heading of the page.
    cells
        Raw counts of the same cells, for differentially expressed genes.
    enrichment
        Table of gene sets.
    projector
        Function that computes the map; default :func:`perturbscope.analysis.umap.umap_coordinates`.
    progress
        Called as ``progress(stage, done, total)``, with the stages ``degs``, ``compare``, ``map`` and ``calibrate``.

    Raises
    ------
    InvalidInputError
        The embeddings or labels cannot be scored. A section that is missing for another reason says so on the page.
    """
    control = str(scores.provenance["control"])
    return Report(
        title=title,
        scores=scores,
        degs=_degs(cells, labels, control, options.seed, progress),
        pairs=make_pairs(embeddings, labels, scores, options=options, progress=progress),
        projection=_projection(embeddings, labels, options, projector, progress),
        calibration=_calibration(embeddings, labels, batches, control, options, progress),
        enrichment=enrichment,
    )


def _degs(
    cells: CountMatrix | Absent, labels: Sequence[str], control: str, seed: int, progress: Progress | None
) -> pd.DataFrame | Absent:
    if isinstance(cells, Absent):
        return cells
    try:
        return deg_table(cells, labels, control=control, seed=seed, progress=progress)
    except InvalidInputError as error:
        return Absent(f"Genes could not be tested one by one: {error.message}")


def _projection(
    embeddings: NDArray[np.float32],
    labels: Sequence[str],
    options: ScoreOptions,
    projector: Projector | None,
    progress: Progress | None,
) -> Projection | Absent:
    if progress:
        progress("map", 0, 1)
    try:
        projection = project(embeddings, labels, normalize=options.normalize, seed=options.seed, projector=projector)
    except (InvalidInputError, ProviderUnavailableError) as error:
        return Absent(error.message)
    if progress:
        progress("map", 1, 1)
    return projection


def _calibration(
    embeddings: NDArray[np.float32],
    labels: Sequence[str],
    batches: Sequence[str] | None,
    control: str,
    options: ScoreOptions,
    progress: Progress | None,
) -> Calibration | Absent:
    if set(options.metrics) == {"wasserstein"}:
        return Absent("The Wasserstein distance alone was asked for; scoring it hundreds of times would take too long.")
    try:
        return calibrate(embeddings, labels, control=control, batches=batches, options=options, progress=progress)
    except InvalidInputError as error:
        return Absent(f"Controls could not be scored against controls: {error.message}")
