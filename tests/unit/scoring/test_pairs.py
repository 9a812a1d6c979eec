from __future__ import annotations

import json

import numpy as np
import pytest

from perturbscope.errors import InvalidParameterError, TooFewCellsError
from perturbscope.scoring.distances import e_distance, unit_rows
from perturbscope.scoring.optimal_transport import wasserstein
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import COMPARE_COLUMNS, ScoreOptions

FAST = ScoreOptions(permutations=99)


@pytest.fixture
def screen(rng):
    sizes = {"a": 30, "b": 25, "c": 40, "control": 120, "few": 5}
    labels = np.repeat(list(sizes), list(sizes.values()))
    vectors = rng.normal(size=(len(labels), 5)) + 1
    vectors[labels == "c", 0] += 3
    return vectors.astype(np.float32), labels


def test_all_pairs_once_with_their_distances(screen):
    vectors, labels = screen
    kept = labels != "few"
    options = ScoreOptions(metrics=("e_distance", "wasserstein"), permutations=99, wasserstein_permutations=39)
    result = compare_perturbations(vectors[kept], labels[kept], control="control", options=options)
    assert tuple(result.table.columns) == COMPARE_COLUMNS
    assert list(zip(result.table["a"], result.table["b"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")] * 2
    unit = unit_rows(vectors)
    for _, row in result.table.iterrows():
        x, y = unit[labels == row["a"]], unit[labels == row["b"]]
        expected = e_distance(x, y) if row["metric"] == "e_distance" else wasserstein(x, y)
        assert row["distance"] == pytest.approx(expected, abs=1e-6)
        assert (row["n_a"], row["n_b"]) == (len(x), len(y))
        assert (row["p"] < 0.05) == (row["b"] == "c")
        assert (row["z"] > 4) == (row["b"] == "c")
    json.dumps(result.provenance)


def test_without_control_all_labels_are_compared_and_z_comes_from_the_exchange(screen):
    vectors, labels = screen
    result = compare_perturbations(vectors, labels, options=FAST)
    assert len(result.table) == 10
    few = result.table[(result.table["a"] == "few") | (result.table["b"] == "few")]
    assert few[["distance", "z", "p", "q"]].isna().all().all()
    assert few["flags"].eq("too_few_cells").all()
    moved = result.table.set_index(["a", "b"]).loc[("a", "c")]
    assert moved["null_sd"] > 0
    assert moved["z"] > 3
    assert moved["p"] == 0.01
    assert result.provenance["null"] == {"e_distance": "exchanged labels, closed form"}


def test_chosen_pairs_keep_their_order(screen):
    vectors, labels = screen
    seen = []
    pairs = [("c", "a"), ("control", "b")]
    result = compare_perturbations(vectors, labels, pairs=pairs, options=FAST, progress=lambda *args: seen.append(args))
    assert list(zip(result.table["a"], result.table["b"], strict=True)) == pairs
    assert seen == [("compare", 1, 2), ("compare", 2, 2)]
    turned = compare_perturbations(vectors, labels, pairs=[("a", "c")], options=FAST)
    assert turned.table["distance"][0] == pytest.approx(result.table["distance"][0], abs=1e-7)


def test_z_of_pairs_without_a_difference_is_standard_however_wide_they_are(rng):
    names = [f"p{i}" for i in range(24)]
    vectors = rng.normal(size=(24 * 40, 6)) * 3
    pairs = list(zip(names[::2], names[1::2], strict=True))
    labels = np.repeat(names, 40)
    alone = compare_perturbations(vectors, labels, pairs=pairs, options=ScoreOptions(normalize=False)).table
    assert abs(alone["z"].mean()) < 1
    assert 0.4 < alone["z"].std() < 1.6
    narrow = np.concatenate([vectors, rng.normal(size=(200, 6))])
    beside = compare_perturbations(
        narrow, [*labels, *["control"] * 200], pairs=pairs, control="control", options=ScoreOptions(normalize=False)
    ).table
    np.testing.assert_allclose(beside["z"], alone["z"], rtol=1e-4)
    assert set(alone["p_source"]) <= {"exchanges", "sequential"}
    assert alone["exchanges"].between(20, 1000).all()


def test_batches_that_separate_the_pair_give_no_p(screen):
    vectors, labels = screen
    result = compare_perturbations(vectors, labels, pairs=[("a", "c")], batches=labels, options=FAST)
    assert np.isnan(result.table["p"][0])
    assert np.isnan(result.table["z"][0])
    assert np.isnan(result.table["distance"][0])
    assert "batch_confounded" in result.table["flags"][0]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([("a", "nobody")], "nobody"), ([("a", "a")], "different"), (["ab"], "different"), ([], "empty")],
)
def test_bad_pairs(screen, pairs, message):
    with pytest.raises(InvalidParameterError, match=message):
        compare_perturbations(*screen, pairs=pairs, options=FAST)


def test_nothing_to_compare(screen):
    vectors, labels = screen
    with pytest.raises(InvalidParameterError, match="two labels"):
        compare_perturbations(vectors[labels == "a"], labels[labels == "a"], options=FAST)
    with pytest.raises(TooFewCellsError):
        compare_perturbations(vectors, labels, options=ScoreOptions(min_cells=500))
