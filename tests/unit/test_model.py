from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import perturbscope
from perturbscope import client
from perturbscope.cells import readers
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import (
    ControlLabelMissingError,
    CorruptBundleError,
    EmptyCellError,
    InvalidEmbeddingError,
    InvalidParameterError,
    MalformedMatrixError,
    MissingColumnError,
    NotRawCountsError,
    TooFewCellsError,
    TooFewControlsError,
    UnknownGenesError,
)
from perturbscope.inference.embedder import Embedder
from perturbscope.model import Model, load
from perturbscope.scoring.results import COMPARE_COLUMNS, SCORE_COLUMNS
from perturbscope.tasks import backends
from perturbscope.tasks.backends import Backend, LocalBackend
from tests.bundles import CLASSES, TINY_OUTPUTS, tiny_table
from tests.fakes import FakeEncoder
from tests.screens import make_screen

FAST = {"permutations": 40, "repeats": 2}


@pytest.fixture
def adata() -> ad.AnnData:
    return make_screen()


@pytest.fixture
def model(fake_embedder: Embedder) -> Model:
    return Model(LocalBackend(fake_embedder))


@pytest.fixture
def encoder(fake_embedder: Embedder) -> FakeEncoder:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    return fake_embedder.encoder


def test_a_loaded_bundle_embeds_anndata(tiny_bundle: Path, adata: ad.AnnData) -> None:
    with load(tiny_bundle) as model:
        values = model.embed(adata)
        assert values.dtype == np.float32
        assert values.shape == (123, 8)
        assert model.model_id.startswith("tiny-0.1-")
        alone = model.embed(adata[7:8])
    np.testing.assert_allclose(alone, values[7:8], atol=1e-6)


def test_closing_a_model_frees_its_session(tiny_bundle: Path) -> None:
    with load(tiny_bundle) as model:
        assert isinstance(model.backend, LocalBackend)
        encoder: Any = model.backend.embedder.encoder
        assert encoder._session is not None
    assert encoder._session is None


