"""Labels as people have them, in requests to a server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from perturbscope.protocol import CompareRequest, ScoreRequest
from perturbscope.scoring.control import score_perturbations
from serving.engine import reports
from serving.engine.engine import Engine
from serving.engine.reports import ReportRequest
from tests.reports import first_two
from tests.unit.scoring.test_cleaning import FAST, ONE, PLAIN, TWO, VECTORS


def _first_two(values: Any, /, *, n_neighbors: int, min_dist: float, seed: int, check: Any) -> Any:
    return first_two(values, n_neighbors=n_neighbors, min_dist=min_dist, seed=seed)


async def test_several_controls_on_the_server(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "umap_in_process", _first_two)
    rows: dict[str, Any] = {"embeddings": VECTORS, "perturbations": tuple(TWO), "options": FAST}
    scored = await engine.scores.score(ScoreRequest(**rows, control=("NT-1", "NT-0")))
    expected = score_perturbations(VECTORS, ONE, control="NT-0, NT-1", options=FAST).table
    pd.testing.assert_frame_equal(scored.result.table, expected)
    assert scored.result.provenance["controls"] == ["NT-0", "NT-1"]
    compared = await engine.scores.compare(CompareRequest(**rows, pairs=(("weak", "NT-1"),), control=("NT-1", "NT-0")))
    assert compared.result.table["b"].tolist() == ["NT-0, NT-1"]
    report = await engine.scores.report(ReportRequest(score=ScoreRequest(**rows, control=("NT-1", "NT-0"))))
    pd.testing.assert_frame_equal(report.report.scores.table, expected)
    assert report.report.pairs.names[0] == "NT-0, NT-1"  # type: ignore[union-attr]
    assert "NT-0, NT-1" in set(report.report.projection.labels)  # type: ignore[union-attr]


async def test_labels_are_cleaned_on_the_server(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "umap_in_process", _first_two)
    labels = tuple({"weak": "NA", "rare": "strong+control"}.get(label, label) for label in PLAIN)
    options = replace(FAST, missing_labels=("NA",), normalize_combinations=True)
    rows: dict[str, Any] = {"embeddings": VECTORS, "perturbations": labels, "options": options, "control": "control"}
    scored = (await engine.scores.score(ScoreRequest(**rows))).result
    expected = score_perturbations(VECTORS, labels, control="control", options=options)
    pd.testing.assert_frame_equal(scored.table, expected.table)
    assert (scored.warnings, scored.provenance["n_cells_missing_label"]) == (expected.warnings, 30)
    assert (await engine.scores.report(ReportRequest(score=ScoreRequest(**rows)))).report.scores.warnings
