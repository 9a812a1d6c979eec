"""Power by number of cells: interpolation, a strong and no effect, the false-positive rate, bad input."""

import numpy as np
import pytest

from evaluation.power import cells_needed, power
from perturbscope.errors import ControlLabelMissingError, InvalidParameterError, TooFewCellsError
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.results import ScoreOptions

QUICK = ScoreOptions(permutations=59, repeats=1)


@pytest.fixture(scope="module")
def screen():
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", "NONE", "STRONG", "MODEST", "SMALL"], [160, 60, 60, 120, 12])
    values = rng.normal(size=(len(labels), 6)) + 3
    values[labels == "STRONG", 0] += 4
    values[labels == "MODEST", 0] += 0.9
    return values, labels.tolist()


@pytest.fixture(scope="module")
def found(screen):
    return power(*screen, control="control", grid=(10, 40, 80), repeats=15, options=QUICK)


def test_a_strong_effect_needs_few_cells_and_none_never_suffices(found):
    needed = found.needed.set_index("perturbation")
    assert needed.index[0] == "STRONG"
    assert needed.loc["STRONG", ["n_needed", "flags"]].tolist() == [10.0, "below_grid"]
    assert 10 < needed.loc["MODEST", "n_needed"] < 80
    assert np.isnan(needed.loc["NONE", "n_needed"])
    assert needed.loc["NONE", "flags"] == "not_reached"
    assert needed.loc["SMALL", "largest_n"] == 10


def test_power_rises_with_cells_within_its_interval(found):
    modest = found.curves[found.curves["perturbation"] == "MODEST"]
    assert modest["n"].tolist() == [10, 40, 80]
    assert modest["detected"].iloc[0] < modest["detected"].iloc[-1]
    assert modest["median_z"].is_monotonic_increasing
    inside = (found.curves["low"] <= found.curves["detected"]) & (found.curves["detected"] <= found.curves["high"])
    assert inside.all()
    assert (found.curves["repeats"] == 15).all()


def test_controls_are_detected_at_the_level_of_the_test(screen):
    rates = [
        power(
            *screen,
            control="control",
            grid=(20,),
            repeats=40,
            options=ScoreOptions(permutations=59, repeats=1, seed=seed),
        )
        for seed in range(2)
    ]
    share = np.mean([rate.false_positives["detected"].iloc[0] for rate in rates])
    assert share < 0.16
    assert set(rates[0].curves["perturbation"]) == {"NONE", "STRONG", "MODEST"}
    assert rates[0].false_positives["perturbation"].tolist() == ["control"]


def test_a_draw_of_all_cells_is_the_score_of_the_perturbation(screen):
    values, labels = screen
    found = power(values, labels, control="control", grid=(60,), repeats=4, options=QUICK)
    scored = score_perturbations(values, labels, control="control", options=ScoreOptions(permutations=59, min_cells=60))
    drawn, whole = found.curves.set_index("perturbation"), scored.table.set_index("perturbation")
    assert drawn.loc["STRONG", "detected"] == 1.0
    # One control sample in place of ten: the same distance, up to the choice of that sample.
    assert drawn.loc["STRONG", "median_z"] == pytest.approx(whole.loc["STRONG", "z"], rel=0.3)


def test_the_same_seed_gives_the_same_and_progress_counts(screen):
    seen = []
    arguments = {"control": "control", "grid": (10, 20), "repeats": 2, "options": QUICK}
    first = power(*screen, **arguments, progress=lambda *step: seen.append(step))
    assert first.curves.equals(power(*screen, **arguments).curves)
    # NONE, STRONG, MODEST and the controls at both n, SMALL at one.
    assert seen[-1] == ("power", 18, 18)


def test_batches_of_their_own_leave_nothing_to_test():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(100, 3)) + 3
    labels = ["control"] * 60 + ["KO"] * 40
    batches = ["a"] * 60 + ["b"] * 40
    found = power(values, labels, control="control", batches=batches, grid=(20,), repeats=3, options=QUICK)
    assert found.needed["flags"].tolist() == ["not_tried"]
    assert found.curves["detected"].isna().all()
    assert any("no p at all" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("detected", "expected", "flag"),
    [
        ([0.2, 0.6, 1.0], 10 * 10 ** (1 + 0.5), ""),
        ([0.2, 0.8, 1.0], 100.0, ""),
        ([0.9, 0.95, 1.0], 10.0, "below_grid"),
        ([0.1, 0.2, 0.3], np.nan, "not_reached"),
        ([np.nan] * 3, np.nan, "not_tried"),
        ([0.9, 0.1, 0.9], 100 * 10 ** (0.3 / 0.4), ""),
    ],
    ids=["between", "at", "below", "never", "none", "dip"],
)
def test_cells_needed_lie_on_a_line_in_the_logarithm(detected, expected, flag):
    n, found = cells_needed([10, 100, 1000], detected)
    assert found == flag
    np.testing.assert_allclose(n, expected)


def test_bad_input_is_named(screen):
    for field, value in {
        "grid": (1,),
        "repeats": 0,
        "alpha": 0.01,
        "target": 1.5,
        "metric": "wasserstein",
        "max_controls": 2,
    }.items():
        with pytest.raises(InvalidParameterError) as caught:
            power(*screen, control="control", options=QUICK, **{field: value})
        assert caught.value.field == field
    with pytest.raises(ControlLabelMissingError):
        power(*screen, control="ctrl")
    with pytest.raises(TooFewCellsError):
        power(screen[0][:165], screen[1][:165], control="control")
