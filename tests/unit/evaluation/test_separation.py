"""Several embeddings of one screen side by side."""

import numpy as np
import pytest

from evaluation.baselines import log_cp10k, pca
from evaluation.separation import by_perturbation, markdown, separate
from perturbscope.counts import CountMatrix
from perturbscope.scoring import ScoreOptions


@pytest.fixture
def cells(rng):
    return CountMatrix.from_matrix(rng.poisson(3.0, (60, 30)) + np.eye(60, 30, dtype=int), [f"g{i}" for i in range(30)])


def test_log_cp10k_uses_the_totals_of_all_measured_genes():
    cells = CountMatrix.from_matrix([[1, 3], [0, 2]], ["A", "B"], totals=[10, 2])
    np.testing.assert_allclose(log_cp10k(cells).toarray(), np.log1p([[1000, 3000], [0, 10_000]]), rtol=1e-6)


def test_pca_equals_the_singular_value_decomposition_of_centred_values(cells):
    scores = pca(cells, n_components=5)
    centred = log_cp10k(cells).toarray() - log_cp10k(cells).toarray().mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs(left[:, :5] * values[:5]), atol=1e-3)


def test_pca_takes_as_many_components_as_there_are(cells):
    assert pca(cells, n_components=500).shape == (60, 29)


def test_the_embedding_that_holds_the_effect_separates_and_noise_does_not(rng):
    labels = ["control"] * 120 + ["KO"] * 40 + ["NONE"] * 40
    noise = rng.normal(size=(200, 8)).astype(np.float32)
    effect = noise.copy()
    effect[120:160] += 2.0
    result = separate(
        {"noise": noise, "effect": effect}, labels, control="control", options=ScoreOptions(permutations=99)
    )
    wide = by_perturbation(result).set_index("perturbation")
    assert wide.loc["KO", "effect"] > 20
    assert wide.drop(columns="n_cells").drop(index="KO").abs().max().max() < 5
    assert abs(wide.loc["KO", "noise"]) < 5
    summary = result.summary.set_index("model")
    assert summary.loc["effect", "q < 0.05"] == 0.5
    assert (summary["null KS p"] > 0.001).all()


def test_markdown_has_a_line_a_row(rng):
    labels = ["control"] * 60 + ["KO"] * 30
    values = rng.normal(size=(90, 4)).astype(np.float32)
    result = separate({"noise": values}, labels, control="control", options=ScoreOptions(permutations=19))
    lines = markdown(by_perturbation(result)).splitlines()
    assert lines[0] == "| perturbation | n_cells | noise |"
    assert lines[2].startswith("| KO | 30 | ")
