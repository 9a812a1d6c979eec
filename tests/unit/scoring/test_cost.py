"""The estimated cost of a score: near the operations that are done, known before anything is made, told in words."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import pytest

from perturbscope.scoring import cost, distances, pairs, scorers
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.cost import compare_cost, duration, report_cost, score_cost
from perturbscope.scoring.energy import batch_permutations, closed_form, matrix, permutations
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions
from perturbscope.scoring.statistics import Exchange


class Operations:
    """Counts operations that are really done, at the prices of the estimate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seconds: list[float] = []
        self._patch = monkeypatch
        for module in (matrix, closed_form, distances):
            self._price(module, "product", self._product)
        self._price(permutations, "row_by_row", lambda function, keys: cost.KEY * keys.size)
        self._price(batch_permutations, "row_by_row", lambda function, keys: 4 * cost.KEY * keys.size)
        self._price(matrix, "distances", lambda x, y=None: cost.DISTANCE * len(x) * len(x if y is None else y))
        self._price(matrix.Subsets, "_sparse_sums", self._sparse)
        self._price(
            matrix.DenseGroup, "growing", lambda group, orders: cost.GROWING * len(orders) * orders.shape[1] ** 2
        )
        for module in (scorers, pairs):
            self._price(
                module,
                "pairwise_distances",
                lambda x, y=None: 2 * cost.DISTANCE * len(x) * len(x if y is None else y),
            )
        self._price(Exchange, "draw", lambda exchange, draws, rng: 2 * cost.KEY * draws * exchange.size)
        self._price(pairs, "transport_cost", lambda c: cost.TRANSPORT_PROBLEM + cost.TRANSPORT * c.size)
        self._price(
            __import__("scipy.optimize").optimize,
            "linear_sum_assignment",
            lambda c: cost.PROBLEM + cost.ASSIGN_SQUARE * len(c) ** 2 + cost.ASSIGN_CUBE * len(c) ** 3,
        )

    @property
    def seconds(self) -> float:
        return sum(self._seconds)

    def _price(self, owner: Any, name: str, price: Callable[..., float]) -> None:
        done = getattr(owner, name)

        @wraps(done)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._seconds.append(price(*args, **kwargs))
            return done(*args, **kwargs)

        self._patch.setattr(owner, name, counted)

    @staticmethod
    def _product(a: Any, b: Any, out: Any = None) -> float:
        return cost.PRODUCT * a.dtype.itemsize / 4 * a.size * b.shape[1]

    @staticmethod
    def _sparse(subsets: Any, values: Any) -> float:
        columns = 1 if values.ndim == 1 else values.shape[1]
        return cost.SPARSE_PRODUCT * values.dtype.itemsize / 4 * len(subsets._indices) * columns


def labels_of(controls: int, sizes: list[int]) -> list[str]:
    return ["control"] * controls + [f"g{i}" for i, n in enumerate(sizes) for _ in range(n)]


ALL = {"permutations": 999, "exceedances": 0}
E, C, W = ({"metrics": (metric,), **ALL} for metric in ("e_distance", "cosine_e_distance", "wasserstein"))
CASES: list[tuple[str, int, list[int], int, dict[str, Any], int]] = [
    ("score", 1500, [400] * 5, 64, E, 0),
    ("score", 400, [100] * 40, 512, E, 0),
    ("score", 1000, [30, 60, 90, 120, 150, 180], 64, E, 0),
    ("score", 200, [60] * 12, 32, {**E, "permutations": 20_000}, 0),
    ("score", 1500, [200] * 3, 64, {**E, "permutations": 5_000}, 0),
    ("score", 800, [300] * 4, 64, {**E, "repeats": 300, "null": "fixed"}, 0),
    ("score", 800, [300] * 30, 64, {}, 0),
    ("score", 1200, [300] * 8, 64, E, 3),
    ("score", 600, [200] * 8, 64, {**E, "omnibus": True}, 0),
    ("score", 600, [60] * 40, 64, E, 12),
    ("score", 2000, [800] * 8, 256, C, 0),
    ("score", 1000, [300] * 4, 256, {**C, "permutations": 5_000}, 0),
    ("score", 1000, [400] * 8, 256, {**E, "ground": "sqeuclidean"}, 2),
    ("score", 120, [50] * 6, 16, W, 0),
    ("score", 60, [25] * 4, 8, {**W, "null_draws": 2_000}, 0),
    ("score", 900, [400, 350], 32, {**W, "null_draws": 20, "wasserstein_permutations": 30}, 0),
    ("score", 700, [100] * 3, 32, {**W, "null": "fixed", "wasserstein_permutations": 500}, 0),
    ("compare", 100, [100] * 12, 64, E, 0),
    ("compare", 100, [900] * 4, 256, E, 0),
    ("compare", 100, [300] * 6, 64, E, 4),
    ("compare", 100, [500] * 5, 256, C, 0),
    ("compare", 50, [60] * 6, 16, W, 0),
    ("compare", 50, [60, 90, 150], 16, W, 0),
]


