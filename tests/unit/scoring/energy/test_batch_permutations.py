"""Shared exchanges within batches are equally likely, and the same for both ways of summing distances."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import chisquare, ks_2samp

from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.energy import batch_permutations
from perturbscope.scoring.energy.batch_permutations import BatchPermutations
from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.matrix import DenseGroup
from perturbscope.scoring.energy.pool import Group, Pool
from perturbscope.scoring.results import ScoreOptions
from perturbscope.scoring.statistics import Exchange

KINDS = pytest.mark.parametrize("kind", ["dense", "linear"])


def group(kind: str, n: int, seed: int, shift: float = 0.0) -> Group:
    rows = np.random.default_rng(seed).standard_normal((n, 4)) + shift
    return DenseGroup(rows) if kind == "dense" else LinearGroup(rows, 2.0, np.zeros(4))


def test_every_exchange_within_batches_is_equally_likely_and_no_other_occurs() -> None:
    controls, of_controls, of_cells = group("dense", 6, 1), np.array([0, 0, 2, 2, 0, 5]), np.array([2, 0, 2, 7, 0])
    # Pool: cells 0 to 4, then controls. Batch 0: cells 1, 4 and controls 0, 1, 4; batch 2: cells 0, 2 and controls 2,
    # 3; batch 7 has no control, batch 5 no cell.
    both = [combinations([1, 4, 5, 6, 9], 2), combinations([0, 2, 7, 8], 2)]
    chosen = {tuple(sorted([3, *first, *second])): 0 for first, second in product(*both)}
    assert len(chosen) == 60
    labels = BatchPermutations(controls, of_controls, 6000, 3).labels(of_cells)
    members = np.concatenate([labels.a.members, labels.b.members])
    np.testing.assert_allclose(labels.rows_b, controls.row_sums @ labels.b.members, rtol=1e-6)
    np.testing.assert_allclose(labels.within_b, controls.within(controls.mark(labels.b.members)), rtol=1e-6)
    for column in members.T:
        chosen[tuple(np.flatnonzero(column).tolist())] += 1
    assert sum(chosen.values()) == 6000
    assert chisquare(list(chosen.values())).pvalue > 0.001


@KINDS
def test_the_null_is_that_of_independent_exchanges(kind: str) -> None:
    rng = np.random.default_rng(2)
    cells, controls = rng.integers(3, size=30), rng.integers(3, size=80)
    pool = Pool(group(kind, 30, 0, shift=0.5), group(kind, 80, 1), "U")
    exchange = Exchange.of(30, 80, np.concatenate([cells, controls]))
    own = np.concatenate([pool.split(members) for members in exchange.draw(2500, rng)])
    shared = pool.exchanged(BatchPermutations(pool.b, controls, 2500, 0).labels(cells))
    assert len(shared) == 2500
    assert ks_2samp(own, shared).pvalue > 0.01


def test_sums_prepared_for_many_groups_equal_direct_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    controls, batches = group("dense", 90, 1), rng.integers(4, size=90)
    groups = [rng.integers(6, size=n) for n in (5, 9, 14, 40)] + [np.full(3, 9), np.full(60, 1)]
    monkeypatch.setattr(batch_permutations, "_ROWS", 2)
    monkeypatch.setattr(BatchPermutations, "_pays", lambda *_: True)
    prepared, direct = (BatchPermutations(controls, batches, 100, 3) for _ in range(2))
    prepared.prepare(groups)
    for cells in groups:
        one, other = prepared.labels(cells), direct.labels(cells)
        np.testing.assert_array_equal(one.a.members, other.a.members)
        np.testing.assert_array_equal(one.b.members, other.b.members)
        np.testing.assert_allclose(one.within_b, other.within_b, rtol=1e-6, atol=1e-9)


def test_a_table_pays_for_many_groups_only() -> None:
    rng = np.random.default_rng(5)
    batches = rng.integers(3, size=600)
    shuffles = BatchPermutations(group("dense", 600, 1), batches, 5, 3)
    groups = [rng.integers(3, size=30) for _ in range(40)]
    shuffles.prepare(groups[:1])
    assert not shuffles._sums
    shuffles.prepare(groups)
    assert shuffles._sums


def test_p_within_batches_does_not_depend_on_other_perturbations() -> None:
    rng = np.random.default_rng(0)
    sizes = {"control": 150, **{f"p{i}": 25 for i in range(6)}}
    labels = np.repeat(list(sizes), list(sizes.values()))
    vectors = rng.normal(size=(len(labels), 5)) + 1
    batches = rng.integers(3, size=len(labels)).astype(str)
    options = ScoreOptions(permutations=40)
    every = score_perturbations(vectors, labels, control="control", batches=batches, options=options).table
    some = np.isin(labels, ["control", "p3"])
    alone = score_perturbations(vectors[some], labels[some], control="control", batches=batches[some], options=options)
    # All cells of a batch, the other perturbations' too, make the mean that is taken from its vectors.
    assert every.set_index("perturbation").loc["p3", "p"] == pytest.approx(alone.table["p"][0], abs=0.15)
    assert every.set_index("perturbation").loc["p3", "z"] == pytest.approx(alone.table["z"][0], abs=0.5)
    assert every["p"].nunique() > 2
