"""Preparation of published data sets, on tiny imitations of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbscope.cells.readers import open_cells
from perturbscope.errors import (
    ControlLabelMissingError,
    InvalidParameterError,
    MalformedMatrixError,
    MissingColumnError,
    NotRawCountsError,
    UnreadableFileError,
)
from tests.training_data import VOCABULARY, data_set
from training.commands import prepare as module
from training.commands.prepare import prepare

GENES = list(VOCABULARY.gene_ids)


def published(path: Path, layout: str, *, kind: str = "dense", **changes: Any) -> anndata.AnnData:
    """An imitation of a published file, and the data set that it was made from."""
    made = data_set()
    n = made.n_obs
    counts = made.X.toarray().astype(np.float32)
    counts[9] = 0
    labels = made.obs["perturbation"].astype(str).to_numpy().astype(object)
    obs = pd.DataFrame(index=made.obs_names)
    obs["UMI_count"] = counts.sum(axis=1) + 100
    symbols = [f"SYM{number}" for number in range(60)]
    if layout == "scperturb":
        labels[4] = None
        obs["perturbation"] = pd.Categorical(labels)
        obs["nperts"] = np.where(labels == "control", 0, 1)
        obs.loc[obs.index[12], "nperts"] = 2
        obs["guide_id"] = [f"g{number % 7}" for number in range(n)]
        obs["batch"] = pd.Categorical([str(number % 3) for number in range(n)])
        var = pd.DataFrame({"ensembl_id": GENES}, index=symbols)
        var.iloc[5, 0] = GENES[4]  # an id that stands twice
        var.iloc[6, 0] = None
    else:
        labels[labels == "control"] = "non-targeting"
        obs["gene"] = pd.Categorical(labels)
        obs["gem_group"] = np.arange(n) % 3 + 1
        obs["sgID_AB"] = pd.Categorical([f"g{number % 7}" for number in range(n)])
        var = pd.DataFrame({"gene_name": symbols}, index=GENES)
    for name, values in changes.items():
        obs[name] = values
    X = counts if kind == "dense" else sparse.csr_matrix(counts)
    anndata.AnnData(X=X, obs=obs, var=var).write_h5ad(path)
    if kind == "dense":
        with h5py.File(path, "r+") as file:
            attributes = dict(file["X"].attrs)
            del file["X"]
            stored = file.create_dataset("X", data=counts, chunks=(16, 7), compression="gzip")
            stored.attrs.update(attributes)
    made.X = sparse.csr_matrix(counts)
    return made


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("layout", ["scperturb", "replogle"])
def test_the_cells_are_the_same_under_our_names(
    tmp_path: Path, layout: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 10_000)
    monkeypatch.setattr(module, "_ROWS", 33)
    original = published(tmp_path / "in.h5ad", layout, kind=kind)
    seen: list[tuple[int, int]] = []
    facts = prepare(tmp_path / "in.h5ad", tmp_path / "out.h5ad", progress=lambda *what: seen.append(what))
    left_out = [4, 9, 12] if layout == "scperturb" else [9]
    at = np.setdiff1d(np.arange(130), left_out)
    expected = {"kept": len(at), "empty": 1}
    if layout == "scperturb":
        expected |= {"no_label": 1, "several_guides": 1, "genes without an id of their own": 2}
    assert facts == expected
    assert seen[-1] == (130, 130)
    assert len(seen) > 3

    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(found.X.toarray(), original.X.toarray()[at])
    assert found.obs["perturbation"].tolist() == original.obs["perturbation"].iloc[at].tolist()
    assert found.obs_names.tolist() == original.obs_names[at].tolist()
    np.testing.assert_array_equal(found.obs["total_counts"], original.X.sum(axis=1).A1[at] + 100)
    assert found.obs["batch"].nunique() == 3
    assert found.obs["guide"].nunique() == 7
    assert found.var_names.tolist() == (GENES if layout == "replogle" else [*GENES[:5], "SYM5", "SYM6", *GENES[7:]])
    assert found.var["gene_symbol"].tolist()[:2] == ["SYM0", "SYM1"]
    assert json.loads(found.uns["prepared"])["layout"] == layout
    with open_cells(tmp_path / "out.h5ad", total_counts_key="total_counts") as cells:
        assert cells.read().counts.sum() == original.X[at].sum()


def test_without_totals_the_genes_of_the_file_are_summed(tmp_path: Path) -> None:
    original = published(tmp_path / "in.h5ad", "replogle", UMI_count=3.0)
    with pytest.raises(MalformedMatrixError, match=r"Cell 0 has a total \(UMI_count\) of 3, .*--no-totals"):
        prepare(tmp_path / "in.h5ad", tmp_path / "out.h5ad")
    assert [item.name for item in tmp_path.iterdir()] == ["in.h5ad"]
    assert module.main([str(tmp_path / "in.h5ad"), str(tmp_path / "out.h5ad"), "--no-totals"]) == 0
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obs["total_counts"]
    np.testing.assert_array_equal(found, np.delete(original.X.sum(axis=1).A1, 9))


def test_a_layout_that_is_not_known_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_set().write_h5ad(tmp_path / "in.h5ad")
    prepare(tmp_path / "in.h5ad", tmp_path / "ours.h5ad")  # ours is the form of scPerturb
    published(tmp_path / "in.h5ad", "replogle")
    with pytest.raises(MissingColumnError, match="no column of obs 'perturbation'"):
        prepare(tmp_path / "in.h5ad", tmp_path / "out.h5ad", layout="scperturb")
    with pytest.raises(InvalidParameterError, match="no layout 'replogel'"):
        prepare(tmp_path / "in.h5ad", tmp_path / "out.h5ad", layout="replogel")
    adata = anndata.read_h5ad(tmp_path / "in.h5ad")
    adata.obs["gene"] = adata.obs["gene"].cat.rename_categories({"non-targeting": "NT"})
    adata.write_h5ad(tmp_path / "nt.h5ad")
    with pytest.raises(ControlLabelMissingError, match="no 'non-targeting' in 'gene'"):
        prepare(tmp_path / "nt.h5ad", tmp_path / "out.h5ad")
    assert module.main([str(tmp_path / "none.h5ad"), str(tmp_path / "out.h5ad")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_two_names_for_controls_are_an_error(tmp_path: Path) -> None:
    labels = ["control", "non-targeting"] * 65
    published(tmp_path / "in.h5ad", "replogle", gene=pd.Categorical(labels))
    with pytest.raises(InvalidParameterError, match="beside 'non-targeting'"):
        prepare(tmp_path / "in.h5ad", tmp_path / "out.h5ad")


def test_normalised_values_and_half_files_are_refused(tmp_path: Path) -> None:
    published(tmp_path / "in.h5ad", "replogle")
    with h5py.File(tmp_path / "in.h5ad", "r+") as file:
        file["X"][50, 3] = 0.5
    with pytest.raises(NotRawCountsError):
        prepare(tmp_path / "in.h5ad", tmp_path / "out.h5ad")
    whole = (tmp_path / "in.h5ad").read_bytes()
    (tmp_path / "half.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableFileError):
        prepare(tmp_path / "half.h5ad", tmp_path / "out.h5ad")
    with pytest.raises(InvalidParameterError, match="is the input"):
        prepare(tmp_path / "in.h5ad", tmp_path / "in.h5ad")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["half.h5ad", "in.h5ad"]
