"""Labels as people have them: several labels of control cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from perturbscope.analysis import umap
from perturbscope.analysis.degs import deg_null, deg_table
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.files import read_table
from perturbscope.cli.app import run
from perturbscope.errors import ControlLabelMissingError, InvalidParameterError
from perturbscope.inference.embedder import Embedder
from perturbscope.model import Model
from perturbscope.scoring.calibration import calibrate
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions
from perturbscope.tasks.backends import LocalBackend
from tests.reports import first_two
from tests.screens import make_screen

FAST = ScoreOptions(permutations=20, repeats=2, max_cells=200)
SCREEN = make_screen()
VECTORS = np.asarray(SCREEN.obsm["X_pca"], dtype=np.float32)
PLAIN = SCREEN.obs["perturbation"].astype(str).tolist()
TWO = [f"NT-{i % 2}" if label == "control" else label for i, label in enumerate(PLAIN)]
ONE = ["NT-0, NT-1" if label == "control" else label for label in PLAIN]
"""The same cells with the label that two labels of controls are given."""


@pytest.mark.parametrize("control", [["NT-0", "NT-1"], ("NT-1", "NT-0"), np.array(["NT-1", "NT-0", "NT-0"])])
def test_several_controls_are_one_group_in_every_function(control: Any) -> None:
    counts = CountMatrix.from_matrix(SCREEN.X, SCREEN.var_names)
    asked: list[Callable[[list[str], Any], Any]] = [
        lambda labels, named: score_perturbations(VECTORS, labels, control=named, options=FAST).table,
        lambda labels, named: compare_perturbations(VECTORS, labels, control=named, options=FAST).table,
        lambda labels, named: pd.DataFrame(
            calibrate(VECTORS, labels, control=named, options=FAST, splits=5).to_dict()["sets"]
        ),
        lambda labels, named: deg_table(counts, labels, control=named),
        lambda labels, named: deg_null(counts, labels, control=named, splits=2),
    ]
    for ask in asked:
        pd.testing.assert_frame_equal(ask(TWO, control), ask(ONE, "NT-0, NT-1"))
    result = score_perturbations(VECTORS, TWO, control=control, options=FAST)
    assert result.provenance["control"] == "NT-0, NT-1"
    assert result.provenance["controls"] == ["NT-0", "NT-1"]
    paired = compare_perturbations(VECTORS, TWO, pairs=[("strong", "NT-1")], control=control, options=FAST)
    assert paired.table.loc[0, ["a", "b"]].tolist() == ["strong", "NT-0, NT-1"]


def test_a_list_of_one_control_is_that_label() -> None:
    one, listed = (score_perturbations(VECTORS, PLAIN, control=c, options=FAST) for c in ("control", ["control"]))
    pd.testing.assert_frame_equal(one.table, listed.table)
    assert one.provenance == listed.provenance


def test_the_name_of_many_controls_is_short_and_no_other_label() -> None:
    labels = [f"g{i % 9}" if label == "control" else label for i, label in enumerate(PLAIN)]
    controls = [f"g{i}" for i in range(9)]
    name = "g0, g1, g2 and 6 more"
    assert score_perturbations(VECTORS, labels, control=controls, options=FAST).provenance["control"] == name
    labels = [name if label == "weak" else label for label in labels]
    result = score_perturbations(VECTORS, labels, control=controls, options=FAST)
    assert result.provenance["control"] == f"{name} (controls)"
    assert name in set(result.table["perturbation"])


@pytest.mark.parametrize("control", [[], [1, 2], 3, ["NT-0", None]])
def test_a_control_that_is_no_label_is_refused(control: Any) -> None:
    with pytest.raises(InvalidParameterError, match="a label or a list of labels"):
        score_perturbations(VECTORS, TWO, control=control, options=FAST)


def test_each_control_label_must_exist() -> None:
    with pytest.raises(ControlLabelMissingError, match=r"'NT-2'.*NT-0"):
        score_perturbations(VECTORS, TWO, control=["NT-0", "NT-2"], options=FAST)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    screen = SCREEN.copy()
    screen.obs["perturbation"] = TWO
    screen.write_h5ad(tmp_path / "two.h5ad")
    return tmp_path / "two.h5ad"


def test_several_controls_of_a_file(two: Path, fake_embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umap, "umap_coordinates", first_two)
    expected = score_perturbations(VECTORS, ONE, control="NT-0, NT-1", options=FAST).table
    model = Model(LocalBackend(fake_embedder))
    keys: dict[str, Any] = {"perturbation_key": "perturbation", "use_rep": "X_pca", "control": ["NT-0", "NT-1"]}
    keys |= {"permutations": 20, "repeats": 2, "max_cells": 200}
    pd.testing.assert_frame_equal(model.score(two, **keys), expected)
    compared = model.compare(two, **keys, pairs=[("weak", "NT-0"), ("weak", "strong")])
    assert compared["b"].tolist() == ["NT-0, NT-1", "strong"]
    common = ["--perturbation-key", "perturbation", "--control", "NT-1", "--control", "NT-0"]
    vectors = ["--use-rep", "X_pca", "--permutations", "20", "--set", "repeats=2", "--set", "max_cells=200"]
    for command, more in (("score", vectors), ("compare", vectors), ("degs", []), ("report", vectors)):
        out = two.with_name(f"{command}.{'html' if command == 'report' else 'csv'}")
        assert run([command, str(two), str(out), *common, *more]) == 0, command
    written = read_table(two.with_name("score.csv"), field="scores").fillna(
        {"flags": "", "p_source": "", "p_tail_source": ""}
    )
    pd.testing.assert_frame_equal(written, expected)
    assert "NT-0, NT-1" in two.with_name("report.html").read_text()
    assert set(pd.read_csv(two.with_name("degs.csv"))["perturbation"]) == {"strong", "weak", "rare"}
