"""The result page: a request to score cells, answered with the report that the command line writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from perturbscope import protocol
from perturbscope.analysis.umap import umap_in_process
from perturbscope.cells.counts import CountMatrix
from perturbscope.protocol import Meta, ScoreRequest
from perturbscope.report import Absent, Report, build_report, render_report
from perturbscope.scoring.results import ScoreResult

HTML = "text/html"
TITLE = "Perturbation screen"
Progress = Callable[[str, int, int], None]
_NO_COUNTS = Absent("Embeddings were sent without counts, so no gene was tested by itself.")
_NO_SETS = "The service takes no gene sets; the command line does: perturbscope report --gene-sets FILE.gmt."


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportRequest:
    """A request to score cells, and to show the result as a page.

    Attributes
    ----------
    score
        The score request.
    title
        Heading of the page.
    counts
        Raw counts of the same cells, or the reason why there are none; used if `score` has no cells.
    """

    score: ScoreRequest
    title: str = TITLE
    counts: CountMatrix | Absent = _NO_COUNTS


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportAnswer:
    """The answer to a :class:`ReportRequest`."""

    report: Report
    meta: Meta = field(default_factory=Meta)


def make_report(
    request: ReportRequest,
    embeddings: NDArray[np.float32],
    meta: Meta,
    complete: Callable[[ScoreResult], ScoreResult],
    progress: Progress,
) -> Report:
    """Score and draw; blocks, for a worker thread. `progress` may raise to end it early.

    `complete` adds warnings and facts to the scores, whose labels of control cells are one.

    Raises
    ------
    InvalidInputError, SolverError
        As :func:`perturbscope.score_perturbations`.
    """
    from perturbscope.scoring.control import score_perturbations

    asked = request.score
    scores = score_perturbations(
        embeddings,
        asked.perturbations,
        control=str(asked.control),
        batches=asked.batches,
        options=asked.options,
        progress=progress,
    )
    facts = {"model_id": meta.model_id, "coverage": meta.coverage.to_dict() if meta.coverage else None}
    scores = complete(scores)
    scores = replace(scores, provenance={**scores.provenance, **{key: value for key, value in facts.items() if value}})
    return build_report(
        embeddings,
        asked.perturbations,
        scores,
        title=request.title,
        options=asked.options,
        batches=asked.batches,
        cells=request.counts if asked.cells is None else asked.cells,
        enrichment=Absent(_NO_SETS),
        projector=partial(umap_in_process, check=lambda: progress("map", 0, 1)),
        progress=progress,
    )


def report_request_from_json(body: bytes) -> ReportRequest:
    """Decode the body of /v1/score in JSON."""
    return ReportRequest(score=protocol.request_from_json(protocol.ScoreRequest, body))


def report_request_from_arrow(body: bytes) -> ReportRequest:
    """Decode the body of /v1/score in Arrow."""
    return ReportRequest(score=protocol.request_from_arrow(protocol.ScoreRequest, body))


def report_answer_to_html(answer: ReportAnswer) -> bytes:
    """Encode the page."""
    return render_report(answer.report).encode()
