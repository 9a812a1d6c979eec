"""Replicates find each other: hand-computed cases, chance levels, calibration, and input that allows no answer."""

import itertools

import numpy as np
import pytest

from evaluation.consistency import consistency
from evaluation.profiles import make_profiles, random_halves, whiten
from evaluation.relations import relation_recall
from evaluation.retrieval import _ranks, chance_average_precision, retrieve
from evaluation.split_half import split_half
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError, MalformedMatrixError, TooFewCellsError


def cells_at(points, *, per_profile=2):
    """Cells at the given points: {(perturbation, replicate): vector}."""
    values = np.repeat(np.array(list(points.values()), dtype=float), per_profile, axis=0)
    names = [name for name, _ in points for _ in range(per_profile)]
    replicates = [part for _, part in points for _ in range(per_profile)]
    return values, names, replicates


def noisy(rng, *, n_names=12, sizes=40, effect=0.0, width=10, replicates=2):
    labels = np.repeat([f"P{i:02d}" for i in range(n_names)], sizes)
    parts = np.array([f"r{i}" for i in range(replicates)])[rng.integers(0, replicates, len(labels))]
    shifts = rng.normal(size=(n_names, width)) * effect
    values = rng.normal(size=(len(labels), width)) + 3 + shifts[np.unique(labels, return_inverse=True)[1]]
    return values, labels.tolist(), parts.tolist()


def test_average_precision_of_a_hand_made_ranking():
    # The mean is (0, 0). B's replicates stand opposite to each other, so each is last in the other's ranking.
    points = {
        ("A", "1"): (2, 0.1),
        ("A", "2"): (2, -0.1),
        ("B", "1"): (-3, 1),
        ("B", "2"): (1, -0.2),
        ("C", "1"): (-1, -0.8),
        ("C", "2"): (-1, 0),
    }
    found = retrieve(*cells_at(points), min_cells=1, permutations=9, recall_at=(1, 2))
    table = found.table.set_index("perturbation")
    # A1 ranks A2, B2, C2; A2 ranks A1, B1 / C1. B1 ranks C2, ... last B2.
    np.testing.assert_allclose(table.loc["A", "average_precision"], 1.0)
    vectors = np.array(list(points.values()))
    vectors = vectors - vectors.mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for name, (i, j) in {"A": (0, 1), "B": (2, 3), "C": (4, 5)}.items():
        ranks = []
        for query, match in ((i, j), (j, i)):
            others = [k for k in range(6) if k % 2 != query % 2]
            ranks.append(1 + sum(vectors[query] @ vectors[k] > vectors[query] @ vectors[match] for k in others))
        np.testing.assert_allclose(table.loc[name, "average_precision"], np.mean(1 / np.array(ranks)))
        np.testing.assert_allclose(table.loc[name, "recall@1"], np.mean(np.array(ranks) <= 1))
    assert found.map == pytest.approx(table["average_precision"].mean())
    assert (found.n_profiles, found.n_queries, found.n_perturbations) == (6, 6, 3)
    assert found.recall_chance == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}


@pytest.mark.parametrize(("matches", "candidates"), [(1, 1), (1, 5), (2, 6), (3, 3), (4, 7)])
def test_the_chance_level_is_the_mean_over_all_rankings(matches, candidates):
    every = [
        np.mean((np.arange(matches) + 1) / (np.array(places) + 1))
        for places in itertools.combinations(range(candidates), matches)
    ]
    assert chance_average_precision(matches, candidates) == pytest.approx(np.mean(every))


def test_an_effect_is_found_and_its_p_is_as_small_as_it_can_be(rng):
    found = retrieve(*noisy(rng, effect=1.0, n_names=30, replicates=3, sizes=60), permutations=199)
    assert found.map > 0.95
    assert found.p == pytest.approx(1 / 200)
    assert found.recall[5] > 0.95
    assert (found.table["q"] < 0.05).all()
    assert found.warnings == []


@pytest.mark.parametrize("sizes", [40, [16] * 9 + [400] * 3], ids=["equal", "unequal"])
def test_without_an_effect_map_is_at_chance_and_p_uniform(sizes):
    found = [retrieve(*noisy(np.random.default_rng(i), sizes=sizes), permutations=99, seed=i) for i in range(40)]
    excess = np.array([item.map - item.chance for item in found])
    assert abs(excess.mean()) < 3 * excess.std() / np.sqrt(len(excess))
    assert np.mean([item.p <= 0.05 for item in found]) <= 0.15
    assert np.mean(np.concatenate([item.table["p"] for item in found]) <= 0.05) < 0.08


def test_centring_by_the_mean_of_profiles_makes_large_ones_alike():
    """This is why it is not the default."""
    sizes = [16] * 20 + [800] * 5
    excess = {"cells": [], "profiles": []}
    for i in range(15):
        data = noisy(np.random.default_rng(i), n_names=25, sizes=sizes)
        for centre, values in excess.items():
            found = retrieve(*data, centre=centre, permutations=1, min_cells=1)
            values.append(found.map - found.chance)
    assert np.mean(excess["profiles"]) > 0.02 > np.mean(excess["cells"])


