"""Which perturbations are most alike, by cells and by effects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbscope.cells.files import read_table
from perturbscope.cli.app import run
from perturbscope.report.contents import Absent
from perturbscope.report.pairs import make_pairs
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pair_map import distance_map
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions
from tests.screens import make_screen

FAST = ScoreOptions(permutations=20, repeats=2, normalize=False)
SHIFTS = {
    "control": (0.0, 0.0),
    "zz_far": (9.0, 0.0),
    "aa_same_way": (3.0, 0.1),
    "mm_other_way": (0.0, 3.0),
    "bb_like_mm": (0.1, 3.1),
}
"""Mean of each label in two of six dimensions: zz and aa go one way, and aa lies nearer to the others."""
LABELS = np.repeat(list(SHIFTS), 40).tolist()
ROWS = np.random.default_rng(0).normal(size=(200, 6)) * 0.3 + np.array([[*SHIFTS[name], 0, 0, 0, 0] for name in LABELS])


def test_all_pairs_keep_their_order_and_have_the_cosine_of_their_effects() -> None:
    table = compare_perturbations(ROWS, LABELS, control="control", options=FAST).table
    assert table["a"].tolist() == sorted(table["a"])
    means = {name: ROWS[np.array(LABELS) == name].mean(axis=0) for name in SHIFTS}
    for a, b, cosine in table[["a", "b", "effect_similarity"]].itertuples(index=False):
        x, y = means[a] - means["control"], means[b] - means["control"]
        assert cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    without = compare_perturbations(ROWS, LABELS, options=FAST).table
    assert without["effect_similarity"].isna().all()


def test_the_nearest_by_cells_and_by_effects_are_returned_closest_first() -> None:
    every = compare_perturbations(ROWS, LABELS, control="control", options=FAST).table
    one = ScoreOptions(**{**vars(FAST), "nearest": 1})
    result = compare_perturbations(ROWS, LABELS, control="control", options=one)
    pairs = list(zip(result.table["a"], result.table["b"], strict=True))
    # zz_far is nearest to aa_same_way both ways; aa_same_way lies nearer to the other two than to zz_far.
    assert pairs[0] == ("bb_like_mm", "mm_other_way")
    assert ("aa_same_way", "zz_far") in pairs
    assert any("aa_same_way" in pair and ("bb_like_mm" in pair or "mm_other_way" in pair) for pair in pairs)
    assert len(pairs) == 3
    assert result.table["distance"].is_monotonic_increasing
    same = every.set_index(["a", "b"]).loc[pairs].reset_index()
    pd.testing.assert_frame_equal(result.table, same)
    assert result.provenance["options"]["nearest"] == 1


def test_the_map_and_the_report_rank_by_closeness() -> None:
    near = distance_map(ROWS, LABELS, options=FAST).nearest(2)
    assert near.groupby("perturbation").size().eq(2).all()
    assert near.set_index(["perturbation", "rank"]).loc[("bb_like_mm", 1), "nearest"] == "mm_other_way"
    scores = score_perturbations(ROWS, LABELS, control="control", options=FAST)
    pairs = make_pairs(ROWS, LABELS, scores, options=FAST)
    assert not isinstance(pairs, Absent)
    assert pairs.table["distance"].is_monotonic_increasing
    assert pairs.table.loc[0, "effect_similarity"] > 0.99
    assert pairs.table.loc[pairs.table["a"] == "control", "effect_similarity"].isna().all()


def test_the_commands_show_the_closest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen = make_screen()
    labels = np.array([f"p{9 - i % 4}" if i > 60 else "control" for i in range(screen.n_obs)])
    screen.obs["perturbation"] = labels
    screen.obsm["X"] = np.random.default_rng(0).normal(size=(screen.n_obs, 4)) + (labels == "p6")[:, None] * 5.0
    screen.write_h5ad(tmp_path / "in.h5ad")
    common = ["--perturbation-key", "perturbation", "--use-rep", "X", "--min-cells", "4"]
    fast = ["--permutations", "20", "--control", "control"]
    out = tmp_path / "out.csv"
    assert run(["compare", str(tmp_path / "in.h5ad"), str(out), *common, *fast, "--nearest", "1", "--top", "1"]) == 0
    table = read_table(out, field="pairs")
    assert table["distance"].is_monotonic_increasing
    assert "Closest pairs" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.csv.provenance.json").read_text())["options"]["nearest"] == 1
    assert run(["map", str(tmp_path / "in.h5ad"), str(tmp_path / "m.csv"), *common, "--nearest", "2"]) == 0
    assert len(read_table(tmp_path / "m.csv.nearest.csv", field="nearest")) == 10
