"""Re-encoding a file keeps every count, name and label."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "encode_h5ad.py"


@pytest.fixture
def original(tmp_path, rng) -> anndata.AnnData:
    counts = rng.poisson(rng.gamma(0.3, 4, size=60), size=(30, 60)).astype(np.float32)
    counts[0, 0] = 70_000  # needs more than 16 bits
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(rng.choice(["T", "B"], 30)), "total": pd.array(range(30), dtype="Int32")},
        index=[f"cell{number}" for number in range(30)],
    )
    var = pd.DataFrame({"gene_symbol": [f"S{n}" for n in range(60)], "strand": "+"}, index=[f"G{n}" for n in range(60)])
    cells = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)
    cells.write_h5ad(tmp_path / "in.h5ad")
    return cells


def test_nothing_is_lost(original, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.h5ad"
    monkeypatch.setattr(sys, "argv", ["encode", str(tmp_path / "in.h5ad"), str(out), "--source", "accession=GSE1=2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "30 x 60" in capsys.readouterr().out
    encoded = anndata.read_h5ad(out)
    assert encoded.X.dtype == np.uint32
    np.testing.assert_array_equal(encoded[:, original.var_names].X.toarray(), original.X.toarray())
    assert encoded.obs["cell_type"].tolist() == original.obs["cell_type"].tolist()
    assert encoded.obs["total"].tolist() == list(range(30))
    assert encoded.var["gene_symbol"].tolist() == ["S" + name[1:] for name in encoded.var_names]
    assert encoded.uns["source"]["accession"] == "GSE1=2"
    assert (np.diff(encoded.X.getnnz(axis=0)) <= 0).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]