def test_a_shift_of_the_batch_cannot_help_and_can_be_taken_away(rng):
    values, names, parts = noisy(rng, effect=0.0, replicates=2)
    values[np.array(parts) == "r1"] += 5
    fair = retrieve(values, names, parts, permutations=99)
    assert abs(fair.map - fair.chance) < 0.15
    values, names, parts = noisy(rng, effect=1.0, replicates=3)
    values += np.random.default_rng(1).normal(size=(3, 10))[np.unique(parts, return_inverse=True)[1]] * 10
    shifted = retrieve(values, names, parts, permutations=9)
    centred = retrieve(values, names, parts, permutations=9, centre="replicate")
    assert centred.map > 0.95 > shifted.map
    open_to_all = retrieve(values, names, parts, permutations=9, exclude_same=False)
    assert open_to_all.map < shifted.map


def test_guides_are_replicates_of_one_perturbation_each(rng):
    values, names, parts = noisy(rng, effect=1.0, replicates=3)
    guides = [f"{name}-{part}" for name, part in zip(names, parts, strict=True)]
    found = retrieve(values, names, guides, permutations=99)
    assert found.map > 0.9
    assert found.p == 0.01
    assert (found.table["n_replicates"] == 3).all()
    assert found.n_profiles == 36


def test_controls_take_no_part(rng):
    values, names, parts = noisy(rng, effect=0.5)
    alone = retrieve(values, names, parts, permutations=19)
    more = np.vstack([values, rng.normal(size=(50, 10)) * 100])
    names, parts = [*names, *["control"] * 50], [*parts, *["r0", "r1"] * 25]
    beside = retrieve(more, names, parts, control="control", permutations=19)
    assert beside.map == alone.map
    assert "control" not in set(beside.table["perturbation"])
    assert "control" in set(retrieve(more, names, parts, permutations=19).table["perturbation"])


