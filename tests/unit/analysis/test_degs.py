from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from perturbscope.analysis.degs import (
    GENE_COLUMNS,
    DegOptions,
    correlate_degs,
    count_degs,
    deg_null,
    deg_table,
    differential_genes,
    target_columns,
)
from perturbscope.analysis.rank_test import RankTester, log_normalized
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import (
    ControlLabelMissingError,
    InvalidParameterError,
    MalformedMatrixError,
    MissingColumnError,
    TooFewCellsError,
)


def values(n: int, rng: np.random.Generator, *, shift: float = 1.0) -> sparse.csr_matrix:
    """Log-normalised counts with many zeros and ties; column 0 is all zero, column 1 is constant."""
    rates = np.linspace(0.05, 6.0, 25) * shift
    counts = rng.poisson(rates, size=(n, 25)).astype(float)
    counts[:, 0] = 0
    counts[:, 1] = 2
    return sparse.csr_matrix(np.log1p(counts).astype(np.float32))


def test_degs_equal_a_count_by_scipy(rng: np.random.Generator) -> None:
    group, controls = values(80, rng, shift=1.5), values(200, rng)
    dense, base = group.toarray(), controls.toarray()
    tested = (np.vstack([dense, base]) > 0).mean(0) >= 0.3
    tested[[1, 7]] = False  # a constant, and the target
    p = stats.mannwhitneyu(dense, base, method="asymptotic", use_continuity=False).pvalue
    q = stats.false_discovery_control(p[tested])
    options = DegOptions(min_expressed=0.3, exchanges=False)
    found = count_degs(RankTester(controls), group, options, target=7)
    assert found.n_degs == int((q < 0.05).sum())
    assert found.n_tested == int(tested.sum())
    assert found.n_degs > 0


def test_the_target_and_small_changes_are_not_counted() -> None:
    rng = np.random.default_rng(1)
    controls = sparse.csr_matrix(np.log1p(rng.poisson(5.0, (100, 3))).astype(np.float32))
    group = sparse.csr_matrix(np.log1p(rng.poisson((5.0, 1.0, 2.5), (100, 3))).astype(np.float32))
    tester = RankTester(controls)
    everything = count_degs(tester, group, DegOptions())
    assert count_degs(tester, group, DegOptions(), target=1) == (everything.n_degs - 1, everything.n_tested - 1)
    assert count_degs(tester, group, DegOptions(exclude_target=False), target=1) == everything
    assert count_degs(tester, group, DegOptions(min_log2_fold_change=2.0)).n_degs == 1
    rare, silent = sparse.csr_matrix(np.pad(group.toarray(), ((0, 4000), (0, 0)))), sparse.csr_matrix((4000, 3))
    assert count_degs(RankTester(silent), rare, DegOptions(min_expressed=0.0)).n_degs == 3
    assert count_degs(RankTester(silent), rare, DegOptions(min_expressed=0.05)) == (0, 0)


def screen(rng: np.random.Generator) -> tuple[CountMatrix, np.ndarray]:
    """120 controls, STAT1 (its own gene down, 5 others up), IRF1 (unchanged); labels in mixed order; full totals."""
    labels = rng.permutation(np.repeat(["control", "STAT1", "IRF1"], [120, 60, 40]))
    rates = np.full((220, 30), 4.0)
    rates[labels == "STAT1", 0] = 0.4
    rates[labels == "STAT1", 10:15] *= 2
    genes = ["ENSG00000115415.20", "IRF1", *(f"gene-{i}" for i in range(28))]
    return CountMatrix.from_matrix(rng.poisson(rates) + 1, genes, totals=np.full(220, 1000.0)), labels


def test_the_table_counts_every_perturbation(rng: np.random.Generator) -> None:
    cells, labels = screen(rng)
    seen: list[tuple[str, int, int]] = []
    strict = DegOptions(alpha=1e-4)
    found = deg_table(cells, labels, control="control", options=strict, progress=lambda *args: seen.append(args))
    assert found["perturbation"].tolist() == ["IRF1", "STAT1"]
    assert found["n_cells"].tolist() == [40, 60]
    assert found["n_degs"].tolist() == [0, 5]
    assert found["n_tested"].tolist() == [29, 29]  # both labels name a gene of the panel, which is left out
    assert seen == [("degs", 1, 2), ("degs", 2, 2)]
    everything = DegOptions(alpha=1e-4, exclude_target=False)
    kept = deg_table(cells, labels, control="control", options=everything).set_index("perturbation")
    assert kept.loc["STAT1"].tolist() == [60, 6, 30, ""]
    named = deg_table(cells, labels, control="control", targets={"STAT1": 10}, options=strict).set_index("perturbation")
    assert named.loc["STAT1"].tolist() == [60, 5, 29, ""]  # its true gene counts now, the one named does not
    assert named.loc["IRF1", "n_tested"] == 30


