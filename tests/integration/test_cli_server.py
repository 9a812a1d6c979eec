"""The same commands, in this process and through a running server over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbscope.cli.app import run
from tests.integration.server import RunningServer
from tests.screens import make_screen

SCORE = [
    *("--perturbation-key", "perturbation", "--permutations", "30", "--set", "repeats=2"),
    *("--metric", "e_distance", "--metric", "cosine_e_distance", "--batch-key", "batch"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("server"), bundle=tiny_bundle) as running:
        yield running


@pytest.fixture
def sources(
    tmp_path: Path, server: RunningServer, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[str]]:
    make_screen().write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERTURBSCOPE_BUNDLE", raising=False)
    return {
        "here": ["--bundle", str(tiny_bundle)],
        "http": ["--server", server.url],
        "grpc": ["--grpc", server.target],
    }


def test_embed_gives_the_same_vectors(sources: dict[str, list[str]], tmp_path: Path) -> None:
    found = {}
    for name, options in sources.items():
        assert run(["embed", "in.h5ad", f"{name}.h5ad", "--total-counts-key", "total", *options]) == 0
        found[name] = ad.read_h5ad(tmp_path / f"{name}.h5ad")
    for name in ("http", "grpc"):
        np.testing.assert_allclose(found[name].obsm["X_perturbscope"], found["here"].obsm["X_perturbscope"], atol=1e-6)
        assert found[name].obs.equals(found["here"].obs)
        assert found[name].uns["perturbscope"]["model_id"] == found["here"].uns["perturbscope"]["model_id"]
        assert found[name].uns["perturbscope"]["coverage"]["n_matched"] == 40


@pytest.mark.parametrize("command", [["score", "--control", "control"], ["compare"]], ids=["score", "compare"])
@pytest.mark.parametrize("given", [[], ["--use-rep", "X_pca"]], ids=["cells", "embeddings"])
def test_tables_are_the_same(
    sources: dict[str, list[str]], tmp_path: Path, command: list[str], given: list[str]
) -> None:
    tables = {}
    for name, options in sources.items():
        assert run([command[0], "in.h5ad", f"{name}.parquet", *command[1:], *SCORE, *given, *options]) == 0
        tables[name] = pd.read_parquet(tmp_path / f"{name}.parquet")
    for name in ("http", "grpc"):
        pd.testing.assert_frame_equal(tables[name], tables["here"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["here", "http", "grpc"])
@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--layer", "logged"], "not_raw_counts"),
        (["--gene-key", "symbol"], "unknown_genes"),
        (["--gene-key", "one"], "duplicate_genes"),
    ],
    ids=["log-normalised", "unknown genes", "duplicate genes"],
)
def test_errors_are_the_same(
    sources: dict[str, list[str]], capfd: pytest.CaptureFixture[str], where: str, options: list[str], code: str
) -> None:
    assert run(["embed", "in.h5ad", "out.h5ad", *options, *sources[where]]) == 2
    assert capfd.readouterr().err.startswith(f"Error [{code}]: ")


@pytest.mark.parametrize("where", ["http", "grpc"])
def test_an_unknown_model_is_the_callers_fault(
    sources: dict[str, list[str]], capfd: pytest.CaptureFixture[str], where: str
) -> None:
    assert run(["embed", "in.h5ad", "out.h5ad", "--model", "other", *sources[where]]) == 2
    assert capfd.readouterr().err.startswith("Error [unknown_model]: ")
