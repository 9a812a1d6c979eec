from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import perturbscope as ps
from perturbscope.analysis import pseudobulk
from perturbscope.analysis.pseudobulk import BULK_COLUMNS, pseudobulk_degs, sum_samples
from perturbscope.cells.counts import CountMatrix
from perturbscope.cli.app import run
from perturbscope.errors import ControlLabelMissingError, ProviderUnavailableError, TooFewCellsError

LABELS = np.repeat(["control", "up", "alone"], [120, 120, 20])
REPLICATES = np.concatenate([np.tile(["r1", "r2", "r3"], 80), np.full(20, "r1")])


@pytest.fixture(scope="module")
def cells() -> CountMatrix:
    rng = np.random.default_rng(0)
    rates = np.full((260, 60), 1.0)
    rates[LABELS == "up", :5] *= 3
    rates[REPLICATES == "r2"] *= rng.lognormal(0, 0.3, 60)
    return CountMatrix.from_matrix(rng.poisson(rates) + (np.arange(60) == 59), [f"g{i}" for i in range(60)])


def test_counts_are_summed_by_sample(cells: CountMatrix) -> None:
    samples = sum_samples(cells, LABELS.tolist(), REPLICATES.tolist(), min_cells=30)
    assert samples.table.to_numpy().tolist() == [[name, f"r{i}", 40] for name in ("control", "up") for i in (1, 2, 3)]
    mine = (LABELS == "up") & (REPLICATES == "r2")
    np.testing.assert_array_equal(samples.counts[4], cells.counts.toarray()[mine].sum(axis=0))


def test_which_samples_are_compared(cells: CountMatrix) -> None:
    table = sum_samples(cells, LABELS.tolist(), REPLICATES.tolist()).table
    rows, paired = pseudobulk._comparison(table, "up", "control") or (None, None)
    assert (paired, sorted(table.iloc[rows]["replicate"])) == (True, ["r1", "r1", "r2", "r2", "r3", "r3"])
    assert pseudobulk._comparison(table, "alone", "control") is None
    apart = table.assign(
        replicate=[f"{label}{unit}" for label, unit in zip(table["perturbation"], table["replicate"], strict=True)]
    )
    rows, paired = pseudobulk._comparison(apart, "up", "control") or (None, None)
    assert (paired, len(table.iloc[rows])) == (False, 6)


def test_what_is_refused(cells: CountMatrix, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, units = LABELS.tolist(), REPLICATES.tolist()
    with pytest.raises(ControlLabelMissingError):
        pseudobulk_degs(cells, labels, units, control="ctrl")
    with pytest.raises(TooFewCellsError, match="two replicates of 10 cells"):
        pseudobulk_degs(cells, labels, ["one"] * 260, control="control")
    monkeypatch.setitem(sys.modules, "pydeseq2.dds", None)
    with pytest.raises(ProviderUnavailableError, match=r"perturbscope\[pseudobulk\]"):
        pseudobulk_degs(cells, labels, units, control="control")


def test_a_file_and_the_command(cells: CountMatrix, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without pydeseq2 both say so; with it they give the same table."""
    obs = pd.DataFrame({"what": LABELS, "well": REPLICATES}, index=[f"c{i}" for i in range(260)])
    obs.loc["c0", "well"] = None
    adata = anndata.AnnData(sparse.csr_matrix(cells.counts.astype(np.float32)), obs=obs)
    adata.var_names = cells.gene_ids.tolist()
    adata.write_h5ad(tmp_path / "in.h5ad")
    command = ["pseudobulk", str(tmp_path / "in.h5ad"), str(tmp_path / "out.csv"), "--perturbation-key", "what"]
    command += ["--control", "control", "--replicate-key", "well"]
    where = {"perturbation_key": "what", "control": "control", "replicate_key": "well"}
    if importlib.util.find_spec("pydeseq2") is None:
        with pytest.raises(ProviderUnavailableError, match="pip install"):
            ps.pseudobulk(adata, **where)
        assert run(command) != 0
        assert "pip install" in capsys.readouterr().err
        assert not (tmp_path / "out.csv").exists()
        return
    assert run(command) == 0
    assert pd.read_csv(tmp_path / "out.csv")["gene"].tolist() == ps.pseudobulk(adata, **where)["gene"].tolist()


def test_replicates_show_the_genes(cells: CountMatrix) -> None:
    pytest.importorskip("pydeseq2")
    table, said = pseudobulk_degs(cells, LABELS.tolist(), REPLICATES.tolist(), control="control")
    assert tuple(table.columns) == BULK_COLUMNS
    assert set(table["perturbation"]) == {"up"}
    assert set(table["gene"][table["q"] < 0.01]) == {f"g{i}" for i in range(5)}
    assert (table["log2_fold_change"][:5] > 1).all()
    assert said == ["1 of 2 perturbations have fewer than two replicates of 10 cells and were not tested: alone."]
