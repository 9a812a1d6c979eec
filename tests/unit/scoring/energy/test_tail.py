"""Tail probabilities against exact laws and against drawn exchanges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from perturbscope.scoring.distances import unit_rows
from perturbscope.scoring.energy import tail
from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.matrix import DenseGroup
from perturbscope.scoring.energy.tail import (
    Spectrum,
    Tails,
    Unreached,
    compare_with_exchanges,
    generalized_pareto,
    tail_p,
)

P = [0.9, 0.5, 0.1, 1e-3, 1e-6, 1e-9]


@pytest.mark.parametrize("df", [1, 3, 40])
def test_equal_weights_are_a_chi_square(df):
    spectrum = Spectrum(np.full(df, 0.7), np.ones(df))
    z = (chi2.isf(P, df) - df) / np.sqrt(2 * df)
    np.testing.assert_allclose(spectrum.p(z), P, rtol=0.13 if df == 1 else 0.03)
    merged = Spectrum(np.array([0.7]), np.array([float(df)]))
    np.testing.assert_allclose(merged.p(z), spectrum.p(z), rtol=1e-9)


def test_a_probability_is_never_above_one_below_the_least_or_out_of_order():
    spectrum = Spectrum(np.array([1.0, 0.5, 1e-6]), np.ones(3))
    p = spectrum.p(np.concatenate([[-np.inf, -50], np.linspace(-2, 60, 500), [1e9, np.inf]]))
    assert p[0] == p[1] == 1
    assert p[-1] == p[-2] == tail.LEAST
    assert np.all(np.diff(p) <= 0)
    assert np.isnan(spectrum.p(np.nan))
    assert np.isnan(Spectrum(np.empty(0), np.empty(0)).p(3.0))


@pytest.mark.parametrize("kind", ["distances", "rows", "wide rows"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_few_large_eigenvalues_and_sums_of_the_others_give_the_tail_of_all(rng, monkeypatch, kind, batched):
    rows = rng.normal(size=(120, 200 if kind == "wide rows" else 30)) / np.arange(1, 31 if kind != "wide rows" else 201)
    batches = rng.integers(4, size=120) if batched else None
    if batches is not None:
        rows += 3 * rng.normal(size=(4, rows.shape[1]))[batches]
    group = DenseGroup(rows) if kind == "distances" else LinearGroup(rows, 2.0, rows.mean(axis=0))
    whole = Spectrum.of(group, batches)
    # Centring within batches by hand; in one batch, the usual double centring.
    codes = np.zeros(120, dtype=int) if batches is None else batches
    centring = np.eye(120) - (codes[:, None] == codes) / np.bincount(codes)[codes]
    squared = ((rows[:, None] - rows) ** 2).sum(axis=2)
    values = np.linalg.eigvalsh(-centring @ (np.sqrt(squared) if kind == "distances" else squared) @ centring) / 120
    np.testing.assert_allclose(whole.weights[:10], values[::-1][:10], rtol=1e-4)
    monkeypatch.setattr(tail, "WHOLE", 10)
    monkeypatch.setattr(tail, "LARGEST", 12)
    few = Spectrum.of(group, batches)
    assert len(few.weights) == 13
    assert few.sd == pytest.approx(whole.sd, rel=1e-4)
    z = np.array([1.0, 3, 6, 10])
    np.testing.assert_allclose(few.p(z), whole.p(z), rtol=0.03)


def exchanged(rows, n, draws, seed=0):
    """z of the energy distance of random groups of n cells from the others."""
    rng = np.random.default_rng(seed)
    d = np.sqrt(np.maximum(((rows[:, None] - rows) ** 2).sum(axis=2), 0)).astype(np.float32)
    total, size = d.sum(dtype=np.float64), len(rows)
    members = np.zeros((draws, size), dtype=np.float32)
    np.put_along_axis(members, np.argpartition(rng.random((draws, size)), n, axis=1)[:, :n], 1, axis=1)
    inside = ((members @ d) * members).sum(axis=1, dtype=np.float64)
    reach = members @ d.sum(axis=1, dtype=np.float64)
    m = size - n
    value = 2 * (reach - inside) / (n * m) - inside / (n * (n - 1)) - (total - 2 * reach + inside) / (m * (m - 1))
    return (value - value.mean()) / value.std()


@pytest.fixture(scope="module")
def drawn():
    """Exchanges of 12 cells with 300: vectors of unit length, and the same unscaled, of which some lie far out."""
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(312, 10))
    rows[rng.random(312) < 0.05] *= 10
    unit = unit_rows(rows)
    return {name: (Spectrum.of(DenseGroup(x)), exchanged(x, 12, 40_000)) for name, x in (("unit", unit), ("raw", rows))}


def test_the_chi_square_agrees_with_exchanges_of_unit_vectors(drawn):
    spectrum, z = drawn["unit"]
    agreement = compare_with_exchanges(spectrum, z)
    assert agreement.holds
    assert agreement.draws == 40_000
    assert all(0.8 < ratio < 1.5 for ratio in agreement.ratios)
    # Beyond the levels that are compared, too.
    assert 0.5 < spectrum.p(np.quantile(z, 1 - 2e-4)) / 2e-4 < 4
    p, source = tail_p(Unreached(9.0, np.array([12]), 9.0, z), agreement, spectrum)
    assert source == "chi_square"
    assert p == spectrum.p(9.0) < 1e-5


def test_unscaled_heavy_tails_of_few_cells_trip_the_guard(drawn):
    spectrum, z = drawn["raw"]
    agreement = compare_with_exchanges(spectrum, z)
    assert not agreement.holds
    assert agreement.ratios[1] < 0.3
    # The Pareto tail of a quarter of the draws tells what share of all of them lies beyond.
    at = np.quantile(z, 1 - 1e-4)
    p, source = tail_p(Unreached(at, np.array([12]), at, z[:10_000]), agreement, spectrum)
    assert source == "pareto"
    assert 0.3e-4 < p < 5e-4
    p, source = tail_p(Unreached(at, np.array([12]), at, z[:9_999]), agreement, spectrum)
    assert source == ""
    assert np.isnan(p)


def test_too_few_exchanges_are_no_comparison(drawn):
    spectrum, z = drawn["unit"]
    assert not compare_with_exchanges(spectrum, z[:9_999]).holds
    assert not compare_with_exchanges(spectrum, np.full(20_000, np.nan)).holds


def test_the_pareto_tail_of_an_exponential_is_exponential_and_one_of_equal_values_is_nothing(rng):
    null = rng.exponential(size=20_000)
    assert generalized_pareto(12.0, null) == pytest.approx(np.exp(-12), rel=3)
    assert generalized_pareto(1.0, null) == pytest.approx(np.exp(-1), rel=0.05)
    assert generalized_pareto(1e6, null) >= tail.LEAST
    assert np.isnan(generalized_pareto(2.0, np.ones(20_000)))
    # Values with an end: p stays above 0 beyond it.
    assert generalized_pareto(1.2, rng.random(20_000)) > 0


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("heavy", [False, True])
def test_a_screen_judges_its_own_tails_by_size(rng, heavy, batched):
    rows = rng.normal(size=(400, 8))
    if heavy:
        rows[rng.random(400) < 0.05] *= 10
    batches = rng.integers(2, size=400) if batched else None
    counts = [np.array([n, n]) if batched else np.array([2 * n]) for n in (90, 6, 5)]
    null = rng.normal(size=100)
    tails = Tails(DenseGroup(rows), batches, "U", 0)
    found = tails.of([Unreached(z, count, z, null) for z, count in zip((8.0, 6.0, 9.0), counts, strict=True)])
    # Groups of 10 and 12 cells share a comparison; 180 has its own.
    assert sorted(tails.agreements) == [10, 180]
    assert tails.agreements[180].holds
    assert found[0] == (pytest.approx(tails.spectrum.p(8.0)), "chi_square")
    assert tails.agreements[10].holds is not heavy
    assert [source for _, source in found[1:]] == (["", ""] if heavy else ["chi_square"] * 2)
    again = Tails(DenseGroup(rows), batches, "U", 0)
    assert again.of([Unreached(6.0, counts[1], 6.0, null)])[0][1] == found[1][1]


def test_a_screen_of_equal_controls_has_no_tails():
    tails = Tails(DenseGroup(np.ones((20, 3))), None, "U", 0)
    ((p, source),) = tails.of([Unreached(5.0, np.array([4]), 1.0, np.zeros(10))])
    assert np.isnan(p)
    assert source == ""
