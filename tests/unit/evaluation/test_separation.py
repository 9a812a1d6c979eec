"""Separation of one embedding of one screen, with and without effects."""

import numpy as np
import pandas as pd
import pytest

from evaluation.screens import EvaluationScreen
from evaluation.separation import (
    SeparationOptions,
    batch_agreement,
    contexts,
    detection,
    measure_separation,
    paper_null_size,
    summarize,
)
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import TooFewControlsError
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.energy.pool import Moments, null_moments
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions

OPTIONS = SeparationOptions(permutations=99, splits=30, transport_cells=20, transport_draws=10, seed=1)


def labelled(labels, **columns):
    cells = CountMatrix.from_matrix(np.ones((len(labels), 2), dtype=int), ["A", "B"])
    return EvaluationScreen("s", cells, list(labels), "control", **columns)


@pytest.fixture
def screen():
    labels = ["control"] * 120 + ["KO"] * 40 + ["NONE"] * 40 + ["OTHER"] * 30
    return labelled(labels, batches=[f"b{i % 2}" for i in range(len(labels))])


@pytest.fixture
def values(rng):
    noise = rng.normal(size=(230, 8)).astype(np.float32)
    noise[120:160] += 2.0
    noise[200:, :2] -= 2.5
    return noise


@pytest.fixture
def found(values, screen):
    return measure_separation(values, screen, options=OPTIONS)


def test_an_effect_is_far_from_control_in_every_metric_and_mode_and_none_is_not(found):
    z = found.scores.set_index(["mode", "metric", "perturbation"])["z"].unstack()
    assert len(z) == 6
    assert (z["KO"] > 5).all()
    assert (z["OTHER"] > 5).all()
    assert (z["NONE"].abs() < 4).all()


def test_size_matched_scores_are_those_of_the_library(found, values, screen):
    options = ScoreOptions(metrics=("e_distance",), permutations=99, max_cells=2500, seed=1)
    table = score_perturbations(
        values, screen.perturbations, control="control", batches=screen.batches, options=options
    ).table
    ours = found.scores.query("mode == 'size_matched' and metric == 'e_distance'").set_index("perturbation")
    for column in ("distance", "z", "p"):
        pd.testing.assert_series_equal(
            ours[column], table.set_index("perturbation")[column], check_names=False, check_like=True
        )


def test_paper_mode_takes_one_null_for_all_and_says_which(found):
    paper = found.scores.query("mode == 'paper' and metric == 'e_distance'")
    assert paper["null_sd"].nunique() == 1
    assert paper["p"].isna().all()
    assert any("a null of 60 cells a group, not 300" in text for text in found.warnings)
    assert [paper_null_size(n) for n in (5000, 600, 599, 40)] == [300, 300, 299, 20]


def test_pairs_are_compared_once_in_both_modes(found, values, screen):
    energy = found.pairs.query("metric == 'e_distance'")
    assert len(energy) == 6
    assert set(energy["mode"]) == {"size_matched", "paper"}
    ours = energy.query("mode == 'size_matched'").set_index(["a", "b"])
    options = ScoreOptions(metrics=("e_distance",), permutations=1, max_cells=2500, seed=1)
    table = compare_perturbations(values, screen.perturbations, control="control", options=options).table
    pd.testing.assert_series_equal(ours["z"], table.set_index(["a", "b"])["z"])
    # One null of the same size for both: z differ by a factor that hangs on the sizes alone.
    paper = energy.query("mode == 'paper'").set_index(["a", "b"])
    assert (paper["distance"] == ours["distance"]).all()
    unit = Moments(mean=0.0, var_g=0.0, var_k=1.0)
    sd = {n: null_moments(unit, n, n, pool=n, repeats=1, estimator="U")[1] for n in (40, 60)}
    assert paper["z"]["KO", "NONE"] / ours["z"]["KO", "NONE"] == pytest.approx(sd[40] / sd[60], rel=0.1)
    transport = found.pairs.query("metric == 'wasserstein'").set_index(["mode", "a", "b"])["z"]
    assert transport["size_matched", "KO", "OTHER"] > 10


def test_the_null_is_sound_and_batches_agree(found):
    null = found.null.query("metric == 'e_distance' and kind == 'cell'")
    assert len(null) == 30
    assert abs(null["z"].mean()) < 0.8
    assert set(found.batches["batch"]) == {"b0", "b1"}
    # OTHER has 15 cells a batch, below the floor.
    assert batch_agreement(found.batches)[["a", "b", "n"]].to_numpy().tolist() == [["b0", "b1", 2]]


def test_agreement_is_over_the_perturbations_that_both_batches_scored():
    table = pd.DataFrame(
        {
            "context": "",
            "batch": ["1"] * 4 + ["2"] * 4,
            "perturbation": list("abcd") * 2,
            "z": [1.0, 2.0, 4.0, np.nan, 2.0, 4.0, 8.0, 5.0],
        }
    )
    row = batch_agreement(table).iloc[0]
    assert (row["a"], row["b"], row["n"]) == ("1", "2", 3)
    assert row["pearson"] == pytest.approx(1.0)
    assert batch_agreement(pd.DataFrame()).empty


def test_detection_is_beside_what_pretended_perturbations_would_pass(found):
    share = detection(found)
    assert share["n"] == 3
    assert share["detected"] == pytest.approx(2 / 3)
    assert 0.01 <= share["threshold"] < 0.05
    null = found.null.query("metric == 'e_distance' and kind == 'cell'")["p"]
    assert share["pretended"] == pytest.approx((null <= share["threshold"]).mean())


def test_every_context_has_its_own_controls(rng):
    labels = (["control"] * 60 + ["KO"] * 30) * 2 + ["KO"] * 30
    names = ["B"] * 90 + ["T"] * 90 + ["alone"] * 30
    values = rng.normal(size=(210, 6)).astype(np.float32)
    values[90:180] += 5.0  # the cell types differ far more than the treatment changes them
    values[60:90] += 1.5
    screen = labelled(labels, contexts=names)
    assert [name for name, _ in contexts(screen)] == ["B", "T"]
    found = measure_separation(values, screen, options=OPTIONS)
    z = found.scores.query("mode == 'size_matched' and metric == 'e_distance'").set_index("context")["z"]
    assert z["B"] > 10
    assert abs(z["T"]) < 4
    assert found.pairs.empty


def test_a_context_that_cannot_be_scored_is_named_and_a_screen_that_cannot_is_an_error(rng):
    labels = ["control"] * 60 + ["KO"] * 30 + ["control"] * 5 + ["KO"] * 30
    values = rng.normal(size=(125, 6)).astype(np.float32)
    found = measure_separation(values, labelled(labels, contexts=["B"] * 90 + ["T"] * 35), options=OPTIONS)
    assert set(found.scores["context"]) == {"B"}
    assert any(text.startswith("T was left out: 5 cells") for text in found.warnings)
    with pytest.raises(TooFewControlsError):
        measure_separation(values[90:], labelled(labels[90:]), options=OPTIONS)


def test_the_summary_is_of_z_by_mode_and_metric():
    table = pd.DataFrame({"mode": "paper", "metric": "e_distance", "z": [0.0, 1.0, 2.0, 9.0, np.nan]})
    row = summarize(table).iloc[0]
    assert (row["n"], row["median"], row["q25"], row["q75"], row["iqr"]) == (4, 1.5, 0.75, 3.75, 3.0)
    centred = np.array([0, 1, 2, 9]) - 3.0
    assert row["skewness"] == pytest.approx((centred**3).mean() / (centred**2).mean() ** 1.5)
