"""The library and the command line ask a server for outputs beside the cell embedding as they ask a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from pyarrow import feather

import perturbscope
from perturbscope.cli.app import run
from perturbscope.client import Client, GrpcClient
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embeddings import Embeddings
from tests.bundles import TINY_OUTPUTS
from tests.integration.in_process import Running, running
from tests.screens import make_screen

NAMES = [spec.name for spec in TINY_OUTPUTS[1:]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, outputs_bundle: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server"), bundle=outputs_bundle) as found:
        yield found


@pytest.fixture
def adata() -> ad.AnnData:
    return make_screen()


@pytest.fixture
def here(outputs_bundle: Path, adata: ad.AnnData) -> Embeddings:
    with perturbscope.load(outputs_bundle) as model:
        return model.embed(adata, outputs=NAMES)


@pytest.fixture(params=["http", "grpc"])
def remote(request: pytest.FixtureRequest, server: Running) -> Iterator[perturbscope.Model]:
    address = f"{request.param}://{getattr(server, request.param)}"
    with perturbscope.load(address, api_key=server.key) as model:
        yield model


def test_a_server_gives_what_a_bundle_gives(remote: perturbscope.Model, here: Embeddings, adata: ad.AnnData) -> None:
    assert isinstance(remote.backend, Client | GrpcClient)
    assert remote.outputs == TINY_OUTPUTS
    assert remote.backend.max_length == 2048
    found = remote.embed(adata, outputs=NAMES)
    np.testing.assert_allclose(found.cell_embedding, here.cell_embedding, atol=1e-6)
    for name, wanted in here.outputs.items():
        np.testing.assert_allclose(found.outputs[name].values, wanted.values, atol=1e-6)
        assert found.outputs[name].spec == wanted.spec
    assert found.outputs["gene_embedding"].genes_of(7).tolist() == here.outputs["gene_embedding"].genes_of(7).tolist()
    means = remote.gene_means(adata).sort_index()
    wanted_means = here.outputs["gene_embedding"].gene_means().sort_index()
    pd.testing.assert_frame_equal(means, wanted_means, rtol=1e-5)
    with pytest.raises(InvalidParameterError, match="no output 'gene_logits'; it has cell_embedding, gene_embedding"):
        remote.embed(adata, outputs=["gene_logits"])


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_the_command_writes_the_same_files(
    server: Running,
    here: Embeddings,
    adata: ad.AnnData,
    transport: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERTURBSCOPE_API_KEY", server.key)
    adata.write_h5ad("in.h5ad")
    address = ["--server", f"http://{server.http}"] if transport == "http" else ["--grpc", server.grpc]
    wanted = [part for name in NAMES for part in ("--output", name)]
    assert run(["embed", "in.h5ad", "out.h5ad", *address, *wanted, "--chunk-cells", "50"]) == 0, capfd.readouterr().err
    assert "out.h5ad.gene_embedding.arrow: about " in capfd.readouterr().out
    found = ad.read_h5ad("out.h5ad")
    np.testing.assert_allclose(found.obsm["X_perturbscope"], here.values, atol=1e-6)
    assert found.obs["perturbscope_class"].tolist() == here.outputs["cell_logits"].classes()[0].tolist()
    table = feather.read_table("out.h5ad.gene_embedding.arrow")
    vectors = table["gene_embedding"].combine_chunks().values.values.to_numpy().reshape(-1, 8)
    np.testing.assert_allclose(vectors, here.outputs["gene_embedding"].values, atol=1e-6)
    assert [gene for cell in table["gene_ids"].to_pylist() for gene in cell] == here.outputs[
        "gene_embedding"
    ].gene_ids.tolist()
    capfd.readouterr()
    assert run(["embed", "in.h5ad", "other.h5ad", *address, "--output", "gene_logits"]) == 2
    assert "no output 'gene_logits'" in capfd.readouterr().err
    assert not list(tmp_path.glob("other*"))