def test_each_cell_is_tokenized_once(model: Model, adata: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    tokenize = Embedder.tokenize
    monkeypatch.setattr(Embedder, "tokenize", lambda self, cells: (seen.append(len(cells)), tokenize(self, cells))[1])
    model.score(adata, perturbation_key="perturbation", control="control", **FAST)
    assert sum(seen) == 123


def test_anndata_file_source_and_matrix_give_the_same(model: Model, adata: ad.AnnData, tmp_path: Path) -> None:
    adata.write_h5ad(tmp_path / "a.h5ad")
    wanted = model.embed(adata)
    assert wanted[:, 0].tolist() == np.asarray((adata.X > 0).sum(axis=1)).ravel().tolist()  # FakeEncoder: lengths
    assert (model.embed(tmp_path / "a.h5ad") == wanted).all()
    assert (model.embed(str(tmp_path / "a.h5ad"), gene_key="ensembl") == wanted).all()
    assert (model.embed(CountMatrix.from_matrix(adata.X, list(adata.var_names))) == wanted).all()
    with readers.open_cells(tmp_path / "a.h5ad", chunk_cells=10) as source:
        assert (model.embed(source) == wanted).all()
        assert (model.embed(source) == wanted).all()


def test_embeddings_say_what_they_rest_on(model: Model, adata: ad.AnnData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "perturbscope"):
        found = model.embeddings(adata)
    assert found.coverage.n_matched == 40
    assert found.lengths.tolist() == np.asarray((adata.X > 0).sum(axis=1)).ravel().tolist()
    assert "123 of 123 cells express fewer than 500 genes" in caplog.text


@pytest.fixture
def versatile(outputs_bundle: Path) -> Iterator[Model]:
    with load(outputs_bundle) as model:
        yield model


def test_outputs_beside_the_cell_embedding(versatile: Model, adata: ad.AnnData, tmp_path: Path) -> None:
    assert versatile.outputs == TINY_OUTPUTS
    plain = versatile.embed(adata)
    assert isinstance(plain, np.ndarray)
    found = versatile.embed(adata, outputs=["gene_embedding", "cell_logits"])
    assert (found.cell_embedding == plain).all()
    vectors = found.outputs["gene_embedding"]
    vocabulary = GeneVocabulary.geneformer_gc30m()
    table = tiny_table(len(vocabulary))
    tokens = dict(zip(vocabulary.gene_ids, vocabulary.tokens, strict=True))
    for cell in (0, 77, 122):
        genes = vectors.genes_of(cell)
        assert sorted(genes) == sorted(adata.var_names[adata.X[cell].indices])
        assert (vectors.of_cell(cell) == table[[tokens[gene] for gene in genes]]).all()
    assert found.outputs["cell_logits"].spec.names == CLASSES
    names, probabilities = found.outputs["cell_logits"].classes()
    assert names.tolist() == [CLASSES[best] for best in plain[:, :3].argmax(axis=1)]
    assert (probabilities > 1 / 3).all()
    # One name will do, and files and matrices give the same.
    adata.write_h5ad(tmp_path / "a.h5ad")
    matrix = CountMatrix.from_matrix(adata.X, list(adata.var_names))
    for cells in (tmp_path / "a.h5ad", matrix):
        again = versatile.embed(cells, outputs="gene_embedding")
        assert list(again.outputs) == ["gene_embedding"]
        assert (again.outputs["gene_embedding"].values == vectors.values).all()
        assert (again.outputs["gene_embedding"].gene_ids == vectors.gene_ids).all()


def test_means_of_genes_hold_one_chunk(
    versatile: Model, adata: ad.AnnData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = versatile.embed(adata, outputs="gene_embedding").outputs["gene_embedding"].gene_means()
    n_cells = dict(zip(adata.var_names, (adata.X > 0).sum(axis=0).A1, strict=True))
    assert wanted["n_cells"].to_dict() == {gene: n for gene, n in n_cells.items() if n}
    sizes: list[int] = []
    tokenize = Embedder.tokenize
    monkeypatch.setattr(Embedder, "tokenize", lambda self, cells: (sizes.append(len(cells)), tokenize(self, cells))[1])
    monkeypatch.setattr(backends, "CHUNK_BYTES", 4 * 2048 * 8 * 50)
    adata.write_h5ad(tmp_path / "a.h5ad")
    for cells in (adata, tmp_path / "a.h5ad", CountMatrix.from_matrix(adata.X, list(adata.var_names))):
        sizes.clear()
        pd.testing.assert_frame_equal(versatile.gene_means(cells), wanted, rtol=1e-6)
        assert sizes == [50, 50, 23]
    values = versatile.gene_means(adata, output="gene_value")
    assert values.columns.tolist() == ["n_cells", "0"]


def test_outputs_that_a_model_does_not_have(
    versatile: Model, model: Model, adata: ad.AnnData, encoder: FakeEncoder
) -> None:
    with pytest.raises(InvalidParameterError, match="no output 'gene_embedding'; it has cell_embedding"):
        model.embed(adata, outputs=["gene_embedding"])
    with pytest.raises(InvalidParameterError, match="no output 'gene_embedding'"):
        model.gene_means(adata)
    with pytest.raises(InvalidParameterError, match="'cell_logits' has one row a cell, and no genes"):
        versatile.gene_means(adata, output="cell_logits")
    assert encoder.batches == []


def test_progress_counts_cells_by_stage(model: Model, adata: ad.AnnData) -> None:
    told: list[tuple[str, int, int]] = []
    model.embed(adata, progress=lambda *state: told.append(state))
    assert told[0] == ("embed", 0, 123)
    assert told[-1] == ("embed", 123, 123)


def test_score_ranks_perturbations(model: Model, adata: ad.AnnData) -> None:
    table = model.score(adata, perturbation_key="perturbation", control="control", batch_key="batch", **FAST)
    assert tuple(table.columns) == SCORE_COLUMNS
    assert table["perturbation"].tolist()[0] == "strong"
    assert table.set_index("perturbation").loc["rare", "flags"] == "too_few_cells"
    provenance = table.attrs["provenance"]
    assert provenance["model_id"] == model.model_id
    assert provenance["coverage"]["n_matched"] == 40
    assert (provenance["perturbation_key"], provenance["batch_key"]) == ("perturbation", "batch")
    assert provenance["n_cells_read"] == 123
    assert any("fewer than 20 cells" in warning for warning in table.attrs["warnings"])


def test_score_of_a_representation_needs_no_forward_pass(model: Model, adata: ad.AnnData, encoder: FakeEncoder) -> None:
    table = model.score(adata, perturbation_key="perturbation", control="control", use_rep="X_pca", **FAST)
    assert encoder.batches == []
    assert table.attrs["provenance"]["use_rep"] == "X_pca"
    assert "model_id" not in table.attrs["provenance"]


def test_score_equals_scoring_the_embeddings(model: Model, adata: ad.AnnData) -> None:
    adata.obsm["mine"] = model.embed(adata)
    options: dict[str, Any] = {"metrics": ("e_distance", "cosine_e_distance"), "seed": 3, **FAST}
    direct = model.score(adata, perturbation_key="perturbation", control="control", **options)
    taken = model.score(adata, perturbation_key="perturbation", control="control", use_rep="mine", **options)
    pd.testing.assert_frame_equal(direct, taken, check_flags=False)


def test_cells_without_a_label_are_left_out(model: Model, adata: ad.AnnData) -> None:
    whole = model.score(adata, perturbation_key="perturbation", control="control", **FAST)
    labels = adata.obs["perturbation"].astype(object)
    labels[labels == "rare"] = None
    adata.obs["perturbation"] = labels.astype("category")
    table = model.score(adata, perturbation_key="perturbation", control="control", **FAST)
    assert "3 of 123 cells have no value in obs['perturbation'] and were left out." in table.attrs["warnings"]
    assert table.attrs["provenance"]["n_cells_left_out"] == 3
    columns = ["perturbation", "n_cells", "distance", "z"]
    kept = whole[whole["perturbation"] != "rare"].reset_index(drop=True)
    pd.testing.assert_frame_equal(table[columns], kept[columns], check_flags=False)


def test_compare_gives_all_pairs_or_those_asked_for(model: Model, adata: ad.AnnData) -> None:
    table = model.compare(adata, perturbation_key="perturbation", **FAST)
    assert tuple(table.columns) == COMPARE_COLUMNS
    assert len(table) == 6
    asked = model.compare(
        adata,
        perturbation_key="perturbation",
        control="control",
        pairs=[("weak", "strong")],
        metrics="e_distance",
        **FAST,
    )
    assert asked[["a", "b"]].to_numpy().tolist() == [["weak", "strong"]]


def test_the_callers_anndata_is_not_changed(model: Model, adata: ad.AnnData) -> None:
    before = adata.copy()
    model.embed(adata)
    model.score(adata, perturbation_key="perturbation", control="control", **FAST)
    model.compare(adata, perturbation_key="perturbation", **FAST)
    assert (adata.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert list(adata.obsm) == list(before.obsm)
    assert adata.uns == before.uns


def no_known_gene_in_row_100(adata: ad.AnnData) -> None:
    dense = adata.X.toarray()
    dense[100] = 0
    dense[100, 7] = 3
    adata.X = dense
    adata.var.index = [*adata.var_names[:7], "not-a-gene", *adata.var_names[8:]]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (None, {"perturbation_key": "perturbed"}, MissingColumnError, "Did you mean 'perturbation'"),
        (None, {"control": "Control"}, ControlLabelMissingError, "'control'"),
        (None, {"control": "rare"}, TooFewControlsError, "3 cells"),
        (None, {"min_cells": 40}, TooFewCellsError, "40 cells or more"),
        (None, {"batch_key": "lane"}, MissingColumnError, "'lane'"),
        (None, {"use_rep": "X_umap"}, MissingColumnError, "'X_pca'"),
        (None, {"layer": "logged"}, NotRawCountsError, "log-transformed"),
        (None, {"layer": "negative"}, NotRawCountsError, "is negative"),
        (None, {"gene_key": "symbol"}, UnknownGenesError, "None of the 40 genes"),
        (None, {"metrics": ["mahalanobis"]}, InvalidParameterError, "mahalanobis"),
        (None, {"permutation": 10}, InvalidParameterError, "Unknown option 'permutation'"),
        (no_known_gene_in_row_100, {}, EmptyCellError, "row 100 expresses no gene"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:40],
)
def test_bad_input_costs_no_forward_pass(
    model: Model,
    adata: ad.AnnData,
    encoder: FakeEncoder,
    change: Any,
    options: dict[str, Any],
    error: Any,
    message: str,
) -> None:
    if change:
        change(adata)
    chosen = {"perturbation_key": "perturbation", "control": "control", **FAST, **options}
    with pytest.raises(error, match=message) as caught:
        model.score(adata, **chosen)
    assert caught.value.field
    assert encoder.batches == []


def test_rows_are_those_of_the_file_in_any_chunk(model: Model, adata: ad.AnnData, tmp_path: Path) -> None:
    no_known_gene_in_row_100(adata)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with (
        readers.open_cells(tmp_path / "a.h5ad", chunk_cells=9) as source,
        pytest.raises(EmptyCellError, match="row 100 expresses no gene"),
    ):
        model.embed(source)


def test_a_representation_that_is_not_finite_is_refused(model: Model, adata: ad.AnnData) -> None:
    adata.obsm["X_pca"][5, 2] = np.nan
    with pytest.raises(InvalidEmbeddingError):
        model.score(adata, perturbation_key="perturbation", control="control", use_rep="X_pca", **FAST)


def test_what_cannot_be_cells_is_refused(
    model: Model, tiny_cells: CountMatrix, adata: ad.AnnData, tmp_path: Path
) -> None:
    with pytest.raises(MalformedMatrixError, match="AnnData object is needed, not dict"):
        model.embed({"X": 1})
    with pytest.raises(InvalidParameterError, match="carries no labels"):
        model.score(tiny_cells, perturbation_key="perturbation", control="control")
    with pytest.raises(InvalidParameterError, match="neither layers nor columns"):
        model.embed(tiny_cells, layer="counts")
    adata.write_h5ad(tmp_path / "a.h5ad")
    with (
        readers.open_cells(tmp_path / "a.h5ad") as source,
        pytest.raises(InvalidParameterError, match="when the source was opened"),
    ):
        model.embed(source, layer="counts")


def test_a_screen_without_any_label_is_refused(model: Model, adata: ad.AnnData) -> None:
    adata.obs["empty"] = ""
    with pytest.raises(InvalidParameterError, match=r"No cell has a value in obs\['empty'\]"):
        model.score(adata, perturbation_key="empty", control="control")


def test_load_refuses_options_of_the_other_kind(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="a server's models"):
        load(tiny_bundle, model="tiny")
    with pytest.raises(InvalidParameterError, match="where the server is started"):
        load("http://localhost:3000", device="cuda")
    with pytest.raises(InvalidParameterError, match="scheme 'ftp'"):
        load("ftp://somewhere/bundle")
    with pytest.raises(CorruptBundleError, match=r"has no manifest\.json"):
        load(tmp_path)


def test_load_of_an_address_gives_a_client() -> None:
    with load("http://localhost:9", model="tiny") as model:
        assert isinstance(model.backend, client.Client)
    with load("grpc://localhost:9") as model:
        assert isinstance(model.backend, client.GrpcClient)
    backend: Backend = client.Client("http://localhost:9")
    backend.close()


def test_public_names_are_sorted_and_exist() -> None:
    assert list(perturbscope.__all__) == sorted(perturbscope.__all__)
    for name in perturbscope.__all__:
        assert getattr(perturbscope, name).__name__ == name
    assert set(perturbscope.__all__) <= set(dir(perturbscope))
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = perturbscope.nothing


def test_importing_the_package_and_its_front_door_is_light() -> None:
    script = (
        "import sys, perturbscope\n"
        "heavy = {'numpy', 'pandas', 'scipy', 'anndata', 'h5py', 'grpc', 'onnxruntime', 'ot', 'torch', 'typer'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "perturbscope.load, perturbscope.open_cells\n"
        "later = heavy - {'numpy', 'scipy'}\n"
        "assert not later & set(sys.modules), later & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
