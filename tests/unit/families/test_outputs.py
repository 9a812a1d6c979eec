"""Outputs by name: values of batches land at their own cells, whatever the lengths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbscope.errors import InvalidParameterError
from perturbscope.families.outputs import CELL_EMBEDDING, Outputs, OutputSpec, selected
from tests.bundles import TINY_OUTPUTS


def bounds(lengths: list[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(lengths, dtype=np.int64))])


def outputs_of(cells: list[int], lengths: list[int], specs: tuple[OutputSpec, ...] = TINY_OUTPUTS) -> Outputs:
    """Values that say whose they are: of cell c per cell 1000 c + column, of its token t 1000 c + 10 t + column."""
    found = Outputs.empty(specs, bounds(lengths))
    for spec in specs:
        rows = np.array(cells) if spec.per == "cell" else np.repeat(cells, lengths)
        within = 0 if spec.per == "cell" else np.concatenate([np.arange(n) for n in lengths])
        found.values[spec.name][:] = (1000 * rows + 10 * within)[:, None] + np.arange(spec.width)
    return found


@given(st.data())
def test_values_of_batches_land_at_their_cells(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=12))
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths)))) | {0, len(lengths)})
    wanted = outputs_of(list(range(len(lengths))), lengths)
    # One output fewer than the batches have: a caller may want less than another one in its batch.
    found = Outputs.empty(TINY_OUTPUTS[:-1], wanted.offsets)
    for start, stop in itertools.pairwise(cuts):
        cells = order[start:stop]
        batch = outputs_of(cells, [lengths[cell] for cell in cells])
        middle = len(cells) // 2
        for part in (slice(0, middle), slice(middle, None)):
            if cells[part]:
                found.put(np.array(cells[part]), batch, first=part.start)
    assert len(found) == len(lengths)
    assert list(found.values) == [spec.name for spec in TINY_OUTPUTS[:-1]]
    for spec in found.specs:
        np.testing.assert_array_equal(found[spec.name], wanted[spec.name])


def test_the_cell_embedding_is_always_chosen_and_the_order_is_the_models() -> None:
    def names(chosen: list[str] | None) -> list[str]:
        return [spec.name for spec in selected(TINY_OUTPUTS, chosen)]

    assert names(None) == names([]) == names([CELL_EMBEDDING]) == [CELL_EMBEDDING]
    assert names(["cell_logits", "gene_value"]) == [CELL_EMBEDDING, "gene_value", "cell_logits"]
    with pytest.raises(InvalidParameterError, match="no output 'logits'; it has cell_embedding, gene_embedding, gene_"):
        selected(TINY_OUTPUTS, ["gene_value", "logits"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per": "gene"}, "is per 'gene'"),
        ({"meaning": "score"}, "means 'score'"),
        ({"width": 0}, "has the width 0"),
        ({"names": ("a", "b")}, "has 3 columns and 2 names"),
    ],
)
def test_a_description_that_cannot_be(changes: dict[str, object], message: str) -> None:
    fields = {"name": "x", "per": "cell", "width": 3, "meaning": "logits", "names": ("a", "b", "c")}
    with pytest.raises(ValueError, match=message):
        OutputSpec(**(fields | changes))  # type: ignore[arg-type]
