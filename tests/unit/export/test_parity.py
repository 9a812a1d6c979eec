from __future__ import annotations

import numpy as np
import pytest

from export import ParityError
from export.parity import check_parity, compare_variant, cosines, pad_right, parity_batches, random_cells, torch_runner
from tests.models import small_model, small_vocabulary


def constant(value: float):
    return lambda ids, mask: np.full((len(ids), 4), value, dtype=np.float32)


def test_batches_cover_lengths_and_sizes() -> None:
    batches = list(parity_batches(small_vocabulary(), 2048))
    assert [ids.shape for ids, _ in batches] == [(b, n) for n in (1, 7, 64, 2048) for b in (1, 3)]
    for ids, mask in batches:
        lengths = mask.sum(axis=1)
        assert lengths[0] == ids.shape[1]
        assert (lengths >= 1).all()
        assert (np.diff(mask, axis=1) <= 0).all()
        assert (ids[mask == 0] == 0).all()
        assert (ids[mask == 1] >= 2).all()
    assert any((mask == 0).any() for _, mask in batches)


@pytest.mark.parametrize(("longest", "expected"), [(40, {1, 7, 40}), (64, {1, 7, 64}), (1, {1}), (7, {1, 7})])
def test_lengths_beyond_the_longest_are_left_out(longest: int, expected: set[int]) -> None:
    assert {ids.shape[1] for ids, _ in parity_batches(small_vocabulary(), longest)} == expected


def test_random_cells_hold_each_gene_once() -> None:
    (cell,) = random_cells(small_vocabulary(), [60], rng=np.random.default_rng(0))
    assert sorted(cell.tolist()) == list(range(2, 62))


def test_pad_right() -> None:
    ids, mask = pad_right([np.array([5, 6]), np.array([7, 8, 9]), np.array([4])], 0)
    assert ids.tolist() == [[5, 6, 0], [7, 8, 9], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]


def test_the_torch_reference_pools_real_tokens_of_the_penultimate_state() -> None:
    model = small_model()
    ids, mask = pad_right([np.array([5, 6]), np.array([7, 8, 9])], 0)
    together, alone = torch_runner(model)(ids, mask), torch_runner(model)(ids[:1, :2], mask[:1, :2])
    assert together.shape == (2, 32)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-6)


def test_parity_is_measured_over_all_cases() -> None:
    advanced = []
    batches = list(parity_batches(small_vocabulary(), 20))
    result = check_parity(
        constant(1.0), constant(1.25), iter(batches), tolerance=0.5, advance=lambda: advanced.append(1)
    )
    assert result["tolerance"] == 0.5
    assert result["max_abs_difference"] == 0.25
    assert result["lowest_cosine"] == pytest.approx(1.0)
    assert len(result["cases"]) == len(advanced) == len(batches) == 6
    assert result["cases"][-1] == {"batch": 3, "length": 20, "max_abs_difference": 0.25, "lowest_cosine": 1.0}


@pytest.mark.parametrize("value", [1.002, float("nan"), float("inf")])
def test_a_missed_tolerance_is_an_error(value: float) -> None:
    with pytest.raises(ParityError, match=r"tolerance is 0\.001"):
        check_parity(constant(1.0), constant(value), parity_batches(small_vocabulary(), 5), tolerance=1e-3)


def test_cosines() -> None:
    left = np.array([[1, 0], [1, 1], [0, 0]], dtype=np.float32)
    right = np.array([[0, 2], [2, 2], [1, 0]], dtype=np.float32)
    np.testing.assert_allclose(cosines(left, right), [0, 1, 0])


def test_centred_cosine_sees_what_the_raw_one_hides() -> None:
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(50, 16)).astype(np.float32)
    shuffled = rng.permutation(cells)
    measured = compare_variant("fp16", cells + 100, shuffled + 100, min_cosine=0.99)
    assert measured["lowest_cosine"] > 0.999
    assert abs(measured["mean_centred_cosine"]) < 0.2
    same = compare_variant("fp16", cells, cells, min_cosine=0.99)
    assert same["mean_centred_cosine"] == pytest.approx(1.0)
    assert same["max_abs_difference"] == 0.0


def test_a_variant_that_went_astray_is_an_error() -> None:
    cells = np.eye(4, dtype=np.float32)
    with pytest.raises(ParityError, match="variant int8"):
        compare_variant("int8", cells, cells[::-1].copy(), min_cosine=0.9)
    with pytest.raises(ParityError, match="nan"):
        compare_variant("int8", cells, np.full_like(cells, np.nan), min_cosine=0.9)