def test_the_same_seed_gives_the_same_and_inputs_stay_as_they_are(rng):
    values, names, parts = noisy(rng)
    before = values.copy()
    first, second = (retrieve(values, names, parts, permutations=49, seed=7) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert first.table.equals(second.table)
    np.testing.assert_array_equal(values, before)


def test_sphering_finds_an_effect_that_a_noisy_direction_hides(rng):
    values, names, parts = noisy(rng, effect=0.4, n_names=20)
    values[:, 0] = values[:, 0] + rng.normal(size=len(values)) * 60
    hidden = retrieve(values, names, parts, permutations=9)
    for whitening in ("sphere", "standardize"):
        assert retrieve(values, names, parts, permutations=9, whitening=whitening).map > hidden.map + 0.2


def test_sphered_cells_have_unit_covariance_within_groups(rng):
    codes = np.repeat(np.arange(5), 200)
    values = rng.normal(size=(1000, 4)) @ (np.eye(4) + np.tri(4)) + rng.normal(size=(5, 4))[codes] * 10
    white = whiten(values, codes, how="sphere")
    residuals = white - np.array([white[codes == code].mean(axis=0) for code in range(5)])[codes]
    np.testing.assert_allclose(residuals.T @ residuals / 995, np.eye(4), atol=0.2)
    flat = np.hstack([values, np.ones((1000, 1))])
    for how in ("sphere", "standardize"):
        assert np.isfinite(whiten(flat, codes, how=how)).all()


def test_constant_embeddings_give_no_number_but_a_warning(rng):
    _, names, parts = noisy(rng)
    found = retrieve(np.ones((len(names), 4)), names, parts, permutations=9)
    assert np.isnan([found.map, found.chance, found.p]).all()
    assert found.n_queries == 0
    assert set(found.table["flags"]) == {"no_direction"}
    assert any("no direction" in text for text in found.warnings)


def test_identical_directions_are_at_chance():
    """Ties are broken at random, not in the order of the input."""
    values = np.repeat([[1.0, 0.0]], 80, axis=0)
    values[:40] = [-1.0, 0.0]
    names = np.repeat([f"P{i:02d}" for i in range(20)], 4).tolist()
    found = [retrieve(values, names, ["a", "b"] * 40, min_cells=1, permutations=9, seed=i) for i in range(20)]
    assert np.mean([item.map for item in found]) == pytest.approx(chance_average_precision(1, 10), abs=0.05)


def test_similarities_that_differ_by_rounding_alone_are_ties():
    """Of 40 candidates one is nearer by 1e-14; over seeds its rank is that of any other."""
    vectors = np.ones((41, 1))
    vectors[2:] -= 1e-14
    found = [_ranks(vectors, np.arange(41), np.random.default_rng(seed))[0][0, 1] for seed in range(60)]
    assert min(found) < 10
    assert max(found) > 30
    assert 14 < np.mean(found) < 27


def test_one_perturbation_or_one_replicate_cannot_be_retrieved(rng):
    values, names, parts = noisy(rng, n_names=1)
    alone = retrieve(values, names, parts, permutations=9)
    assert np.isnan(alone.map)
    assert any("one perturbation" in text for text in alone.warnings)
    values, names, _ = noisy(rng, n_names=4)
    single = retrieve(values, names, ["only"] * len(names), permutations=9)
    assert np.isnan(single.map)
    assert set(single.table["flags"]) == {"no_other_replicate"}
    some = retrieve(
        values, names, ["b" if name == "P00" and i % 2 else "a" for i, name in enumerate(names)], permutations=9
    )
    assert any("3 of 4" in text for text in some.warnings)


def test_small_profiles_are_left_out_and_counted(rng):
    values, names, parts = noisy(rng, n_names=4)
    profiles = make_profiles(values[:-38], names[:-38], parts[:-38], min_cells=3)
    assert set(profiles.perturbations) == {"P00", "P01", "P02"}
    assert {name for name, _ in profiles.dropped} == {"P03"}
    assert profiles.sizes.sum() == 120
    with pytest.raises(TooFewCellsError, match="1000 cells"):
        make_profiles(values, names, parts, min_cells=1000)


def test_profiles_are_means(rng):
    values, names, parts = noisy(rng, n_names=3)
    profiles = make_profiles(values.astype(np.float32), names, parts)
    for vector, name, part in zip(profiles.vectors, profiles.perturbations, profiles.replicates, strict=True):
        own = (np.array(names) == name) & (np.array(parts) == part)
        np.testing.assert_allclose(vector, values[own].mean(axis=0), rtol=1e-5)


def test_bad_input_is_named(rng):
    values, names, parts = noisy(rng)
    with pytest.raises(InvalidEmbeddingError, match="Row 3"):
        retrieve(np.where(np.arange(len(values))[:, None] == 3, np.nan, values), names, parts)
    with pytest.raises(MalformedMatrixError, match="replicates"):
        retrieve(values, names, parts[:-1])
    with pytest.raises(InvalidParameterError, match="no value in perturbations"):
        retrieve(values, [None, *names[1:]], parts)
    with pytest.raises(InvalidParameterError, match="whitening"):
        retrieve(values, names, parts, whitening="pca")
    with pytest.raises(InvalidParameterError, match="centre"):
        retrieve(values, names, parts, centre="control")
    with pytest.raises(InvalidParameterError, match="permutations"):
        retrieve(values, names, parts, permutations=0)


def test_halves_are_even_and_stratified():
    names = ["A"] * 9 + ["B"] * 40
    batches = ["x", "y"] * 24 + ["x"]
    halves = random_halves(names, batches=batches)
    for name in "AB":
        for batch in "xy":
            own = [half for half, n, b in zip(halves, names, batches, strict=True) if (n, b) == (name, batch)]
            assert abs(own.count("A") - own.count("B")) <= 1
    assert halves == random_halves(names, batches=batches)
    assert halves != random_halves(names, batches=batches, repeat=1)
    assert halves[:9] == random_halves(names[:9], batches=batches[:9])


def test_halves_agree_where_there_is_an_effect(rng):
    values, names, _ = noisy(rng, effect=1.0)
    found = split_half(values, names, repeats=5)
    assert found.correlation > 0.9
    assert found.accuracy > 0.9
    assert abs(found.mismatch) < 0.2
    assert found.chance == pytest.approx(1 / 12)
    assert found.warnings == []


@pytest.mark.parametrize("sizes", [40, [16] * 9 + [400] * 3], ids=["equal", "unequal"])
def test_halves_agree_by_chance_alone_where_there_is_none(sizes):
    found = [
        split_half(
            noisy(np.random.default_rng(i), sizes=sizes)[0],
            np.repeat([f"P{k:02d}" for k in range(12)], sizes).tolist(),
            seed=i,
        )
        for i in range(20)
    ]
    assert abs(np.mean([item.correlation for item in found])) < 0.05
    assert np.mean([item.accuracy for item in found]) == pytest.approx(1 / 12, abs=0.02)


def test_split_half_without_an_answer(rng):
    values, names, _ = noisy(rng, n_names=3)
    flat = split_half(np.ones_like(values), names)
    assert np.isnan([flat.correlation, flat.accuracy]).all()
    assert any("no direction" in text for text in flat.warnings)
    alone = split_half(values[:40], names[:40])
    assert np.isnan(alone.accuracy)
    assert any("nothing to tell it from" in text for text in alone.warnings)
    with pytest.raises(InvalidParameterError, match="repeats"):
        split_half(values, names, repeats=0)


def test_labels_that_differ_in_case_are_named(rng):
    values, names, parts = noisy(rng, n_names=4)
    names = ["p00" if name == "P00" and i % 2 else name for i, name in enumerate(names)]
    relations = relation_recall(values, names, [("P00", "P01")], permutations=9)
    signal = consistency(values, names, draws=9)
    for found in (
        retrieve(values, names, parts, permutations=9),
        split_half(values, names, repeats=1),
        relations,
        signal,
    ):
        assert any("'P00' and 'p00'" in text for text in found.warnings)
