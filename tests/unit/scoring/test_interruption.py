"""A score ends soon after its end is asked for, whatever it computes; steps change no number."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from perturbscope.analysis import degs
from perturbscope.cells.counts import CountMatrix
from perturbscope.scoring import distances
from perturbscope.scoring.calibration import calibrate
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.distances import product, row_by_row
from perturbscope.scoring.energy.matrix import Subsets
from perturbscope.scoring.optimal_transport import transport_cost
from perturbscope.scoring.pair_map import distance_map
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions
from perturbscope.threads import checkpoint, in_order, interruptible

SOON = 1.0
"""Seconds within which a computation must end; a tenth where nothing else runs."""


class GoneError(Exception):
    """Nobody waits for the computation any more."""


def cells(controls: int, sizes: tuple[int, ...], width: int = 32, batches: int = 0) -> dict[str, Any]:
    labels = ["control"] * controls + [f"g{i}" for i, n in enumerate(sizes) for _ in range(n)]
    values = np.random.default_rng(0).standard_normal((len(labels), width)).astype(np.float32)
    batch = [f"b{i % batches}" for i in range(len(labels))] if batches else None
    return {"embeddings": values, "perturbations": labels, "batches": batch}


def ends_soon(compute: Callable[[], object]) -> None:
    """Ask a computation for its end at a few random times, and wait for it."""
    for after in np.random.default_rng().uniform(0.0, 0.4, 3):
        gone, ended = threading.Event(), list[str]()

        def check(gone: threading.Event = gone) -> None:
            if gone.is_set():
                raise GoneError

        def work(check: Callable[[], None] = check, ended: list[str] = ended) -> None:
            try:
                with interruptible(check):
                    compute()
                ended.append("finished")
            except GoneError:
                ended.append("gone")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(after)
        gone.set()
        asked = time.monotonic()
        thread.join(60)
        assert time.monotonic() - asked < SOON
        assert ended == ["gone"], "the computation is too short for this test"


METRICS = [
    ("e_distance", "euclidean"),
    ("e_distance", "sqeuclidean"),
    ("cosine_e_distance", "euclidean"),
    ("wasserstein", "euclidean"),
]
MUCH = {"permutations": 1_000_000, "exceedances": 0, "wasserstein_permutations": 1_000_000, "null_draws": 1_000_000}


@pytest.mark.parametrize("batches", [0, 3], ids=["", "batches"])
@pytest.mark.parametrize("null", ["size_matched", "fixed"])
@pytest.mark.parametrize("estimator", ["U", "V"])
@pytest.mark.parametrize(("metric", "ground"), METRICS)
def test_a_score_ends_soon(metric: Any, ground: Any, estimator: Any, null: Any, batches: int) -> None:
    given = cells(800, (300, 40), batches=batches)
    options = ScoreOptions(metrics=(metric,), ground=ground, estimator=estimator, null=null, **MUCH)
    ends_soon(lambda: score_perturbations(**given, control="control", options=options))


@pytest.mark.parametrize(("metric", "ground"), METRICS)
def test_a_comparison_ends_soon(metric: Any, ground: Any) -> None:
    transport_cost(np.eye(2, 3))  # which imports POT
    given = cells(100, (200, 150))
    options = ScoreOptions(metrics=(metric,), ground=ground, **MUCH)
    ends_soon(lambda: compare_perturbations(**given, control="control", options=options))


def test_large_groups_end_soon() -> None:
    given = cells(4000, (4000,) * 4, 128)
    ends_soon(
        lambda: score_perturbations(
            **given, control="control", options=ScoreOptions(permutations=20_000, exceedances=0)
        )
    )


def test_pairs_without_enough_cells_end_soon() -> None:
    given = cells(20, (20, *[1] * 20_000), 2)
    ends_soon(lambda: compare_perturbations(**given))


def test_controls_against_controls_end_soon() -> None:
    given = cells(1000, (100,), 32, 4)
    ends_soon(lambda: calibrate(**given, control="control", splits=1_000_000))


@pytest.mark.parametrize("method", ["exact", "landmarks"])
def test_a_map_of_all_pairs_ends_soon(method: Any) -> None:
    given = cells(300, (300,) * 120, 64)
    del given["batches"]
    ends_soon(lambda: [distance_map(**given, method=method, landmarks=500) for _ in range(20)])


def test_tests_of_genes_end_soon(rng: np.random.Generator) -> None:
    counts = CountMatrix.from_matrix(1 + rng.poisson(1.0, (600, 5000)), [f"g{i}" for i in range(5000)])
    labels = ["control", "a"] * 300
    ends_soon(lambda: [degs.deg_table(counts, labels, control="control") for _ in range(20)])


def test_all_threads_of_a_computation_are_asked() -> None:
    asked = set[int]()
    both = threading.Barrier(2, timeout=60)

    def check() -> None:
        asked.add(threading.get_ident())

    def work(number: int) -> int:
        both.wait()
        checkpoint()
        return number

    with interruptible(check):
        assert list(in_order(work, range(2))) == [0, 1]
    assert len(asked) == 2
    assert threading.get_ident() not in asked
    checkpoint()
    assert len(asked) == 2


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_steps_change_no_bit(kind: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = []
    marks = rng.random((700, 900)) < 0.4
    few = Subsets(np.nonzero(marks[:, :100])[1], marks[:, :100].sum(axis=1), 900)
    matrix = rng.standard_normal((900, 800)).astype(kind)
    keys = rng.random((700, 900))

    def compute() -> list[Any]:
        a = marks.astype(kind)
        return [product(a, matrix), few.sums(matrix), row_by_row(lambda part: np.sort(part, axis=1), keys)]

    whole = compute()
    steps: list[int] = []
    monkeypatch.setattr(distances, "STEP_PRODUCTS", 2**27)
    monkeypatch.setattr("perturbscope.scoring.energy.matrix.STEP_PRODUCTS", 2**24)
    monkeypatch.setattr(distances, "STEP_VALUES", 2**14)
    with interruptible(lambda: steps.append(1)):
        parts = compute()
    assert len(steps) > 20
    for before, after in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(before, after)


def test_numbers_are_the_same_in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def tables() -> list[Any]:
        found = []
        for batches, metric in itertools.product((0, 2), ("e_distance", "cosine_e_distance", "wasserstein")):
            given = cells(150, (60, 30), 8, batches)
            options = ScoreOptions(metrics=(metric,), null_draws=10, wasserstein_permutations=20)
            found.append(score_perturbations(**given, control="control", options=options).table)
            found.append(compare_perturbations(**given, control="control", options=options).table)
        return found

    before = tables()
    monkeypatch.setattr(distances, "STEP_VALUES", 1000)
    monkeypatch.setattr("perturbscope.scoring.labels.STEP_VALUES", 100)
    for one, other in zip(before, tables(), strict=True):
        assert one.equals(other)
