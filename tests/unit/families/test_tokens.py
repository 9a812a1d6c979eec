"""Tokens of many cells: arrays per token and per cell are cut, joined and padded together."""

from __future__ import annotations

import numpy as np
import pytest

from perturbscope.cells.genes import GeneCoverage
from perturbscope.families.tokens import InputSpec, TokenizedCells, concatenate, pad

INPUTS = (
    InputSpec("ids", "int64", 0),
    InputSpec("pairs", "float32", -2, trailing=(2,)),
    InputSpec("batch_label", "int64", 0, per="cell"),
    InputSpec("depth", "float32", 0, trailing=(3,), per="cell"),
)


def cells(*numbers: int) -> TokenizedCells:
    """Cell c has c + 1 tokens; every value says whose it is."""
    lengths = [number + 1 for number in numbers]
    owners = np.repeat(numbers, lengths)
    return TokenizedCells(
        arrays={"ids": owners * 10 + 1, "pairs": np.stack([owners, -owners], axis=1).astype(np.float32)},
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        known_share=np.array(numbers, dtype=np.float32) / 10,
        n_detected=np.array(numbers, dtype=np.int32),
        coverage=GeneCoverage(1, 1),
        per_cell={
            "batch_label": np.array(numbers, dtype=np.int32),
            "depth": np.repeat(numbers, 3).reshape(-1, 3).astype(np.float32),
        },
    )


def assert_same(found: TokenizedCells, wanted: TokenizedCells) -> None:
    for name in ("offsets", "known_share", "n_detected"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    for ours, theirs in ((found.arrays, wanted.arrays), (found.per_cell, wanted.per_cell)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("rows", [[2, 0, 3], [], [1, 1]])
def test_inputs_per_cell_go_with_their_cells(rows: list[int]) -> None:
    assert_same(cells(0, 1, 2, 3).take(np.array(rows, dtype=np.intp)), cells(*rows))
    assert_same(concatenate([cells(0, 2), cells(*rows), cells(3)]), cells(0, 2, *rows, 3))
    assert cells(4, 2)[1]["batch_label"] == 2


def test_inputs_per_cell_are_not_padded() -> None:
    batch = pad(cells(0, 1, 2), np.array([2, 0]), INPUTS, length=4)
    assert batch["ids"].tolist() == [[21, 21, 21, 0], [1, 0, 0, 0]]
    assert batch["pairs"].dtype == np.float32
    assert batch["pairs"][1].tolist() == [[0, 0], [-2, -2], [-2, -2], [-2, -2]]
    assert (batch["batch_label"].dtype, batch["batch_label"].tolist()) == (np.int64, [2, 0])
    assert batch["depth"].tolist() == [[2, 2, 2], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
