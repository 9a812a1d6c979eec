"""The scVI baselines: trained on a tiny screen, and their errors when they cannot be."""

import sys

import numpy as np
import pytest

from evaluation.scvi import ScviOptions, available, scvi_embedding
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError

OPTIONS = ScviOptions(max_epochs=2, n_latent=300, seed=3)


@pytest.fixture
def cells(rng):
    return CountMatrix.from_matrix(rng.poisson(2.0, (90, 12)) + 1, [f"g{i}" for i in range(12)])


@pytest.mark.parametrize("architecture", ["linear", "5L"])
def test_embeds_all_cells_after_training_on_some(cells, architecture, capfd):
    train = np.arange(90) < 60
    first = scvi_embedding(cells, architecture, train=train, options=OPTIONS)
    assert first.values.shape == (90, 6)
    assert np.isfinite(first.values).all()
    assert first.values.std(axis=0).max() > 0
    assert first.facts["n_latent"] == 6
    assert first.facts["n_cells_trained_on"] == 60
    assert first.facts["epochs_run"] == 2
    again = scvi_embedding(cells, architecture, train=train, options=OPTIONS)
    np.testing.assert_array_equal(first.values, again.values)
    assert "".join(capfd.readouterr()) == ""


def test_held_out_cells_do_not_change_the_model(cells):
    train = np.arange(90) < 60
    changed = CountMatrix.from_matrix(
        np.vstack([cells.counts.toarray()[:60], 50 + cells.counts.toarray()[60:]]), cells.gene_ids
    )
    before = scvi_embedding(cells, "linear", train=train, options=OPTIONS).values
    after = scvi_embedding(changed, "linear", train=train, options=OPTIONS).values
    np.testing.assert_allclose(before[:60], after[:60], rtol=1e-5)
    assert np.abs(before[60:] - after[60:]).max() > 0.01


def test_the_likelihood_is_the_zero_inflated_one(cells):
    from evaluation.scvi import _annotated, _model, _quiet

    with _quiet() as scvi:
        for architecture in ("linear", "5L"):
            model = _model(scvi, _annotated(cells), architecture, 6, OPTIONS)
            assert model.module.gene_likelihood == "zinb"
            depth = sum("Linear" in type(layer).__name__ for layer in model.module.z_encoder.encoder.modules())
            assert depth == {"linear": 1, "5L": 5}[architecture]


def test_a_missing_package_and_wrong_options_are_named(cells, monkeypatch):
    assert available()
    with pytest.raises(InvalidParameterError, match="linear, 5L"):
        scvi_embedding(cells, "deep")
    with pytest.raises(InvalidParameterError, match="50 or more"):
        scvi_embedding(cells, "5L", train=np.arange(90) < 49)
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(InvalidParameterError, match="pip install -r requirements/evaluation"):
        scvi_embedding(cells, "5L", options=OPTIONS)
