"""Exchanges of whole units: wells whose cells resemble each other."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from perturbscope.errors import InvalidParameterError, MalformedMatrixError, TooFewControlsError
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.distances import e_distance
from perturbscope.scoring.results import ScoreOptions

RAW = ScoreOptions(normalize=False, min_cells=5)


def wells(rng, sizes, icc, width=8, shift=0.0):
    """Cells of wells; `sizes` has the label and the cells of each. The wells of "hit" are shifted."""
    vectors, labels, units = [], [], []
    for number, (label, n) in enumerate(sizes):
        centre = np.sqrt(icc) * rng.normal(size=width)
        if label.startswith("hit"):
            centre[0] += shift
        vectors.append(centre + np.sqrt(1 - icc) * rng.normal(size=(n, width)))
        labels += [label] * n
        units += [f"w{number}"] * n
    return np.concatenate(vectors), labels, units


def test_effects_of_wells_are_no_effects_of_perturbations(rng):
    plan = [(f"p{i}", 40) for i in range(60)] + [("hit", 40)] + [("c", 40)] * 30
    vectors, labels, units = wells(rng, plan, icc=0.06, shift=3.0)
    result = score_perturbations(vectors, labels, control="c", units=units, options=RAW)
    table = result.table.set_index("perturbation")
    nulls = table.drop("hit")
    assert (nulls["p"] < 0.05).mean() > 0.6
    assert (nulls["p_unit"] <= 0.05).mean() < 0.2
    assert abs(nulls["z_unit"].mean()) < 0.6
    assert 0.6 < nulls["z_unit"].std() < 1.6
    assert table.loc["hit", "p_unit"] == pytest.approx(1 / 31)
    assert table.loc["hit", "z_unit"] > 5
    facts = result.provenance["units"]
    assert facts["n_control_units"] == 30
    assert facts["intraclass_correlation"] == pytest.approx(0.06, abs=0.03)
    assert facts["design_effect"] == pytest.approx(1 + 39 * facts["intraclass_correlation"])
    assert any("design effect" in text for text in result.warnings)
    # Nothing else has changed.
    without = score_perturbations(vectors, labels, control="c", options=RAW).table
    assert "p_unit" not in without
    np.testing.assert_array_equal(without["z"], result.table["z"])


def test_all_choices_of_two_units_are_made(rng):
    plan = [("a", 6), ("a", 6)] + [("c", 6)] * 5
    vectors, labels, units = wells(rng, plan, icc=0.3)
    found = score_perturbations(vectors, labels, control="c", units=units, options=RAW).table.iloc[0]
    blocks = np.arange(42).reshape(7, 6)
    null = {
        pair: e_distance(vectors[blocks[list(pair)].ravel()], vectors[np.delete(blocks, pair, axis=0).ravel()])
        for pair in combinations(range(7), 2)
    }
    observed = null.pop((0, 1))
    values = np.array(list(null.values()))
    assert found["n_units"] == 2
    assert found["p_unit"] == pytest.approx((1 + (values >= observed).sum()) / 21)
    assert found["z_unit"] == pytest.approx((observed - values.mean()) / values.std(ddof=1), rel=1e-3)


def test_large_units_are_cut_to_the_perturbations_size(rng, monkeypatch):
    from perturbscope.scoring import units as module

    plan = [("a", 5), *[("c", 30)] * 8]
    vectors, labels, units = wells(rng, plan, icc=0.0)
    seen = []
    original = module._distances

    def spy(pool, members, chosen, sizes, rng):
        values = original(pool, members, chosen, sizes, np.random.default_rng(3))
        again = np.random.default_rng(3)
        points = np.concatenate([pool.a.rows, pool.b.rows])
        for column, value in zip(chosen, values, strict=True):
            (unit,) = np.flatnonzero(column)
            kept = again.choice(members[unit], 5, replace=False)
            others = np.setdiff1d(np.arange(len(points)), members[unit])
            d, n, m = cdist(points, points), 5, len(others)
            expected = 2 * d[np.ix_(kept, others)].mean() - d[np.ix_(kept, kept)].sum() / (n * (n - 1))
            seen.append((value, expected - d[np.ix_(others, others)].sum() / (m * (m - 1))))
        return values

    monkeypatch.setattr(module, "_distances", spy)
    score_perturbations(vectors, labels, control="c", units=units, options=RAW)
    assert len(seen) == 8
    np.testing.assert_allclose(*np.array(seen).T, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda units, labels: ["one"] * len(units), TooFewControlsError, "one unit"),
        (lambda units, labels: units[1:], MalformedMatrixError, "units"),
        (lambda units, labels: [*units[1:], " "], InvalidParameterError, "units"),
        (lambda units, labels: [f"b{i % 2}" for i in range(len(units))], InvalidParameterError, "batches"),
    ],
    ids=["one-control-unit", "too-few", "empty", "the-batches"],
)
def test_units_that_cannot_be_exchanged_are_refused(rng, change, error, says):
    vectors, labels, units = wells(rng, [("a", 20)] + [("c", 20)] * 4, icc=0.0)
    batches = [f"b{i % 2}" for i in range(len(units))]
    with pytest.raises(error, match=says) as found:
        score_perturbations(vectors, labels, control="c", units=change(units, labels), batches=batches, options=RAW)
    assert found.value.field == "units"


def test_few_units_units_of_several_labels_and_units_across_batches_are_told(rng):
    vectors, labels, units = wells(rng, [("a", 20)] + [("c", 20)] * 6, icc=0.0)
    few = score_perturbations(vectors, labels, control="c", units=units, options=RAW)
    assert few.table["flags"].item() == "few_units"
    assert few.table["p_unit"].notna().all()
    assert few.table["z_unit"].notna().all()
    assert any("6 units of controls" in text for text in few.warnings)
    donors = [f"d{i % 3}" for i in range(len(units))]
    spanning = score_perturbations(vectors, labels, control="c", units=donors, options=RAW)
    assert any("units_span_labels: 3 more" in text for text in spanning.warnings)
    assert spanning.table["n_units"].item() == 3
    batches = [f"b{i % 2}" for i in range(len(units))]
    crossing = score_perturbations(vectors, labels, control="c", units=units, batches=batches, options=RAW)
    assert any("units_span_batches" in text for text in crossing.warnings)
    # Units within batches: the perturbation's one batch has one unit of controls, the other has five.
    plates = ["p0"] * 40 + ["p1"] * 100
    within = score_perturbations(vectors, labels, control="c", units=units, batches=plates, options=RAW)
    assert within.table["flags"].item() == "few_units"
    assert within.table[["p_unit", "z_unit"]].isna().all().all()
