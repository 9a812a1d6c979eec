"""Embeddings of a screen: computed once, for the right cells."""

from dataclasses import replace

import numpy as np
import pytest

from evaluation import models as module
from evaluation.models import Model, baselines, cache_key, embed, leaks
from evaluation.screens import open_screen
from evaluation.scvi import ScviEmbedding, ScviOptions
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from tests.screens import make_screen

PCA = Model("PCA-4", "pca", {"n_components": 4})


@pytest.fixture
def screen(tmp_path):
    adata = make_screen()
    adata.obs["split"] = ["train" if i % 3 else "test" for i in range(adata.n_obs)]
    adata.write_h5ad(tmp_path / "s.h5ad")
    return open_screen(tmp_path / "s.h5ad", obsm=["X_pca"])


def test_the_baselines_of_the_paper():
    assert [model.name for model in baselines()] == ["HVG-300", "PCA-200", "PCA-50"]
    named = [model.name for model in baselines(scvi=ScviOptions(max_epochs=3))]
    assert named[-2:] == ["scVI-Linear", "scVI-5L"]
    with pytest.raises(InvalidParameterError, match="not 'tsne'"):
        Model("t", "tsne")


def test_vectors_are_those_of_the_held_out_cells(screen):
    held_out = screen.held_out
    assert held_out.sum() == 41
    found = embed(Model("mine", "obsm", {"key": "X_pca"}), screen)
    np.testing.assert_array_equal(found.values, screen.obsm["X_pca"][held_out])
    whole = module.pca(screen.cells, n_components=4)
    np.testing.assert_array_equal(embed(PCA, screen).values, whole[held_out])
    assert embed(Model("many", "pca", {"n_components": 500}), screen).warnings == ["The data allow 38 components."]
    hvg = embed(Model("HVG", "hvg", {"n_genes": 300}), screen)
    assert hvg.values.shape == (41, 40)
    assert hvg.warnings == ["The screen has 40 genes; all of them were taken."]


def test_scvi_is_trained_on_the_training_split_only(screen, monkeypatch):
    asked = {}

    def fake(cells, architecture, *, train, options):
        asked.update(train=train, architecture=architecture, options=options)
        values = np.arange(len(cells), dtype=np.float32)[:, None]
        return ScviEmbedding(values, {"epochs_run": 2, "max_epochs": 2, "n_latent": 1})

    monkeypatch.setattr(module, "scvi_embedding", fake)
    model = baselines(scvi=ScviOptions(max_epochs=2, n_latent=5))[-1]
    found = embed(model, screen)
    np.testing.assert_array_equal(asked["train"], ~screen.held_out)
    assert asked["architecture"] == "5L"
    assert asked["options"] == ScviOptions(max_epochs=2, n_latent=5)
    np.testing.assert_array_equal(found.values[:, 0], np.flatnonzero(screen.held_out))
    assert found.facts["fitted_on"] == "the training split"
    assert any("cut off at 2 epochs" in text for text in found.warnings)
    assert any("half of the genes" in text for text in found.warnings)
    everything = embed(model, screen[screen.held_out])
    assert asked["train"] is None
    assert everything.facts["fitted_on"] == "all cells"


def test_a_bundle_embeds_what_its_embedder_embeds(screen, tiny_bundle):
    seen = []
    found = embed(
        Model("tiny", "bundle", {"path": str(tiny_bundle)}), screen, progress=lambda *event: seen.append(event)
    )
    there = screen[screen.held_out].cells
    expected = Embedder.from_bundle(Bundle.open(tiny_bundle)).embed(there)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-5)
    assert found.facts["model_id"] == expected.model_id
    assert seen[-1] == ("embed", 41, 41)


def test_a_bundle_that_was_trained_on_what_is_scored_is_found_out(screen, tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    training = {
        "data": {"sources": [{"name": "mine", "path": "elsewhere/s.h5ad"}]},
        "split": {"mine": {"targets": {"train": ["strong"], "validation": ["gone"], "test": ["weak"]}}},
    }
    trained = replace(bundle, manifest=replace(bundle.manifest, training=training))
    (warning,) = leaks(trained, screen)
    assert "on strong and on some of the controls" in warning
    held_out = screen[np.asarray(screen.perturbations) != "strong"]
    assert leaks(trained, held_out) == []
    assert leaks(bundle, screen) == []


def test_what_was_computed_is_used_again_for_the_same_cells_and_model_only(screen, tmp_path, monkeypatch, tiny_bundle):
    cache = tmp_path / "cache"
    first = embed(PCA, screen, cache=cache)
    monkeypatch.setattr(module, "pca", lambda *_, **__: pytest.fail("computed again"))
    again = embed(PCA, screen, cache=cache)
    np.testing.assert_array_equal(first.values, again.values)
    assert (again.facts, again.warnings) == (first.facts, first.warnings)
    bundle = Bundle.open(tiny_bundle)
    here, there = (Model("x", "bundle", {"path": path}) for path in ("here", "there"))
    assert cache_key(here, screen, bundle) == cache_key(there, screen, bundle)
    part = screen[np.arange(len(screen)) != 1]  # a training cell
    assert cache_key(here, screen, bundle) == cache_key(here, part, bundle)
    keys = {cache_key(PCA, screen), cache_key(PCA, part), cache_key(Model("y", "pca", {"n_components": 5}), screen)}
    assert len(keys) == 3


def test_a_matrix_that_was_not_read_is_named(screen):
    with pytest.raises(InvalidParameterError, match="X_scvi"):
        embed(Model("mine", "obsm", {"key": "X_scvi"}), screen)
