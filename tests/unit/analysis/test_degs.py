from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from perturbscope.analysis.degs import (
    DegOptions,
    RankTester,
    correlate_degs,
    count_degs,
    deg_null,
    deg_table,
    log_normalized,
    target_columns,
)
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


@pytest.mark.parametrize(("n", "m"), [(40, 90), (7, 300), (2, 3), (150, 20)])
@pytest.mark.parametrize("shift", [1.0, 1.6])
def test_equals_scipy(rng: np.random.Generator, n: int, m: int, shift: float) -> None:
    group, controls = values(n, rng, shift=shift), values(m, rng)
    dense, base = group.toarray().astype(np.float64), controls.toarray().astype(np.float64)
    mine = RankTester(controls).test(group)
    reference = stats.mannwhitneyu(dense, base, method="asymptotic", use_continuity=True)
    np.testing.assert_allclose(mine.u, reference.statistic)
    defined = np.isfinite(reference.pvalue) & (np.ptp(np.vstack([dense, base]), axis=0) > 0)
    np.testing.assert_allclose(mine.p[defined], reference.pvalue[defined], rtol=1e-9)
    assert (mine.p[~defined] == 1).all()


def test_degs_equal_a_count_by_scipy(rng: np.random.Generator) -> None:
    group, controls = values(80, rng, shift=1.5), values(200, rng)
    dense, base = group.toarray(), controls.toarray()
    tested = np.maximum((dense > 0).mean(0), (base > 0).mean(0)) >= 0.3
    tested[7] = False
    q = stats.false_discovery_control(stats.mannwhitneyu(dense, base, method="asymptotic").pvalue[tested])
    found = count_degs(RankTester(controls), group, DegOptions(min_expressed=0.3), target=7)
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
    assert count_degs(RankTester(silent), rare, DegOptions()) == (0, 0)


def test_normalisation_uses_the_totals_given() -> None:
    cells = CountMatrix.from_matrix(np.array([[1, 3], [0, 5]]), ["A", "B"], totals=[100.0, 10.0])
    expected = np.log1p([[100.0, 300.0], [0.0, 5000.0]])
    np.testing.assert_allclose(log_normalized(cells).toarray(), expected, rtol=1e-6)


def test_empty_groups_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(TooFewCellsError, match="no control cells"):
        RankTester(values(0, rng))
    with pytest.raises(TooFewCellsError, match="without cells"):
        RankTester(values(5, rng)).test(values(0, rng))


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
    assert kept.loc["STAT1"].tolist() == [60, 6, 30]
    named = deg_table(cells, labels, control="control", targets={"STAT1": 10}, options=strict).set_index("perturbation")
    assert named.loc["STAT1"].tolist() == [60, 5, 29]  # its true gene counts now, the one named does not
    assert named.loc["IRF1", "n_tested"] == 30


def test_the_null_shows_where_counts_are_wrong() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", "tiny", "large"], [300, 6, 120])
    counts = rng.poisson(np.geomspace(0.005, 0.3, 400), (426, 400))
    counts[:, 0] += 1  # no cell is empty
    shallow = CountMatrix.from_matrix(counts, [f"gene-{i}" for i in range(400)])
    found = deg_null(shallow, labels, control="control", splits=10).set_index("n_cells")
    assert found.index.tolist() == [6]  # the smallest, lower quartile and median of two sizes
    assert found.loc[6, "median_degs"] > 5
    assert found.loc[6, "share_with_degs"] == 1
    both = deg_null(shallow, labels, control="control", sizes=[120, 6, 200], splits=10).set_index("n_cells")
    assert both.index.tolist() == [6, 120]
    assert both.loc[120, "share_with_degs"] <= 0.3
    with pytest.raises(InvalidParameterError, match="splits"):
        deg_null(shallow, labels, control="control", splits=0)
    assert deg_null(shallow[:300], labels[:300], control="control").empty


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
    "values", [{"alpha": 1.5}, {"min_expressed": -0.1}, {"min_log2_fold_change": -1.0}, {"max_controls": 1}]
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