def test_perturbations_that_did_nothing_have_no_genes() -> None:
    """Twenty cells among 300 controls, shallow: a normal p calls dozens of genes, that of exchanges none."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", "tiny", "large"], [300, 6, 120])
    counts = rng.poisson(np.geomspace(0.005, 0.3, 400), (426, 400))
    counts[:, 0] += 1  # no cell is empty
    shallow = CountMatrix.from_matrix(counts, [f"gene-{i}" for i in range(400)])
    normal = DegOptions(exchanges=False, min_expressed=0.0)
    wrong = deg_null(shallow, labels, control="control", splits=10, options=normal).set_index("n_cells")
    assert wrong.index.tolist() == [6]  # the smallest, lower quartile and median of two sizes
    assert wrong.loc[6, "median_degs"] >= 3
    right = deg_null(shallow, labels, control="control", sizes=[120, 20, 6, 200], splits=20).set_index("n_cells")
    assert right.index.tolist() == [6, 20, 120]
    assert (right["share_with_degs"] <= 0.15).all()
    assert (right["median_degs"] == 0).all()
    with pytest.raises(InvalidParameterError, match="splits"):
        deg_null(shallow, labels, control="control", splits=0)
    assert deg_null(shallow[:300], labels[:300], control="control").empty


def test_the_genes_are_named(rng: np.random.Generator) -> None:
    cells, labels = screen(rng)
    found = differential_genes(cells, labels, control="control", options=DegOptions(alpha=1e-4))
    assert tuple(found.table.columns) == GENE_COLUMNS
    stat1 = found.table[found.table["perturbation"] == "STAT1"]
    assert len(stat1) == 30
    assert stat1["p"].is_monotonic_increasing
    assert set(stat1["gene"][:6]) == {cells.gene_ids[i] for i in (0, 10, 11, 12, 13, 14)}
    target = stat1[stat1["flags"] == "target"].iloc[0]
    assert target["gene"] == cells.gene_ids[0]
    assert (target["log2_fold_change"] < -1, np.isnan(target["q"]), target["p"] < 1e-6) == (True, True, True)
    ups = stat1[stat1["q"] < 1e-4]
    assert (len(ups), (ups["statistic"] > 0).all(), (ups["log2_fold_change"] > 0.5).all()) == (5, True, True)
    values = log_normalized(cells).toarray()
    of_stat1, controls = values[labels == "STAT1"], values[labels == "control"]
    column = int(np.flatnonzero(cells.gene_ids == ups["gene"].iloc[0])[0])
    assert ups["mean"].iloc[0] == pytest.approx(np.expm1(of_stat1[:, column]).mean(), rel=1e-5)
    assert ups["expressed_control"].iloc[0] == (controls[:, column] > 0).mean()
    counted = deg_table(cells, labels, control="control", options=DegOptions(alpha=1e-4))
    pd.testing.assert_frame_equal(found.counts, counted)
    few = differential_genes(cells, labels, control="control", top=3)
    assert few.table.groupby("perturbation").size().to_dict() == {"IRF1": 3, "STAT1": 3}
    with pytest.raises(InvalidParameterError, match="top is 0"):
        differential_genes(cells, labels, control="control", top=0)


def test_q_over_the_screen(rng: np.random.Generator) -> None:
    cells, labels = screen(rng)
    each = differential_genes(cells, labels, control="control").table
    every = differential_genes(cells, labels, control="control", options=DegOptions(correction="screen")).table
    tested = every["q"].notna()
    np.testing.assert_array_equal(every["p"], each["p"])
    np.testing.assert_allclose(every["q"][tested], stats.false_discovery_control(each["p"][tested]))
    assert not np.allclose(every["q"][tested], each["q"][tested])


def test_batches_flags_and_sentences(rng: np.random.Generator) -> None:
    """A batch effect makes no gene within batches; what cannot be compared is named."""
    n = 300
    labels = np.array(["control"] * 150 + ["null"] * 100 + ["one"] + ["alone"] * 49)
    batches = np.where(rng.random(n) < np.where(labels == "control", 0.2, 0.8), "b", "a")
    batches[labels == "alone"] = "c"
    batches[np.flatnonzero(labels == "null")[:7]] = "c"
    rates = np.full((n, 40), 3.0)
    rates[batches == "b", :20] *= 3
    cells = CountMatrix.from_matrix(rng.poisson(rates) + 1, [f"g{i}" for i in range(40)], totals=np.full(n, 500.0))
    plain = deg_table(cells, labels, control="control").set_index("perturbation")
    assert plain.loc["null", "n_degs"] >= 15
    within = differential_genes(cells, labels, control="control", batches=batches)
    counts = within.counts.set_index("perturbation")
    assert counts["n_degs"].to_dict() == {"alone": 0, "null": 0, "one": 0}
    assert counts["flags"].to_dict() == {"alone": "not_tested", "null": "cells_left_out", "one": "few_cells"}
    assert counts.loc["alone", "n_tested"] == 0
    assert "alone" not in set(within.table["perturbation"])
    said = " ".join(within.warnings)
    for words in ("fewer than 3 cells, too few for ranks to show a gene: one.", "left out: null.", "alone."):
        assert words in said
    assert within.provenance["test"] == "van_elteren"
    with pytest.raises(TooFewCellsError, match="No batch holds both"):
        deg_table(cells, labels, control="control", batches=labels)
    with pytest.raises(MalformedMatrixError, match="batches"):
        deg_table(cells, labels, control="control", batches=batches[:4])
    with pytest.raises(InvalidParameterError, match="no value in batches"):
        deg_table(cells, labels, control="control", batches=["a", None] * 150)


def test_many_controls_are_sampled_by_the_seed(rng: np.random.Generator) -> None:
    cells, labels = screen(rng)
    few = DegOptions(max_controls=20)
    one, two, other = (deg_table(cells, labels, control="control", options=few, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, two)
    assert other["n_cells"].tolist() == [40, 60]


def test_target_columns_know_symbols_ids_and_plain_names() -> None:
    genes = ["ENSG00000115415.20", "IRF1", "construct-7"]
    names = ["STAT1", "ENSG00000125347", "construct-7", "JAK2", "guide_3"]
    assert target_columns(genes, names) == {"STAT1": 0, "ENSG00000125347": 1, "construct-7": 2}


def test_what_the_table_refuses(rng: np.random.Generator) -> None:
    cells, labels = screen(rng)
    with pytest.raises(ControlLabelMissingError, match="'control'"):
        deg_table(cells, labels, control="Control")
    with pytest.raises(MalformedMatrixError, match="220 cells"):
        deg_table(cells, labels[:5], control="control")
    with pytest.raises(InvalidParameterError, match="column 30; there are 30"):
        deg_table(cells, labels, control="control", targets={"STAT1": 30})


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": 1.5},
        {"correction": "all"},
        {"min_expressed": -0.1},
        {"min_log2_fold_change": -1.0},
        {"max_controls": 1},
    ],
)
def test_options_outside_their_range(values: dict[str, float]) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        DegOptions(**values)  # type: ignore[arg-type]
    assert caught.value.field in values


def test_correlation_with_scores_is_by_metric_and_leaves_out_what_was_not_scored() -> None:
    degs = pd.DataFrame({"perturbation": list("abcde"), "n_degs": [0, 1, 2, 3, 50]})
    scores = pd.DataFrame(
        {
            "perturbation": list("edcbax"),
            "metric": ["e_distance"] * 6,
            "distance": [5.0, 4.0, 3.0, 2.0, np.nan, 9.0],
            "z": [1.0, 2.0, 3.0, 4.0, np.nan, 9.0],
        }
    )
    found = correlate_degs(pd.concat([scores, scores.assign(metric="wasserstein", z=1.0)]), degs)
    assert found[["metric", "against"]].to_numpy().tolist() == [
        [metric, against] for metric in ("e_distance", "wasserstein") for against in ("distance", "z")
    ]
    assert found["n"].tolist() == [4, 4, 4, 5]
    assert found["spearman"].tolist()[:2] == pytest.approx([1.0, -1.0])
    assert found["pearson"][0] == pytest.approx(stats.pearsonr([5, 4, 3, 2], [50, 3, 2, 1]).statistic)
    assert np.isnan(found["pearson"][3])
    with pytest.raises(MissingColumnError, match="'n_degs'"):
        correlate_degs(scores, degs.drop(columns="n_degs"))
