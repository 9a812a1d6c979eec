"""``perturbscope map``: all pairs as one matrix, in three kinds of file and as a figure."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from perturbscope.cells.files import METADATA_KEY, write_matrix
from perturbscope.cli.app import run
from perturbscope.scoring.pair_map import distance_map
from perturbscope.scoring.results import ScoreOptions

LABELS = ["--perturbation-key", "target", "--use-rep", "X_pca"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with cells.h5ad: three targets of 25 cells."""
    rng = np.random.default_rng(0)
    target = [name for name in ("A", "B", "C") for _ in range(25)]
    adata = ad.AnnData(
        np.zeros((75, 1), dtype=np.float32), obs=pd.DataFrame({"target": target}, index=map(str, range(75)))
    )
    adata.obsm["X_pca"] = rng.standard_normal((75, 5)) + np.repeat(rng.standard_normal((3, 5)), 25, axis=0)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_kind_of_file_has_the_librarys_distances(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adata = ad.read_h5ad("cells.h5ad")
    labels = adata.obs["target"].astype(str).tolist()
    expected = distance_map(adata.obsm["X_pca"].astype(np.float32), labels, options=ScoreOptions(seed=3)).distances
    for name in ("map.parquet", "map.csv", "map.npz"):
        assert run(["map", "cells.h5ad", name, *LABELS, "--seed", "3", "--figure", "map.svg"]) == 0
    assert "3 perturbations of cells.h5ad" in capfd.readouterr().out
    table = pd.read_parquet("map.parquet")
    assert table.columns.tolist() == ["perturbation", "A", "B", "C"]
    np.testing.assert_array_equal(table.set_index("perturbation").to_numpy(), expected)
    said = json.loads(pq.read_schema("map.parquet").metadata[METADATA_KEY])
    assert (said["method"], said["use_rep"], said["seed"]) == ("exact", "X_pca", 3)
    np.testing.assert_allclose(pd.read_csv("map.csv", index_col=0).to_numpy(), expected, rtol=1e-5)
    with np.load("map.npz") as arrays:
        assert arrays["names"].tolist() == ["A", "B", "C"]
        np.testing.assert_array_equal(arrays["distances"], expected)
        assert json.loads(str(arrays["provenance"]))["n_groups"] == 3
    assert ElementTree.parse("map.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_what_is_refused_is_refused_before_cells_are_read(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["map.txt"], ".parquet or .csv or .npz"),
        (["map.npz", "--method", "landmarks", "--metric", "cosine_e_distance"], "mapped exactly in less time"),
        (["map.npz", "--method", "landmarks", "--landmarks", "1"], "from 2 to 20,000"),
        (["map.npz", "--figure", "map.png"], "must end in .svg"),
    ):
        assert run(["map", "cells.h5ad", *arguments, *LABELS]) == 2
        assert message in capfd.readouterr().err
    assert not list(folder.glob("map.*"))


def test_a_figure_of_too_many_is_left_out_with_a_word(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perturbscope.report.pairs.MAX_NAMES", 2)
    assert run(["map", "cells.h5ad", "map.npz", *LABELS, "--figure", "map.svg"]) == 0
    assert "No figure was drawn: 3 perturbations" in capfd.readouterr().err
    assert not (folder / "map.svg").exists()


def test_a_group_may_be_called_like_the_first_column(tmp_path: Path) -> None:
    write_matrix(tmp_path / "map.csv", ["a", "perturbation"], np.array([2, 2]), np.eye(2, dtype=np.float32), {})
    assert pd.read_csv(tmp_path / "map.csv").columns.tolist() == ["perturbation_", "a", "perturbation"]
