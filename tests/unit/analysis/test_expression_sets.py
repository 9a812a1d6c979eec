from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import perturbscope as ps
from perturbscope.analysis.degs import DegOptions, DegScreen, differential_genes
from perturbscope.analysis.expression_sets import SET_COLUMNS, enrich_expression, rank_sum_z
from perturbscope.cells.counts import CountMatrix
from perturbscope.cli.app import run
from perturbscope.errors import InvalidParameterError, UnreadableFileError
from perturbscope.operations.enrich_genes import EnrichGenesAnswer, EnrichGenesRequest, enrich

LABELS = np.repeat(["control", "up", "null"], [150, 60, 50])
SETS = {"moved": [f"g{i}" for i in range(20)], "still": [f"g{i}" for i in range(40, 70)], "few": ["g1", "g2"],
        "by_another_name": ["STAT1", *(f"g{i}" for i in range(12))], "elsewhere": ["FOXP3"]}  # fmt: skip


@pytest.fixture(scope="module")
def cells() -> CountMatrix:
    rng = np.random.default_rng(0)
    rates = np.full((260, 121), 2.0)
    rates[LABELS == "up", :20] *= 1.6
    genes = [*(f"g{i}" for i in range(120)), "ENSG00000115415"]
    return CountMatrix.from_matrix(rng.poisson(rates), genes, totals=np.full(260, 500.0))


def test_the_rank_sum_equals_the_plain_test_and_widens_with_correlation(rng: np.random.Generator) -> None:
    values = np.round(rng.normal(size=60), 1)  # with ties
    members = sparse.csr_matrix((rng.random((5, 60)) < 0.3).astype(float))
    z = rank_sum_z(values, members)
    for row in range(5):
        inside = members[row].toarray().ravel() > 0
        true = stats.mannwhitneyu(values[inside], values[~inside], method="asymptotic", use_continuity=True)
        assert 2 * stats.norm.sf(abs(z[row])) == pytest.approx(true.pvalue, rel=1e-9)
    assert (np.abs(rank_sum_z(values, members, 0.1)) < np.abs(z))[z != 0].all()
    # limma's variance for 10 of 50 genes at a correlation of 0.2, by its formula.
    a, b, c = 10, 40, 0.2
    parts = np.arcsin([1.0, 0.5, c / 2, (c + 1) / 2]) @ [
        a * b,
        a * b * (b - 1),
        a * (a - 1) * b * (b - 1),
        a * (a - 1) * b,
    ]
    ten = sparse.csr_matrix(np.repeat([1.0, 0.0], [10, 40])[None])
    assert rank_sum_z(np.arange(50.0), ten, c)[0] == pytest.approx((-200 + 0.5) / np.sqrt(parts / 2 / np.pi))


def test_sets_that_move_are_found(cells: CountMatrix) -> None:
    screen = DegScreen(cells, LABELS.tolist(), control="control")
    found = enrich_expression(screen, SETS)
    assert tuple(found.table.columns) == SET_COLUMNS
    table = found.table.set_index(["perturbation", "gene_set"])
    assert sorted({name for _, name in table.index}) == ["by_another_name", "moved", "still"]
    assert "2 of 5 gene sets have fewer than 5" in " ".join(found.warnings)
    up = table.loc[("up", "moved")]
    assert (up["direction"], up["q"] < 1e-3, up["q_degs"] < 1e-3, up["n_members"]) == ("up", True, True, 20)
    assert table.loc[("up", "by_another_name"), "n_members"] == 13
    assert table.loc["null", "q"].min() > 0.05
    genes = differential_genes(cells, LABELS.tolist(), control="control").table
    degs = genes[(genes["perturbation"] == "up") & (genes["q"] < 0.05)]["gene"]
    inside = int(degs.isin(SETS["moved"]).sum())
    assert up["n_degs"] == inside
    assert up["p_degs"] == pytest.approx(stats.hypergeom.sf(inside - 1, 121, len(degs), 20))
    each = found.table[found.table["perturbation"] == "up"]
    np.testing.assert_allclose(each["q"], stats.false_discovery_control(each["p"]))
    every = DegScreen(cells, LABELS.tolist(), control="control", options=DegOptions(correction="screen"))
    over = enrich_expression(every, SETS).table
    np.testing.assert_allclose(over["q"], stats.false_discovery_control(over["p"]))


def test_every_way_gives_the_same_sets(cells: CountMatrix, tmp_path: Path) -> None:
    text = "".join("\t".join([name, "", *genes]) + "\n" for name, genes in SETS.items())
    (tmp_path / "sets.gmt").write_text(text)
    obs = pd.DataFrame({"what": LABELS, "total": 500.0}, index=[f"c{i}" for i in range(260)])
    adata = anndata.AnnData(sparse.csr_matrix(cells.counts.astype(np.float32)), obs=obs)
    adata.var_names = cells.gene_ids.tolist()
    where = {"perturbation_key": "what", "control": "control", "total_counts_key": "total"}
    true = ps.enrich_genes(adata, tmp_path / "sets.gmt", **where).table
    request = EnrichGenesRequest(cells=cells, perturbations=tuple(LABELS), control="control", gene_sets=text)
    answer = enrich(None, request)  # type: ignore[arg-type]
    assert isinstance(answer, EnrichGenesAnswer)
    assert list(answer.gene_sets) == true["gene_set"].tolist()
    np.testing.assert_array_equal(answer.p, true["p"])
    np.testing.assert_array_equal(answer.q_degs, true["q_degs"])
    adata.write_h5ad(tmp_path / "in.h5ad")
    command = ["enrich-genes", str(tmp_path / "in.h5ad"), str(tmp_path / "out.csv"), "--perturbation-key", "what"]
    command += ["--control", "control", "--total-counts-key", "total", "--top", "0"]
    assert run([*command, "--gene-sets", str(tmp_path / "sets.gmt")]) == 0
    assert pd.read_csv(tmp_path / "out.csv")["gene_set"].tolist() == true["gene_set"].tolist()
    (tmp_path / "bad.gmt").write_text("alone\n")
    assert run([*command, "--gene-sets", str(tmp_path / "bad.gmt")]) == 2


def test_what_is_refused(cells: CountMatrix) -> None:
    screen = DegScreen(cells, LABELS.tolist(), control="control")
    with pytest.raises(InvalidParameterError, match="no gene sets"):
        enrich_expression(screen, {})
    with pytest.raises(InvalidParameterError, match=r"None of the 1 gene sets has a gene that was measured.*g0, g1"):
        enrich_expression(screen, {"mouse": ["Stat99"]})
    with pytest.raises(InvalidParameterError, match="correlation is 1"):
        enrich_expression(screen, SETS, correlation=1.0)
    with pytest.raises(InvalidParameterError, match="min_members is 9"):
        enrich_expression(screen, SETS, min_members=9, max_members=3)
    request = EnrichGenesRequest(cells=cells, perturbations=tuple(LABELS), control="control", gene_sets="alone\n")
    with pytest.raises(UnreadableFileError, match="the gene sets, line 1"):
        enrich(None, request)  # type: ignore[arg-type]
    nothing = DegScreen(cells, LABELS.tolist(), control="control", options=DegOptions(min_expressed=1.0))
    assert enrich_expression(nothing, SETS).table.empty
