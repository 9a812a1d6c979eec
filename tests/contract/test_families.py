"""The promises of every model family to batching, to the encoder and to callers.

A new family is covered as soon as ``perturbscope/families/`` names it; the toy family of the tests is another one.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import EmptyCellError, InvalidParameterError, UnknownGenesError, UnsupportedBundleError
from perturbscope.families import FAMILIES, Family, load_family
from perturbscope.families.edits import TokenEdit
from perturbscope.families.tokens import InputSpec, TokenizedCells, concatenate, pad
from perturbscope.inference.batching import BatchLimits, form_batches

CONFIGS: dict[str, dict[str, object]] = {
    "rank": {"max_length": 30},
    "toy": {"max_length": 30},
    "rank, start and end": {"max_length": 32, "start": "<cls>", "end": "<eos>"},
}
"""Options for a family over cells of 40 genes: short enough that some cells are cut. Up to a comma: its name."""


@pytest.fixture(params=[*FAMILIES, *(case for case in CONFIGS if case not in FAMILIES)])
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def name(case: str) -> str:
    return case.partition(",")[0]


@pytest.fixture
def vocabulary() -> GeneVocabulary:
    genes = GeneVocabulary.geneformer_gc30m()
    special = {**genes.special_tokens, "<cls>": len(genes), "<eos>": len(genes) + 1}
    return replace(genes, special_tokens=special)


@pytest.fixture
def family(name: str, case: str, vocabulary: GeneVocabulary) -> Family:
    return load_family(name, CONFIGS.get(case, {}), vocabulary)


@pytest.fixture
def tokens(family: Family, tiny_cells: CountMatrix) -> TokenizedCells:
    return family.tokenize(tiny_cells)


def assert_same(one: TokenizedCells, other: TokenizedCells) -> None:
    for arrays, others in ((one.arrays, other.arrays), (one.per_cell, other.per_cell)):
        assert set(arrays) == set(others)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name])
    for name in ("offsets", "known_share", "n_detected"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_rank_family_is_installed():
    assert "rank" in FAMILIES


def test_a_family_knows_its_name(family, name):
    assert family.name == name
    assert family.max_length >= 1


def test_the_options_survive_a_manifest(family, name, case, vocabulary, tiny_cells):
    config = json.loads(json.dumps(CONFIGS.get(case, {})))
    again = load_family(name, config, vocabulary)
    assert again.vocabulary is vocabulary
    assert_same(again.tokenize(tiny_cells), family.tokenize(tiny_cells))


def test_unknown_options_are_refused(name):
    with pytest.raises(UnsupportedBundleError):
        load_family(name, {"an option of the future": 1}, GeneVocabulary.geneformer_gc30m())


def test_inputs_describe_what_tokenize_gives(family, tokens):
    assert set(tokens.arrays) == {spec.name for spec in family.inputs if spec.per == "token"}
    assert set(tokens.per_cell) == {spec.name for spec in family.inputs if spec.per == "cell"}
    assert "attention_mask" not in {*tokens.arrays, *tokens.per_cell}
    for spec in family.inputs:
        n = tokens.offsets[-1] if spec.per == "token" else len(tokens)
        values = {**tokens.arrays, **tokens.per_cell}[spec.name]
        assert values.shape == (n, *spec.trailing)
        assert np.can_cast(values.dtype, spec.dtype, "same_kind")
        assert np.asarray(spec.pad_value).astype(spec.dtype) == spec.pad_value
        if spec.n_values is not None:
            assert 0 <= values.min() <= values.max() < spec.n_values
            assert 0 <= spec.pad_value < spec.n_values
        if spec.per == "token" and not spec.pad_is_a_value:
            assert not (values == spec.pad_value).any()


def test_lengths_are_within_their_bound_and_have_a_cost(family, tokens, tiny_cells):
    bound = family.bound(tiny_cells)
    assert (tokens.lengths <= bound).all()
    assert bound.max() <= family.max_length
    costs = [family.cost(length) for length in (1, 7, family.max_length)]
    assert 1 <= costs[0] <= costs[1] <= costs[2]


def test_every_token_is_a_gene_of_its_cell_or_special(family, tokens, tiny_cells, vocabulary):
    rows = family.gene_rows(tokens)
    assert rows.shape == (tokens.offsets[-1],)
    for cell, (start, stop) in enumerate(zip(tokens.offsets, tokens.offsets[1:], strict=False)):
        genes = rows[start:stop][rows[start:stop] >= 0]
        assert len(genes) >= 1
        assert len(set(genes.tolist())) == len(genes)
        expressed = tiny_cells.gene_ids[tiny_cells.counts[cell].indices]
        assert {vocabulary.gene_ids[row] for row in genes} <= set(expressed)


@pytest.mark.parametrize("kind", ["delete", "mask", "move"])
def test_an_edit_changes_the_cells_that_have_the_gene_or_is_refused(family, tokens, kind):
    rows = family.gene_rows(tokens)
    counts = [np.bincount(np.searchsorted(tokens.offsets, np.flatnonzero(rows == row), side="right") - 1, minlength=24)
              for row in np.unique(rows[rows >= 0])]  # fmt: skip
    at = int(np.argmin([abs(count.sum() - 12) for count in counts]))
    gene, has_it = int(np.unique(rows[rows >= 0])[at]), counts[at] > 0
    assert 0 < has_it.sum() < len(tokens)
    edit = TokenEdit(kind=kind, gene=gene)
    if kind not in family.edits:
        with pytest.raises(InvalidParameterError) as caught:
            family.edit(tokens, edit)
        assert caught.value.field == "kind"
        return
    edited = family.edit(tokens, edit)
    np.testing.assert_array_equal(edited.lengths, tokens.lengths - (has_it if kind == "delete" else 0))
    assert ((family.gene_rows(edited) == gene).sum() == 0) == (kind != "move")
    for cell in np.flatnonzero(~has_it):
        for name, array in tokens[cell].items():
            np.testing.assert_array_equal(array, edited[cell][name])


def test_cells_are_ragged_rows(tokens, family, tiny_cells):
    assert len(tokens) == len(tiny_cells) == len(list(tokens))
    assert tokens.offsets[0] == 0
    assert (tokens.lengths >= 1).all()
    assert tokens.lengths.max() == family.max_length
    assert tokens.lengths.min() < family.max_length
    for cell, length in zip(tokens, tokens.lengths, strict=True):
        assert {len(cell[name]) for name in tokens.arrays} == {length}


def test_cells_are_described(tokens, tiny_cells):
    np.testing.assert_array_equal(tokens.n_detected, tiny_cells.counts.getnnz(axis=1))
    np.testing.assert_array_equal(tokens.known_share, 1.0)
    assert (tokens.known_share.dtype, tokens.n_detected.dtype) == (np.float32, np.int32)
    assert (tokens.coverage.n_genes, tokens.coverage.n_matched) == (40, 40)


def test_a_cell_is_the_same_alone(family, tokens, tiny_cells):
    for number in range(len(tiny_cells)):
        alone = family.tokenize(tiny_cells[number : number + 1])[0]
        for name, array in alone.items():
            np.testing.assert_array_equal(array, tokens[number][name])


def test_the_order_of_columns_does_not_matter(family, tokens, tiny_cells, rng):
    order = rng.permutation(tiny_cells.n_genes)
    permuted = CountMatrix.from_matrix(tiny_cells.counts[:, order], tiny_cells.gene_ids[order])
    assert_same(family.tokenize(permuted), tokens)


def test_twice_is_the_same(family, tokens, tiny_cells):
    assert_same(family.tokenize(tiny_cells), tokens)


def test_the_input_is_read_only(family, tiny_cells):
    for array in (tiny_cells.counts.data, tiny_cells.counts.indices, tiny_cells.counts.indptr, tiny_cells.totals):
        array.setflags(write=False)
    family.tokenize(tiny_cells)


def test_no_known_gene(family):
    with pytest.raises(UnknownGenesError):
        family.tokenize(CountMatrix.from_matrix([[1, 2]], ["nothing", "known"]))


def test_a_cell_without_a_known_gene(family, tiny_cells):
    cells = CountMatrix.from_matrix([[1, 2], [0, 2]], [tiny_cells.gene_ids[0], "unknown"], first_row=10)
    with pytest.raises(EmptyCellError, match="row 11 "):
        family.tokenize(cells)


# Joining and padding


def test_joining_callers(family, tokens, tiny_cells):
    parts = [family.tokenize(tiny_cells[start:stop]) for start, stop in ((0, 1), (1, 9), (9, 24))]
    assert_same(concatenate(parts), tokens)
    assert concatenate(parts[:1]) is parts[0]


def test_padding_keeps_every_token_and_adds_nothing(family, tokens):
    rows = np.array([3, 0, 17])
    batch = pad(tokens, rows, family.inputs)
    longest = tokens.lengths[rows].max()
    assert set(batch) == {"attention_mask", *(spec.name for spec in family.inputs)}
    assert batch["attention_mask"].dtype == np.int64
    np.testing.assert_array_equal(batch["attention_mask"].sum(axis=1), tokens.lengths[rows])
    for spec in family.inputs:
        padded = batch[spec.name]
        if spec.per == "cell":
            np.testing.assert_array_equal(padded, tokens.per_cell[spec.name][rows])
            continue
        assert padded.shape == (3, longest, *spec.trailing)
        assert padded.dtype == np.dtype(spec.dtype)
        for slot, row in enumerate(rows):
            length = tokens.lengths[row]
            np.testing.assert_array_equal(padded[slot, :length], tokens[row][spec.name])
            assert (padded[slot, length:] == spec.pad_value).all()
            assert batch["attention_mask"][slot].tolist() == [1] * length + [0] * (longest - length)


def test_every_batch_of_a_plan_can_be_padded(family, tokens):
    seen = 0
    for rows in form_batches(tokens.lengths, BatchLimits(max_tokens=100)):
        batch = pad(tokens, rows, family.inputs)
        assert batch["attention_mask"].size <= 100
        seen += int(batch["attention_mask"].sum())
    assert seen == tokens.offsets[-1]


def test_padding_of_inputs_with_a_trailing_shape(tokens):
    """Made up here: a family may give several numbers a token."""
    specs = (InputSpec("ids", "int64", 7), InputSpec("values", "float32", -2.0, (2,)))
    cells = TokenizedCells(
        arrays={"ids": np.arange(3, dtype=np.int32), "values": np.arange(6, dtype=np.float64).reshape(3, 2)},
        offsets=np.array([0, 1, 3]),
        known_share=np.ones(2, np.float32),
        n_detected=np.array([1, 2], np.int32),
        coverage=tokens.coverage,
    )
    batch = pad(cells, np.array([1, 0]), specs)
    assert batch["ids"].tolist() == [[1, 2], [0, 7]]
    assert batch["values"].tolist() == [[[2, 3], [4, 5]], [[0, 1], [-2, -2]]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["values"].dtype == np.float32


def test_a_family_that_is_not_installed():
    with pytest.raises(UnsupportedBundleError, match=r"'nobody' is not installed; this version has .*rank.*Upgrade"):
        load_family("nobody", {}, GeneVocabulary.geneformer_gc30m())
