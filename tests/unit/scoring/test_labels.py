"""Labels in linear time and memory, and messages about missing ones in bounded time."""

from __future__ import annotations

import difflib
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from perturbscope.errors import ControlLabelMissingError, near
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.labels import Groups, check_labels, codes_of, require_control
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions

FEW = ScoreOptions(permutations=10, min_cells=20)


def vectors(n: int) -> Any:
    return np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)


def group(n: int) -> object:
    labels = ["c"] * 20 + [f"p{i}" for i in range(n)]
    return Groups.of(vectors(n + 20), labels, labels, FEW, control="c")


def score(n: int) -> object:
    labels = ["c"] * 20 + ["x"] * 20 + [f"p{i}" for i in range(n)]
    return score_perturbations(vectors(n + 40), labels, control="c", options=FEW)


def compare(n: int) -> object:
    labels = ["x"] * 20 + [f"p{i}" for i in range(n + 20)]
    return compare_perturbations(vectors(n + 40), labels, pairs=[("x", f"p{i}") for i in range(n)], options=FEW)


def alike(n: int) -> object:
    spelled = [
        "".join(letter.upper() if i >> at & 1 else letter for at, letter in enumerate("abcdefghijklmnop"))
        for i in range(n)
    ]
    labels = ["c"] * 20 + ["x"] * 20 + spelled
    return score_perturbations(vectors(len(labels)), labels, control="c", options=FEW)


@pytest.mark.parametrize("work", [group, score, compare, alike])
def test_four_times_the_labels_take_less_than_six_times_the_time_and_memory(work: Callable[[int], object]) -> None:
    n = 10_000
    work(100)

    def seconds(n: int) -> float:
        took = []
        for _ in range(3):
            began = time.process_time()
            work(n)
            took.append(time.process_time() - began)
        return min(took)

    def peak(n: int) -> int:
        tracemalloc.start()
        work(n)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert seconds(4 * n) < 6 * seconds(n)
    assert peak(4 * n) < 6 * peak(n)


def test_a_long_label_is_held_once() -> None:
    long = "\U0001f600" * 2000
    labels = [long] * 5000 + ["c"] * 50
    values = vectors(len(labels))
    tracemalloc.start()
    groups = Groups.of(values, labels, labels, FEW, control="c")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert groups.sizes == {"c": 50, long: 5000}
    assert peak < 5e6, "an array of numpy's strings would take 40 MB"


def test_codes_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    labels = [f"{'Aa é'[i % 4]}{i // 3}\U0001f600"[: 1 + i % 4] for i in rng.integers(0, 40, 500)]
    labels = [label if label.strip() else "x" for label in labels]
    names, codes = codes_of(check_labels(labels, 500, "perturbations"))
    expected, inverse = np.unique(np.asarray(labels), return_inverse=True)
    assert names == expected.tolist()
    np.testing.assert_array_equal(codes, inverse)


def test_the_callers_labels_are_left_alone() -> None:
    mine = np.array([1, 2, 3], dtype=object)
    assert check_labels(mine, 3, "perturbations").tolist() == ["1", "2", "3"]
    assert mine.tolist() == [1, 2, 3]


def test_near_names_are_those_of_difflib_where_they_are_few() -> None:
    rng = random.Random(0)
    names = sorted({"".join(rng.choices("abcd", k=rng.randrange(3, 9))) for _ in range(60)})
    for name in ("abca", "dcba", "aaaa", "bcdbcd"):
        best = difflib.get_close_matches(name, names, n=1)
        assert near(name, names, n=1) == best
    assert near("control", ["contrl", "x"]) == ["contrl"]
    assert near("", ["a"]) == near("a" * 1000, ["a" * 999]) == []


def test_names_that_difflib_would_compare_for_minutes_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    ratio = difflib.SequenceMatcher.ratio
    monkeypatch.setattr(difflib.SequenceMatcher, "ratio", lambda self: compared.append(1) or ratio(self))
    rng = random.Random(1)
    for length, n in ((199, 2000), (64, 100_000)):
        letters = list("ab" * 100)[:length]
        names = ["".join(rng.sample(letters, length)) for _ in range(min(n, 2000))] * (n // 2000)
        began = time.process_time()
        with pytest.raises(ControlLabelMissingError):
            require_control("ab" * (length // 2), names)
        assert time.process_time() - began < 1.0, "a tenth of that where nothing else runs"
    assert len(compared) < 100


@pytest.mark.parametrize("more", [0, 30_000])
def test_a_control_that_is_spelled_otherwise_is_found_among_many(more: int) -> None:
    names = ["CTRL", "g1", "g2", *(f"p{i}" for i in range(more))]
    with pytest.raises(ControlLabelMissingError, match=r"Similar labels: 'CTRL'"):
        require_control(" ctrl", names)
    with pytest.raises(ControlLabelMissingError, match=r"'CTRL'"):
        require_control("no-such-thing-here", names)


def test_a_long_label_is_not_repeated_in_full() -> None:
    with pytest.raises(ControlLabelMissingError) as caught:
        require_control("\0" * 10_000_000, ["y" * 1_000_000] * 3)
    assert len(caught.value.message) < 2000
