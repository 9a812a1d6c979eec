"""The map of all pairs has the distances of the pairs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError, TooFewCellsError
from perturbscope.scoring.energy import all_pairs as module
from perturbscope.scoring.pair_map import distance_map
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions

SIZES = {"d": 9, "a": 4, "c": 25, "b": 7, "tiny": 2}


@pytest.fixture(scope="module")
def screen() -> tuple[NDArray[np.float32], list[str]]:
    """Groups of different sizes, shuffled, one of them too small."""
    rng = np.random.default_rng(0)
    labels = [name for name, size in SIZES.items() for _ in range(size)]
    shifts = {name: rng.standard_normal(6) for name in SIZES}
    values = np.stack([shifts[name] + rng.standard_normal(6) for name in labels]).astype(np.float32)
    order = rng.permutation(len(labels))
    return values[order], [labels[i] for i in order]


@pytest.mark.parametrize("block", [1, 12, 4096])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "V", "normalize": False},
        {"ground": "sqeuclidean"},
        {"metrics": ["cosine_e_distance"], "estimator": "V"},
        {"max_cells": 8},
    ],
    ids=str,
)
def test_it_equals_the_distances_of_pairs(screen, block, options, monkeypatch):
    monkeypatch.setattr(module, "TILE_CELLS", block)
    chosen = ScoreOptions.from_dict({"min_cells": 4, "permutations": 1, **options})
    found = distance_map(*screen, options=chosen)
    assert found.names == ["a", "b", "c", "d"]
    assert found.n_cells.tolist() == [min(SIZES[name], chosen.max_cells) for name in found.names]
    frame = found.frame()
    assert (np.diag(frame) == 0).all()
    np.testing.assert_array_equal(frame, frame.T)
    keep = [label != "tiny" for label in screen[1]]
    pairs = compare_perturbations(
        screen[0][keep], [label for label in screen[1] if label != "tiny"], options=chosen
    ).table
    np.testing.assert_allclose(
        [frame.loc[a, b] for a, b in zip(pairs["a"], pairs["b"], strict=True)], pairs["distance"], atol=2e-6
    )


def test_what_it_is_made_of_is_said(screen):
    done: list[tuple[str, int, int]] = []
    found = distance_map(*screen, options=ScoreOptions(min_cells=4, seed=3), progress=lambda *step: done.append(step))
    assert found.provenance["kind"] == "map"
    assert found.provenance["n_groups"] == 4
    assert done[-1][1] == done[-1][2]
    assert any("1 of 5 perturbations have fewer than 4 cells" in warning for warning in found.warnings)


def test_equal_cells_in_other_groups_leave_no_rounding_below_zero(screen):
    values, labels = screen
    twice = np.concatenate([values, values]).astype(np.float32)
    names = [*labels, *(f"{label} again" for label in labels)]
    found = distance_map(twice, names, options=ScoreOptions(min_cells=4, estimator="V")).frame()
    assert np.isfinite(found).all(axis=None)
    assert abs(found.loc["c", "c again"]) < 1e-3


def test_an_error_in_the_progress_stops_it(screen):
    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    for method in ("exact", "landmarks"):
        with pytest.raises(StoppedError):
            distance_map(*screen, options=ScoreOptions(min_cells=4), method=method, progress=stop)


@pytest.mark.parametrize("estimator", ["U", "V"])
def test_with_all_cells_as_landmarks_it_is_exact(screen, estimator):
    options = ScoreOptions(min_cells=4, estimator=estimator)
    exact = distance_map(*screen, options=options)
    near = distance_map(*screen, options=options, method="landmarks")
    assert near.provenance["landmarks"]["scale"] == pytest.approx(1, abs=1e-3)
    np.testing.assert_array_equal(near.distances, near.distances.T)
    np.testing.assert_allclose(near.distances, exact.distances, atol=1e-3 * exact.distances.max())


def test_landmarks_say_their_error():
    rng = np.random.default_rng(1)
    labels = [f"P{i:02d}" for i in range(30) for _ in range(40)]
    values = rng.standard_normal((1200, 10)) + np.repeat(rng.standard_normal((30, 10)), 40, axis=0)
    exact = distance_map(values, labels)
    near = distance_map(values, labels, method="landmarks", landmarks=300)
    said = near.provenance["landmarks"]
    upper = np.triu_indices(30, 1)
    errors = (near.distances - exact.distances)[upper]
    assert said["pairs"] == 30 * 29 // 2
    assert said["rmse"] == pytest.approx(float(np.sqrt(np.mean(errors**2))), rel=1e-3)
    assert said["rmse"] < 0.05 * said["median_distance"]
    assert said["spearman"] > 0.999
    assert near.provenance["method"] == "landmarks"
    assert "approximate, from 300 landmarks" in near.warnings[-1]
    again = distance_map(values, labels, method="landmarks", landmarks=300)
    np.testing.assert_array_equal(again.distances, near.distances)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "guess"}, "must be one of exact, landmarks"),
        ({"method": "landmarks", "landmarks": 1}, "from 2 to 20,000"),
        ({"method": "landmarks", "options": ScoreOptions(metrics=("cosine_e_distance",))}, "mapped exactly"),
        ({"method": "landmarks", "options": ScoreOptions(ground="sqeuclidean")}, "mapped exactly"),
    ],
    ids=str,
)
def test_methods_that_are_none_are_refused(screen, given, message):
    with pytest.raises(InvalidParameterError, match=message):
        distance_map(*screen, **given)


def test_what_cannot_be_mapped_is_refused(screen):
    with pytest.raises(InvalidParameterError, match="compare_perturbations takes wasserstein"):
        distance_map(*screen, options=ScoreOptions(metrics=("wasserstein",)))
    with pytest.raises(TooFewCellsError):
        distance_map(*screen, options=ScoreOptions(min_cells=100))
