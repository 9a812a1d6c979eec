"""Consistency and magnitude: formulas, calibration, batches, and input that allows no answer."""

import numpy as np
import pytest

from evaluation.consistency import consistency, magnitude
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError, TooFewCellsError
from perturbscope.scoring.distances import e_distance

BOTH = pytest.mark.parametrize("measure", [consistency, magnitude])


def screen(rng, *, effect=0.0, n_names=8, size=30, width=6):
    labels = np.repeat([f"P{i}" for i in range(n_names)], size)
    values = rng.normal(size=(len(labels), width)) + 2
    values[labels == "P0", 0] += effect
    return values, labels


def test_consistency_is_the_mean_cosine_over_pairs_of_cells(rng):
    values, labels = screen(rng, effect=1.0)
    table = consistency(values, labels, draws=9).table.set_index("perturbation")
    centred = values - values.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    for name in ("P0", "P5"):
        similarity = unit[labels == name] @ unit[labels == name].T
        expected = similarity[~np.eye(len(similarity), dtype=bool)].mean()
        assert table.loc[name, "value"] == pytest.approx(expected, abs=1e-5)


def test_magnitude_is_the_energy_distance_to_all_other_perturbed_cells(rng):
    values, labels = screen(rng, effect=1.0)
    plain = magnitude(values, labels, draws=9, normalize=False).table.set_index("perturbation")
    unit = magnitude(values, labels, draws=9).table.set_index("perturbation")
    assert plain.loc["P0", "value"] == pytest.approx(
        e_distance(values[labels == "P0"], values[labels != "P0"]), rel=1e-4
    )
    rows = values / np.linalg.norm(values, axis=1, keepdims=True)
    assert unit.loc["P0", "value"] == pytest.approx(e_distance(rows[labels == "P0"], rows[labels != "P0"]), rel=1e-4)


@BOTH
def test_an_effect_is_found_and_hardly_anything_else(rng, measure):
    found = measure(*screen(rng, effect=2.0, n_names=30, size=20), draws=999)
    table = found.table.set_index("perturbation")
    assert table.index[0] == "P0"
    assert table.loc["P0", "p"] == pytest.approx(1 / 1000)
    assert table.loc["P0", "z"] > 8
    assert 1 / 30 <= found.detected <= 3 / 30
    assert found.n_perturbations == 30
    assert found.warnings == []


@BOTH
def test_p_is_uniform_where_labels_mean_nothing(measure):
    p, z = [], []
    for seed in range(12):
        values, labels = screen(np.random.default_rng(seed))
        table = measure(values, labels, draws=99, seed=seed).table
        p += table["p"].tolist()
        z += table["z"].tolist()
    assert np.mean(np.array(p) <= 0.05) < 0.13
    assert np.mean(p) == pytest.approx(0.5, abs=0.09)
    assert np.mean(z) == pytest.approx(0, abs=0.3)


@BOTH
def test_controls_take_no_part(rng, measure):
    values, labels = screen(rng, effect=1.0)
    alone = measure(values, labels, draws=19).table
    more = np.vstack([values, rng.normal(size=(40, 6)) * 50 + 100])
    beside = measure(more, [*labels, *["control"] * 40], control="control", draws=19).table
    np.testing.assert_allclose(alone["value"], beside["value"])
    assert alone["p"].tolist() == beside["p"].tolist()


@BOTH
def test_a_shift_of_batches_is_not_taken_for_an_effect(rng, measure):
    values, labels = screen(rng)
    batches = np.where(rng.random(len(labels)) < 0.2, "x", "y")
    mostly = labels == "P1"
    batches[mostly] = np.where(rng.random(mostly.sum()) < 0.9, "x", "y")
    values[batches == "x", 0] += 4
    naive = measure(values, labels, draws=199).table.set_index("perturbation")
    fair = measure(values, labels, batches=batches, draws=199).table.set_index("perturbation")
    assert naive.loc["P1", "p"] == 1 / 200
    assert naive.loc["P1", "z"] > 10
    assert abs(fair.loc["P1", "z"]) < 3.5


