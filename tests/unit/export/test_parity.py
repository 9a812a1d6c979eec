"""What is compared with what: every output, without padding, over lengths and batch sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from export import ParityError
from export.parity import (
    MASK,
    check_parity,
    compare_variant,
    cosines,
    one_by_one,
    parity_batches,
    random_cells,
    torch_runner,
)
from perturbscope.families import load_family
from perturbscope.families.outputs import CELL_EMBEDDING, GENE_EMBEDDING, Outputs, OutputSpec, cell_embedding
from tests.models import small_model, small_spec, small_vocabulary

Batch = Mapping[str, np.ndarray]
GENES = OutputSpec(name=GENE_EMBEDDING, per="token", width=4, meaning="embedding")
SPECS = (cell_embedding(4), GENES)


def rank(max_length: int, *, genes: int = 60):
    return load_family("rank", {"max_length": max_length}, small_vocabulary(genes))


def constant(value: float, *, of_genes: float | None = None, of_padding: float = 0.0):
    """Outputs of one value, another one for genes, and anything at all at padding."""

    def run(batch: Batch) -> dict[str, np.ndarray]:
        mask = batch[MASK]
        genes = np.where(mask > 0, value if of_genes is None else of_genes, of_padding)[..., None]
        return {
            CELL_EMBEDDING: np.full((len(mask), 4), value, dtype=np.float32),
            GENE_EMBEDDING: np.repeat(genes, 4, axis=-1).astype(np.float32),
        }

    return run


def test_batches_cover_lengths_and_sizes() -> None:
    batches = list(parity_batches(rank(2048, genes=3000)))
    assert [batch[MASK].shape for batch in batches] == [(b, n) for n in (1, 7, 64, 2048) for b in (1, 3)]
    for batch in batches:
        ids, mask = batch["input_ids"], batch[MASK]
        lengths = mask.sum(axis=1)
        assert lengths[0] == ids.shape[1]
        assert (lengths >= 1).all()
        assert (np.diff(mask, axis=1) <= 0).all()
        assert (ids[mask == 0] == 0).all()
        assert (ids[mask == 1] >= 2).all()
    assert any((batch[MASK] == 0).any() for batch in batches)


@pytest.mark.parametrize(("longest", "expected"), [(40, {1, 7, 40}), (64, {1, 7, 60}), (1, {1}), (7, {1, 7})])
def test_lengths_beyond_the_longest_are_left_out(longest: int, expected: set[int]) -> None:
    assert {batch[MASK].shape[1] for batch in parity_batches(rank(longest))} == expected


def test_two_cells_of_4096_tokens_are_enough() -> None:
    shapes = [batch[MASK].shape for batch in parity_batches(rank(4096, genes=5000))]
    assert shapes[-2:] == [(1, 4096), (2, 4096)]


def test_random_cells_hold_each_gene_once() -> None:
    cells = random_cells(small_vocabulary(), [60, 80, 3], rng=np.random.default_rng(0))
    assert np.diff(cells.counts.indptr).tolist() == [60, 60, 3]
    assert cells.n_genes == 60


def test_the_torch_reference_pools_real_tokens_of_the_penultimate_state() -> None:
    spec = small_spec()
    run = torch_runner(spec.reference(small_model()), spec.outputs)
    ids, mask = np.array([[5, 6, 0], [7, 8, 9]]), np.array([[1, 1, 0], [1, 1, 1]])
    together = run({"input_ids": ids, MASK: mask})
    alone = run({"input_ids": ids[:1, :2], MASK: mask[:1, :2]})
    assert together[CELL_EMBEDDING].shape == (2, 32)
    np.testing.assert_allclose(together[CELL_EMBEDDING][0], alone[CELL_EMBEDDING][0], atol=1e-6)
    np.testing.assert_allclose(together[GENE_EMBEDDING][0, :2], alone[GENE_EMBEDDING][0], atol=1e-6)


def test_parity_is_measured_over_all_cases_and_outputs_without_padding() -> None:
    advanced = []
    batches = list(parity_batches(rank(20)))
    result = check_parity(
        constant(1.0),
        constant(1.25, of_genes=1.125, of_padding=np.nan),
        batches,
        outputs=SPECS,
        tolerance=0.5,
        advance=lambda: advanced.append(1),
    )
    assert result["tolerance"] == 0.5
    assert result["max_abs_difference"] == 0.25
    assert result["lowest_cosine"] == pytest.approx(1.0)
    assert result["outputs"][CELL_EMBEDDING]["max_abs_difference"] == 0.25
    assert result["outputs"][GENE_EMBEDDING]["max_abs_difference"] == 0.125
    assert len(result["cases"]) == len(advanced) == len(batches) == 6
    assert result["cases"][-1] == {"batch": 3, "length": 20, "max_abs_difference": 0.25, "lowest_cosine": 1.0}


@pytest.mark.parametrize("value", [1.002, float("nan"), float("inf")])
@pytest.mark.parametrize("name", [CELL_EMBEDDING, GENE_EMBEDDING])
def test_a_missed_tolerance_is_an_error(value: float, name: str) -> None:
    values = {"value": value, "of_genes": 1.0} if name == CELL_EMBEDDING else {"value": 1.0, "of_genes": value}
    with pytest.raises(ParityError, match=rf"^{name} of a batch of 1 x 1 tokens .* tolerance is 0\.001"):
        check_parity(constant(1.0), constant(**values), parity_batches(rank(5)), outputs=SPECS, tolerance=1e-3)


def test_one_by_one_is_without_padding() -> None:
    family, spec = rank(40), small_spec()
    tokens = family.tokenize(random_cells(small_vocabulary(), [5, 30, 1], rng=np.random.default_rng(0)))
    seen = []

    def run(batch: Batch):
        seen.append(batch[MASK].shape)
        return torch_runner(spec.reference(small_model()), spec.outputs)(batch)

    found = one_by_one(run, tokens, family, spec.outputs)
    assert seen == [(1, 5), (1, 30), (1, 1)]
    assert found[GENE_EMBEDDING].shape == (36, 32)
    with torch.inference_mode():
        states = small_model().bert(torch.tensor(tokens.arrays["input_ids"][None, 5:35]), output_hidden_states=True)
    np.testing.assert_allclose(found[GENE_EMBEDDING][5:35], states.hidden_states[-2][0], atol=1e-5)


def test_cosines() -> None:
    left = np.array([[1, 0], [1, 1], [0, 0]], dtype=np.float32)
    right = np.array([[0, 2], [2, 2], [1, 0]], dtype=np.float32)
    np.testing.assert_allclose(cosines(left, right), [0, 1, 0])


def outputs(cells: np.ndarray, genes: np.ndarray | None = None) -> Outputs:
    """Outputs of cells of one token each."""
    values = {CELL_EMBEDDING: cells, **({} if genes is None else {GENE_EMBEDDING: genes})}
    specs = (cell_embedding(cells.shape[1]), *([] if genes is None else [GENES]))
    return Outputs(specs, values, np.arange(len(cells) + 1))


def test_centred_cosine_sees_what_the_raw_one_hides() -> None:
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(50, 16)).astype(np.float32)
    shuffled = rng.permutation(cells)
    measured = compare_variant("fp16", outputs(cells + 100), outputs(shuffled + 100), min_cosine=0.99)
    assert measured["lowest_cosine"] > 0.999
    assert abs(measured["mean_centred_cosine"]) < 0.2
    same = compare_variant("fp16", outputs(cells), outputs(cells), min_cosine=0.99)
    assert same["mean_centred_cosine"] == pytest.approx(1.0)
    assert same["max_abs_difference"] == 0.0
    assert "outputs" not in same


def test_each_output_of_a_variant_has_its_own_cosine() -> None:
    cells = np.eye(4, dtype=np.float32)
    other = cells.copy()
    other[2] = [0, 3, 4, 0]
    measured = compare_variant("int8", outputs(cells, cells), outputs(cells, other), min_cosine=0.99)
    assert measured["lowest_cosine"] == 1.0
    assert measured["outputs"] == {GENE_EMBEDDING: {"lowest_cosine": pytest.approx(0.8), "max_abs_difference": 3.0}}


def test_a_variant_that_went_astray_is_an_error() -> None:
    cells = np.eye(4, dtype=np.float32)
    nothing = np.full_like(cells, np.nan)
    with pytest.raises(ParityError, match="variant int8"):
        compare_variant("int8", outputs(cells), outputs(cells[::-1].copy()), min_cosine=0.9)
    with pytest.raises(ParityError, match="nan"):
        compare_variant("int8", outputs(cells), outputs(nothing), min_cosine=0.9)
    with pytest.raises(ParityError, match="int8 gives values of gene_embedding that are not finite"):
        compare_variant("int8", outputs(cells, cells), outputs(cells, nothing), min_cosine=0.9)
