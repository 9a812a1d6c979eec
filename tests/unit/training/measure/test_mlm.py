"""Masked genes: hits, perplexity and rank reproduction, by hand and for predictors whose scores are known."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from training.measure.mlm import GeneFrequencies, HitTally, RankTally, choose_masked, copied, judge, rank_reproduction

GENES = np.arange(2, 12)
"""Tokens 2 to 11 are genes; 0 and 1 are special."""


def tally(logits, truth, **options):
    made = HitTally(12, **options)
    made.add(judge(logits, np.asarray(truth), GENES))
    return made.summary()


def test_hits_by_hand():
    logits = np.zeros((3, 12))
    logits[0, [2, 3, 4]] = [3.0, 2.0, 1.0]  # true gene 3: second
    logits[1, [5]] = 9.0  # true gene 5: first
    logits[2, [2, 3, 4]] = [3.0, 2.0, 1.0]  # true gene 3 again, now in the first place
    logits[2, 3] = 4.0
    found = tally(logits, [3, 5, 3], hits_at=(1, 2))
    assert found["micro_hits@1"] == pytest.approx(2 / 3)
    assert found["macro_hits@1"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["micro_hits@2"] == found["macro_hits@2"] == 1.0
    assert (found["instances"], found["genes"]) == (3, 2)


def test_a_constant_predictor_has_micro_accuracy_but_no_macro_accuracy(rng):
    truth = rng.choice(GENES, size=400, p=np.array([0.55, *[0.05] * 9]))
    logits = np.tile(np.where(np.arange(12) == 2, 5.0, np.linspace(0, 1, 12)), (400, 1))
    found = tally(logits, truth)
    assert found["genes"] == 10
    assert found["macro_hits@1"] == pytest.approx(1 / 10)
    assert found["micro_hits@1"] == pytest.approx(np.mean(truth == 2))
    assert found["micro_hits@10"] == 1.0


def test_a_perfect_predictor_has_everything(rng):
    truth = rng.choice(GENES, size=50)
    found = tally(np.where(np.arange(12) == truth[:, None], 60.0, 0.0), truth)
    assert found["macro_hits@1"] == found["micro_hits@1"] == found["micro_hits@100"] == 1.0
    assert found["perplexity"] == pytest.approx(1.0)


def test_equal_logits_score_what_a_random_order_would(rng):
    truth = rng.choice(GENES, size=30)
    found = tally(np.zeros((30, 12)), truth, hits_at=(1, 4, 100))
    assert found["micro_hits@1"] == pytest.approx(1 / 10)
    assert found["macro_hits@4"] == pytest.approx(4 / 10)
    assert found["micro_hits@100"] == 1.0
    assert found["perplexity"] == pytest.approx(12)  # special tokens are in the vocabulary
    partly = np.zeros((1, 12))
    partly[0, [2, 3, 4]] = [2.0, 1.0, 1.0]
    assert tally(partly, [3], hits_at=(1, 2, 3)) | {"micro_hits@1": 0, "micro_hits@2": 0.5} == tally(
        partly, [3], hits_at=(1, 2, 3)
    )


def test_special_tokens_do_not_compete_for_hits_but_cost_perplexity():
    logits = np.zeros((1, 12))
    logits[0, 1] = 50.0
    logits[0, 7] = 1.0
    found = tally(logits, [7])
    assert found["micro_hits@1"] == 1.0
    assert found["cross_entropy"] == pytest.approx(49.0)


def test_batches_add_up(rng):
    logits, truth = rng.normal(size=(40, 12)), rng.choice(GENES, size=40)
    parts = HitTally(12)
    for rows in (slice(0, 7), slice(7, 7), slice(7, 40)):
        parts.add(judge(logits[rows], truth[rows], GENES))
    whole = tally(logits, truth)
    assert parts.summary() == pytest.approx(whole)
    assert np.log(whole["perplexity"]) == pytest.approx(
        np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(40), truth])
    )


def test_nothing_counted_is_not_a_number():
    found = HitTally(12).summary()
    assert np.isnan([found["macro_hits@1"], found["micro_hits@100"], found["perplexity"]]).all()
    assert found["instances"] == found["genes"] == 0


def test_masked_positions_are_fifteen_percent_and_never_none(rng):
    assert [len(choose_masked(n, rng)) for n in (1, 2, 10, 100, 2000)] == [1, 1, 2, 15, 300]
    positions = choose_masked(100, rng)
    assert (np.diff(positions) > 0).all()
    np.testing.assert_array_equal(
        choose_masked(50, np.random.default_rng(1)), choose_masked(50, np.random.default_rng(1))
    )
    counts = np.bincount(np.concatenate([choose_masked(20, rng) for _ in range(400)]), minlength=20)
    assert counts.min() > 30


def test_rank_reproduction_by_hand():
    truth = np.arange(10, 22)  # twelve genes
    assert rank_reproduction(truth, truth, top=100) == pytest.approx((1.0, 1.0))
    assert rank_reproduction(truth, truth[::-1], top=100) == pytest.approx((-1.0, 1.0))
    # Genes 10 and 11 swapped, 12 named twice (the first counts), 13 and 21 never.
    predicted = np.array([11, 10, 12, 12, 14, 15, 16, 17, 18, 19, 20, 99])
    positions = [1, 0, 2, 12, 4, 5, 6, 7, 8, 9, 10, 12]
    rho, coverage = rank_reproduction(truth, predicted, top=100)
    assert rho == pytest.approx(spearmanr(np.arange(12), positions).statistic)
    assert coverage == pytest.approx(10 / 12)
    rho, coverage = rank_reproduction(truth, predicted, top=10)
    assert rho == pytest.approx(spearmanr(np.arange(10), positions[:10]).statistic)
    assert coverage == pytest.approx(9 / 10)


def test_cells_without_a_correlation_are_counted_apart():
    truth = np.arange(10, 30)
    found = RankTally(tops=(10, 100))
    found.add(truth, truth)
    found.add(truth, np.full(20, 15))  # a constant prediction: one gene has a position
    found.add(truth, np.full(20, 99))  # none has
    found.add(truth[:9], truth[:9])  # too short
    summary = found.summary()
    assert summary["cells@10"] == summary["cells@100"] == 2
    assert summary["full@10"] == 3
    assert summary["full@100"] == 0
    assert summary["coverage@10"] == pytest.approx((1 + 0.1 + 0 + 1) / 4)
    assert np.isnan(RankTally().summary()["spearman@100"])


def test_a_copier_is_right_wherever_the_gene_is_shown(rng):
    truth = rng.permutation(200)
    masked = choose_masked(200, rng)
    predicted = copied(truth, masked)
    assert (predicted[masked] == -1).all()
    assert (np.delete(predicted, masked) == np.delete(truth, masked)).all()
    rho, coverage = rank_reproduction(truth, predicted, top=200)
    assert coverage == pytest.approx(0.85)
    assert 0.3 < rho < 0.9


def test_frequencies_of_genes_and_of_genes_at_a_rank():
    frequencies = GeneFrequencies(12, GENES, 4).add([[2, 3, 4], [2, 4], [5, 2, 3, 4]])
    overall = np.exp(frequencies.overall())
    assert overall.sum() == pytest.approx(1)
    assert (overall[:2] == 0).all()
    assert overall[2] == pytest.approx((3 + 1) / (9 + 10))
    table = frequencies.by_rank()
    assert table.shape == (3, 12)
    np.testing.assert_allclose(np.exp(table).sum(axis=1), 1)
    assert table[0].argmax() == 2
    assert table[2].argmax() == 4
    # Ranks 1, 2-3 and 4: of the cell 2 3 4 5 with 3 masked, the genes 2, 4 and 5 are shown and cannot be it.
    rows = frequencies.logits(np.array([2, 3, 4, 5]), np.array([1]), table)
    assert np.isinf(rows[0, [0, 1, 2, 4, 5]]).all()
    assert rows[0].argmax() == 3
    plain = frequencies.logits(np.array([2, 3, 4, 5]), np.array([1, 2]), frequencies.overall())
    assert plain.shape == (2, 12)
    assert judge(rows, np.array([3]), GENES).larger[0] == 0


def test_frequencies_are_a_constant_predictor(rng):
    cells = [rng.permutation(GENES)[:6] for _ in range(30)]
    frequencies = GeneFrequencies(12, GENES, 6).add(cells)
    made = HitTally(12, hits_at=(1,))
    for cell in cells:
        masked = choose_masked(6, rng)
        made.add(judge(frequencies.logits(cell, masked, frequencies.overall()), cell[masked], GENES))
    summary = made.summary()
    assert summary["macro_hits@1"] <= 1 / summary["genes"] + 1e-9