@BOTH
def test_a_perturbation_in_batches_of_its_own_has_no_p(rng, measure):
    values, labels = screen(rng)
    batches = np.where(labels == "P1", "own", "shared").astype(object)
    batches[np.flatnonzero(labels == "P2")[:10]] = "other"
    found = measure(values, labels, batches=batches, draws=19)
    table = found.table.set_index("perturbation")
    assert np.isnan(table.loc["P1", "p"])
    assert table.loc["P1", "flags"] == "batch_confounded"
    assert table.loc["P2", "flags"] == "batch_partly_confounded"
    assert table.loc["P2", "p"] > 0
    assert len(found.warnings) == 2


@BOTH
def test_constant_embeddings_give_no_number(measure):
    labels = np.repeat(["A", "B"], 20)
    found = measure(np.ones((40, 3)), labels, draws=9)
    assert found.table[["value", "z", "p", "q"]].isna().all().all()
    assert set(found.table["flags"]) == {"constant_embeddings"}
    assert np.isnan(found.detected)
    assert any("one and the same vector" in text for text in found.warnings)


@BOTH
def test_one_perturbation_has_nothing_beside_it(rng, measure):
    found = measure(rng.normal(size=(20, 3)), ["A"] * 20, draws=9)
    assert found.table.loc[0, "flags"] == "no_other_cells"
    assert np.isnan(found.table.loc[0, "p"])
    assert found.n_perturbations == 0


@BOTH
def test_small_groups_are_listed_and_large_ones_sampled(rng, measure):
    values, labels = screen(rng)
    labels = labels.astype(object)
    labels[:5] = "few"
    found = measure(values, labels, min_cells=10, max_cells=27, draws=9)
    table = found.table.set_index("perturbation")
    assert table.loc["few", "flags"] == "too_few_cells"
    assert table.loc["P0", "flags"] == ""
    assert table.loc["P3", "flags"] == "cells_subsampled"
    assert table.loc["P3", "n_cells"] == 30
    with pytest.raises(TooFewCellsError, match="largest has 30"):
        measure(values, labels, min_cells=31)


@BOTH
def test_the_same_seed_gives_the_same_and_progress_counts(rng, measure):
    values, labels = screen(rng)
    seen = []
    first = measure(values, labels, draws=19, seed=3, progress=lambda *step: seen.append(step)).table
    assert first.equals(measure(values, labels, draws=19, seed=3).table)
    assert seen[-1] == (measure.__name__, 8, 8)
    # What a perturbation draws does not depend on the names of the others.
    renamed = measure(values, np.where(labels == "P7", "Q", labels), draws=19, seed=3).table
    merged = first.merge(renamed, on="perturbation")
    assert len(merged) == 7
    np.testing.assert_array_equal(merged["p_x"], merged["p_y"])


@BOTH
def test_bad_input_is_named(rng, measure):
    values, labels = screen(rng)
    with pytest.raises(InvalidEmbeddingError, match="not finite"):
        measure(values * np.inf, labels)
    with pytest.raises(InvalidParameterError, match="max_cells"):
        measure(values, labels, max_cells=5)
    with pytest.raises(TooFewCellsError, match="Every cell is a control"):
        measure(values, ["c"] * len(values), control="c")


@BOTH
def test_strong_effects_make_the_others_differ_from_the_rest_unless_left_out(rng, measure):
    values, labels = screen(rng, n_names=6, size=60)
    values[np.isin(labels, ["P0", "P1"]), 0] += 6
    blind = measure(values, labels, draws=199)
    assert blind.detected == 1
    assert any("Nearly every perturbation" in text for text in blind.warnings)
    aware = measure(values, labels, strong=["P0", "P1"], draws=199).table.set_index("perturbation")
    assert (aware.loc[["P0", "P1"], "p"] == 1 / 200).all()
    assert (aware.drop(index=["P0", "P1"])["z"] < 4).all()
    with pytest.raises(InvalidParameterError, match="'Q'"):
        measure(values, labels, strong=["Q"])
