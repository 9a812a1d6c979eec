"""Edits of rank tokens against the same edits of a plain list, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import EmptyCellError, InvalidParameterError
from perturbscope.families.edits import EDIT_KINDS, TokenEdit
from perturbscope.families.rank import RankFamily, build

SPECIAL = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
GENES = tuple(f"ENSG{number:011d}" for number in range(6))


def family(**options: str) -> RankFamily:
    tokens = np.arange(4, 10, dtype=np.int32)
    return build({"max_length": 6, **options}, GeneVocabulary(GENES, tokens, np.ones(6), SPECIAL, "a test"))


def edited(cell: list[int], edit: TokenEdit, token: int, *, start: bool, end: bool) -> list[int]:
    """The edit of one cell, as its description has it."""
    if token not in cell:
        return cell
    genes = cell[start : len(cell) - end]
    if edit.kind == "mask":
        genes[genes.index(token)] = SPECIAL["<mask>"]
    else:
        genes.remove(token)
        if edit.kind == "move":
            genes.insert(min(edit.position, 6), token)
    return [*cell[:start], *genes, *cell[len(cell) - end :]]


@given(data=st.data(), start=st.booleans(), end=st.booleans(), kind=st.sampled_from(EDIT_KINDS))
@settings(max_examples=200, deadline=None)
def test_an_edit_of_many_cells_is_that_of_each(data, start, end, kind):
    made = family(**({"start": "<cls>"} if start else {}), **({"end": "<eos>"} if end else {}))
    counts = np.array(data.draw(st.lists(st.permutations([0, 0, 1, 2, 3, 4]), min_size=1, max_size=6)))
    tokens = made.tokenize(CountMatrix.from_matrix(counts, GENES))
    gene, position = data.draw(st.integers(0, 5)), data.draw(st.sampled_from([0, 1, 2, 3, 9, 2**70]))
    edit = TokenEdit(kind=kind, gene=gene, position=position)
    before = [cell["input_ids"].tolist() for cell in tokens]
    found = made.edit(tokens, edit)
    wanted = [edited(list(cell), edit, 4 + gene, start=start, end=end) for cell in before]
    assert [cell["input_ids"].tolist() for cell in found] == wanted
    assert found.arrays["input_ids"].dtype == np.int32
    assert [cell["input_ids"].tolist() for cell in tokens] == before
    assert found.n_detected.tolist() == tokens.n_detected.tolist()


@pytest.mark.parametrize("options", [{}, {"start": "<cls>", "end": "<eos>"}], ids=["plain", "framed"])
def test_a_cell_keeps_a_gene(options):
    made = family(**options)
    tokens = made.tokenize(CountMatrix.from_matrix([[1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], GENES))
    with pytest.raises(EmptyCellError, match=r"Cell 1 \(from 0\) has no other gene than ENSG00000000001, so nothing"):
        made.edit(tokens, TokenEdit(kind="delete", gene=1))
    assert made.edit(tokens, TokenEdit(kind="delete", gene=0)).lengths.tolist() == [1 + len(options)] * 2


def test_a_gene_that_is_none_and_the_cost_of_a_cell():
    made = family()
    tokens = made.tokenize(CountMatrix.from_matrix([[1, 1, 0, 0, 0, 0]], GENES))
    with pytest.raises(InvalidParameterError, match="gene is 6; the vocabulary has 6 genes") as caught:
        made.edit(tokens, TokenEdit(kind="mask", gene=6))
    assert caught.value.field == "gene"
    assert made.edits == set(EDIT_KINDS)
    assert made.cost(17) == 17
