"""The common part of the performance benchmarks. Nothing here is timed."""

import numpy as np
import pytest

from benchmarks.performance import harness


def test_routes_take_turns() -> None:
    order: list[str] = []
    found = harness.race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, warm=1)
    assert order == ["a", "b"] * 4
    assert [len(turns.seconds) for turns in found.values()] == [3, 3]
    assert harness.Turns((3.0, 1.0, 2.0)).median == 2.0
    assert harness.Turns((3.0, 1.0, 2.0)).spread == 3.0


def test_memory_of_a_block_is_seen() -> None:
    with harness.Watch() as watch:
        held = np.ones(64 * 2**20 // 8)
    assert watch.above >= 0.9 * held.nbytes / 2**20


def test_a_process_of_its_own_gives_its_result_and_its_peak() -> None:
    result, peak = harness.in_child(pow, 2, 10)
    assert result == 1024
    assert peak > 1
    with pytest.raises(ChildProcessError, match="pow failed in its process: TypeError"):
        harness.in_child(pow, 2, "x")
