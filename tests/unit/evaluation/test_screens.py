"""Screens as the evaluation reads them."""

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from evaluation.heldout import main
from evaluation.screens import open_screen
from perturbscope.errors import ControlLabelMissingError, InvalidParameterError, MissingColumnError, UnreadableFileError
from tests.screens import make_screen


@pytest.fixture
def path(tmp_path):
    adata = make_screen()
    guides = [f"{label}_{i % 2}" for i, label in enumerate(adata.obs["perturbation"])]
    adata.obs["guide"] = pd.Categorical([None, *guides[1:]])
    adata.obs["state"] = ["rest"] * 10 + ["active"] * (adata.n_obs - 10)
    adata.obs["well"] = pd.Categorical([None if i == 20 else f"w{i % 3}" for i in range(adata.n_obs)])
    adata.write_h5ad(tmp_path / "screen.h5ad")
    return tmp_path / "screen.h5ad"


def test_everything_of_a_cell_stays_together(path):
    screen = open_screen(path, batch_key="well", guide_key="guide", total_counts_key="total", obsm=["X_pca"])
    adata = make_screen()
    rows = np.delete(np.arange(adata.n_obs), 20)
    assert len(screen) == len(rows) == adata.n_obs - 1
    np.testing.assert_array_equal(screen.cells.counts.toarray(), adata.X.toarray()[rows])
    np.testing.assert_allclose(screen.cells.totals, adata.obs["total"].to_numpy()[rows])
    np.testing.assert_allclose(screen.obsm["X_pca"], adata.obsm["X_pca"][rows], rtol=1e-6)
    assert screen.perturbations == adata.obs["perturbation"].astype(str).iloc[rows].tolist()
    assert screen.batches == [f"w{i % 3}" for i in rows]
    assert screen.guides is not None
    assert screen.guides[:2] == ["unknown", "control_1"]
    assert screen.split is None
    assert screen.symbols == adata.var["symbol"].tolist()
    assert screen.provenance["left_out"] == {"without batches": 1}


def test_a_restriction_keeps_the_named_cells_only(path):
    screen = open_screen(path, keep={"state": "active", "perturbation": ["control", "strong"]})
    assert sorted(set(screen.perturbations)) == ["control", "strong"]
    assert screen.perturbations.count("control") == 50
    assert screen.provenance["left_out"] == {"state is not active": 10, "perturbation is not control or strong": 33}


def test_targets_are_the_perturbations_named_like_a_gene(path):
    screen = open_screen(path)
    named = open_screen(path, symbol_key="ensembl")
    assert screen.targets == {}
    assert named.symbols == make_screen().var["ensembl"].tolist()
    gene = named.symbols[7]
    renamed = open_screen(path)
    renamed.perturbations[-3:] = [gene] * 3
    renamed.symbols[:] = named.symbols
    assert renamed.targets == {gene: 7}


def test_subsets_and_keys(path):
    screen = open_screen(path, guide_key="guide", context_key="state", obsm=["X_pca"])
    part = screen[np.asarray(screen.contexts) == "rest"]
    assert len(part) == 10
    assert part.contexts == ["rest"] * 10
    assert part.obsm["X_pca"].shape == (10, 5)
    assert part.key() != screen.key()
    assert screen[np.arange(len(screen))].key() == screen.key()


def test_a_split_column_is_found(tmp_path):
    adata = make_screen()
    adata.obs["split"] = "test"
    adata.write_h5ad(tmp_path / "s.h5ad")
    screen = open_screen(tmp_path / "s.h5ad")
    assert set(screen.split or []) == {"test"}
    assert screen.held_out.all()


def test_cells_of_the_held_out_file_are_held_out_of_the_whole_screen(path, tmp_path):
    adata = make_screen()
    part = adata[::3].copy()
    part.obs["split"] = ["control" if label == "control" else "test" for label in part.obs["perturbation"]]
    part.write_h5ad(tmp_path / "part.h5ad")
    screen = open_screen(path, held_out=tmp_path / "part.h5ad")
    np.testing.assert_array_equal(screen.held_out, np.arange(adata.n_obs) % 3 == 0)
    assert set(screen.split or []) == {"train", "test", "control"}
    done = CliRunner().invoke(app(), [str(tmp_path / "part.h5ad"), str(tmp_path / "part.tsv.gz")])
    assert done.exit_code == 0, done.output
    assert open_screen(path, held_out=tmp_path / "part.tsv.gz").split == screen.split
    part.obs_names = [f"other{i}" for i in range(part.n_obs)]
    part.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(InvalidParameterError, match="'other0'"):
        open_screen(path, held_out=tmp_path / "other.h5ad")
    (tmp_path / "wrong.tsv").write_text("name\tpart\na\ttest\n")
    with pytest.raises(UnreadableFileError, match="cell and split are needed"):
        open_screen(path, held_out=tmp_path / "wrong.tsv")
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        open_screen(path, held_out=tmp_path / "none.tsv")


def app():
    found = typer.Typer()
    found.command()(main)
    return found


def test_mistakes_are_named(path):
    with pytest.raises(MissingColumnError, match="wel"):
        open_screen(path, batch_key="wel")
    with pytest.raises(InvalidParameterError, match=r"No cell has 'idle' in obs\['state'\]"):
        open_screen(path, keep={"state": "idle"})
    with pytest.raises(ControlLabelMissingError, match="'strong'"):
        open_screen(path, keep={"perturbation": "strong"})
    with pytest.raises(MissingColumnError, match="symbols"):
        open_screen(path, symbol_key="symbols")
    with pytest.raises(InvalidParameterError, match="No cell of"):
        open_screen(path, keep={"state": "rest", "perturbation": "weak"})
