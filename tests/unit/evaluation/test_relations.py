"""Recall of known relations: hand-made similarities, calibration, and cases without an answer."""

import numpy as np
import pytest

from evaluation.relations import relation_recall
from perturbscope.errors import InvalidParameterError, TooFewCellsError


def screen(rng, *, n_names=24, size=15, width=12, modules=(), effect=3.0):
    """Cells of G00, G01 ...; the genes of a module share a direction."""
    labels = np.repeat([f"G{i:02d}" for i in range(n_names)], size)
    shifts = rng.normal(size=(n_names, width)) * 0.5
    for module in modules:
        shifts[list(module)] += rng.normal(size=width) * effect
    values = rng.normal(size=(len(labels), width)) + 5 + np.repeat(shifts, size, axis=0)
    return values, labels.tolist()


MODULES = ((0, 1, 2), (5, 6), (10, 11, 12))
SETS = {f"M{k}": {f"G{i:02d}" for i in module} for k, module in enumerate(MODULES)}


def test_related_genes_are_recalled_and_nearest(rng):
    found = relation_recall(*screen(rng, modules=MODULES), SETS)
    assert found.status == "ok"
    assert found.n_known == 7
    assert found.n_pairs == 24 * 23 // 2
    assert found.recall_top > 0.8
    assert found.recall == found.recall_top + found.recall_bottom
    assert found.chance == pytest.approx(26 / 276)
    assert found.ceiling == 1.0
    assert found.p == 0.001
    assert found.z > 5
    assert found.nearest > 0.8
    assert found.nearest_p == 0.001
    # Expected under exchange: 8 genes with 2, 1 or 2 partners among 23 others.
    assert found.nearest_chance == pytest.approx((3 * 2 + 2 * 1 + 3 * 2) / 8 / 23, abs=0.02)
    assert (found.pairs["percentile"] > 90).mean() > 0.8
    best = found.table.set_index("perturbation")
    assert best.loc["G05", ["n_known", "nearest", "nearest_known", "recalled"]].tolist() == [1, "G06", True, 1]
    assert found.warnings == []


def test_opposite_genes_are_recalled_at_the_bottom(rng):
    values, labels = screen(rng)
    names = np.array(labels)
    values[names == "G00", 0] += 6
    values[names == "G01", 0] -= 6
    found = relation_recall(values, labels, [("G01", "G00")], permutations=99)
    assert (found.recall_top, found.recall_bottom) == (0.0, 1.0)
    assert found.p < 0.2
    assert found.nearest == 0.0


def test_similarities_are_those_of_centred_means(rng):
    values, labels = screen(rng, n_names=8)
    found = relation_recall(values, labels, [("G00", "G03"), ("G05", "G02")], permutations=9)
    means = np.array([values[np.array(labels) == f"G{i:02d}"].mean(axis=0) for i in range(8)]) - values.mean(axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    every = (means @ means.T)[np.triu_indices(8, k=1)]
    for row in found.pairs.itertuples():
        expected = means[int(row.a[1:])] @ means[int(row.b[1:])]
        assert row.similarity == pytest.approx(expected, abs=1e-5)
        assert row.percentile == pytest.approx(100 * ((every < expected - 1e-9).sum() + 0.5) / 28, abs=0.01)


def test_without_an_effect_recall_is_at_chance_and_p_uniform():
    found = [relation_recall(*screen(np.random.default_rng(i)), SETS, permutations=99, seed=i) for i in range(60)]
    assert np.mean([item.recall for item in found]) == pytest.approx(found[0].chance, abs=0.05)
    assert np.mean([item.p <= 0.05 for item in found]) < 0.15
    assert np.mean([item.nearest_p <= 0.05 for item in found]) < 0.15


def test_pairs_and_sets_say_the_same(rng):
    data = screen(rng, modules=MODULES)
    pairs = [
        ("G01", "G00"),
        ("G00", "G02"),
        ("G02", "G01"),
        ("G05", "G06"),
        ("G10", "G11"),
        ("G11", "G12"),
        ("G10", "G12"),
    ]
    by_pairs = relation_recall(*data, [*pairs, ("G00", "G01"), ("G00", "G00"), ("G00", "absent")], permutations=49)
    by_sets = relation_recall(*data, {**SETS, "again": {"G05", "G06", "absent"}}, permutations=49)
    assert by_pairs.to_dict() == by_sets.to_dict()
    joined = by_sets.pairs.set_index(["a", "b"])["relations"]
    assert joined["G05", "G06"] == "M1;again"
    assert (by_pairs.pairs["relations"] == "").all()


def test_large_sets_are_left_out(rng):
    data = screen(rng)
    sets = {"small": {"G00", "G01"}, "large": {f"G{i:02d}" for i in range(20)}}
    assert relation_recall(*data, sets, max_set_size=10, permutations=9).n_known == 1
    many = relation_recall(*data, sets, permutations=9)
    assert many.n_known == 190
    assert many.ceiling == pytest.approx(26 / 190)


def test_controls_take_no_part(rng):
    values, labels = screen(rng, modules=MODULES)
    alone = relation_recall(values, labels, SETS, permutations=19)
    more = np.vstack([values, rng.normal(size=(50, 12)) * 30])
    beside = relation_recall(more, [*labels, *["control"] * 50], SETS, control="control", permutations=19)
    assert beside.to_dict() == alone.to_dict()


@pytest.mark.parametrize(
    ("relations", "status", "text"),
    [
        ({"far": {"X", "Y"}}, "no_known_pair", "0 of their names are among the 2 genes"),
        ({"case": {"g00", "g01"}}, "no_known_pair", "2 if case is ignored"),
        ([("G00", "X")], "no_known_pair", "No known relation"),
        ({}, "no_known_pair", "No known relation"),
        ({"all": {f"G{i:02d}" for i in range(24)}}, "every_pair_known", "All 276 pairs"),
    ],
    ids=["other names", "case", "pairs", "empty", "all"],
)
def test_relations_that_allow_no_answer_are_named(rng, relations, status, text):
    found = relation_recall(*screen(rng), relations, permutations=9)
    assert found.status == status
    assert any(text in warning for warning in found.warnings)
    assert np.isnan([found.recall, found.chance, found.p, found.nearest]).all()
    assert len(found.table) == 24


def test_screens_that_allow_no_answer_are_named(rng):
    values, labels = screen(rng, n_names=5)
    few = relation_recall(values, labels, [("G00", "G01")], permutations=9)
    assert few.status == "too_few_pairs"
    flat = relation_recall(np.ones_like(values), labels, [("G00", "G01")], permutations=9)
    assert flat.status == "no_direction"
    assert any("mean vector of all cells" in text for text in flat.warnings)
    assert flat.table.empty
    alone = relation_recall(values[:15], labels[:15], [("G00", "G01")], permutations=9)
    assert alone.status == "no_direction"
    with pytest.raises(TooFewCellsError):
        relation_recall(values, labels, [("G00", "G01")], min_cells=16)
    with pytest.raises(InvalidParameterError, match="share"):
        relation_recall(values, labels, [("G00", "G01")], share=0.6)