@pytest.mark.parametrize(("kind", "controls", "sizes", "width", "given", "batches"), CASES)
def test_the_estimate_is_near_what_is_done(
    kind: str,
    controls: int,
    sizes: list[int],
    width: int,
    given: dict[str, Any],
    batches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = labels_of(controls, sizes)
    values = np.random.default_rng(0).standard_normal((len(labels), width)).astype(np.float32)
    if kind == "score" and given.get("permutations", 1000) >= 1000:  # tails are those of an effect
        values[controls : controls + sizes[0]] += 1
    in_batches = [f"b{i % batches}" for i in range(len(labels))] if batches else None
    options = ScoreOptions(**given)
    operations = Operations(monkeypatch)
    run: Any = score_perturbations if kind == "score" else compare_perturbations
    run(values, labels, control="control", batches=in_batches, options=options)
    estimate: Any = score_cost if kind == "score" else compare_cost
    expected = estimate(Counter(labels), "control", options, width=width, batches=batches)
    assert operations.seconds / 3 < expected.seconds < 3 * operations.seconds


def test_an_hour_is_told_from_a_second_before_anything_is_made() -> None:
    many = {"null_draws": 100_000, "wasserstein_permutations": 100_000, "permutations": 100_000}
    hostile = score_cost(
        {"c": 1500, "x": 1500}, "c", ScoreOptions(metrics=("wasserstein",), null="fixed", **many), width=4
    )
    assert hostile.seconds > 3600
    assert "wasserstein_permutations (" in hostile.options()
    began = time.process_time()
    pairs_of_all = compare_cost(dict.fromkeys(map(str, range(200_000)), 1), None, ScoreOptions(), width=1)
    assert time.process_time() - began < 5
    assert pairs_of_all.n_rows == 200_000 * 199_999 // 2
    assert pairs_of_all.n_bytes > 10**12
    usual = score_cost(dict.fromkeys(map(str, range(200)), 100), "0", ScoreOptions(), width=256)
    assert usual.seconds < 10


def test_named_pairs_cost_what_they_are() -> None:
    sizes = {"a": 100, "b": 100, "c": 100, "d": 3}
    options = ScoreOptions()
    some = compare_cost(sizes, None, options, width=8, pairs=[("a", "b"), ("a", "c"), ("b", "c")])
    every = compare_cost({name: sizes[name] for name in "abc"}, None, options, width=8)
    assert some.seconds == pytest.approx(every.seconds, rel=0.01)
    small = compare_cost(sizes, None, options, width=8, pairs=[("a", "d"), ("a", "nobody")])
    assert small.parts["permutations"] == 0
    assert small.n_rows == 2


def test_a_report_costs_its_score_its_maps_and_its_genes() -> None:
    sizes = {"control": 500, **dict.fromkeys("abc", 200)}
    score = score_cost(sizes, "control", ScoreOptions(), width=64)
    report = report_cost(sizes, "control", ScoreOptions(), width=64)
    tested = report_cost(sizes, "control", ScoreOptions(), width=64, n_counts=10**7)
    assert report.seconds > score.seconds + cost.MAP_SECONDS
    assert tested.seconds - report.seconds == pytest.approx(cost.DEG_SECONDS * 10**7)
    assert tested.n_bytes > report.n_bytes + 10**8


@pytest.mark.parametrize("metric", ["e_distance", "cosine_e_distance", "wasserstein"])
@pytest.mark.parametrize("kind", ["score", "compare"])
def test_bytes_are_an_upper_bound(kind: str, metric: Any) -> None:
    sizes = [700, 300] if metric == "wasserstein" else [700, 300, *[2] * 300]
    labels = labels_of(1000, sizes)
    values = np.random.default_rng(0).standard_normal((len(labels), 16)).astype(np.float32)
    options = ScoreOptions(metrics=(metric,), null_draws=10, wasserstein_permutations=10)
    run: Any = score_perturbations if kind == "score" else compare_perturbations
    run(values[900:1800], labels[900:1800], control="control", options=options)
    tracemalloc.start()
    run(values, labels, control="control", options=options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate: Any = score_cost if kind == "score" else compare_cost
    assert peak < estimate(Counter(labels), "control", options, width=16).n_bytes


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0.4 seconds"), (12.4, "12 seconds"), (119, "119 seconds"), (200, "3.3 minutes"), (21_240, "5.9 hours")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
