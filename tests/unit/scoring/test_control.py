"""Scores of perturbations: formulas, calibration, real anchors, and what happens to degenerate input."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest

from perturbscope.errors import (
    ControlLabelMissingError,
    InvalidEmbeddingError,
    InvalidParameterError,
    MalformedMatrixError,
    TooFewCellsError,
    TooFewControlsError,
)
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.distances import e_distance, unit_rows
from perturbscope.scoring.results import FLAGS, SCORE_COLUMNS, ScoreOptions
from perturbscope.scoring.statistics import benjamini_hochberg, correlation

FAST = ScoreOptions(permutations=99)


def screen(rng, sizes, shifts=None, width=6):
    """Vectors and labels of groups that differ from "control" by a shift of the mean."""
    labels = np.repeat(list(sizes), list(sizes.values()))
    vectors = rng.normal(size=(len(labels), width)) + 1
    for name, shift in (shifts or {}).items():
        vectors[labels == name, 0] += shift
    return vectors.astype(np.float32), labels


def row(result, name, metric="e_distance"):
    table = result.table
    return table[(table["perturbation"] == name) & (table["metric"] == metric)].iloc[0]


def flags(result, name, metric="e_distance"):
    return set(filter(None, row(result, name, metric)["flags"].split(";")))


@pytest.fixture(scope="module")
def jurkat(data_dir):
    """Principal components of all Jurkat cells; guides of the stimulated ones."""
    data = anndata.read_h5ad(data_dir / "datlinger_jurkat_cropseq.h5ad")
    depth = data.obs["total_umi_full_transcriptome"].to_numpy(float)
    values = np.log1p(data.X.toarray() / depth[:, None] * 1e4)
    values -= values.mean(axis=0)
    _, vectors = np.linalg.eigh(values.T @ values)
    stimulated = (data.obs["stimulation"] == "stimulated").to_numpy()
    obs = data.obs[stimulated]
    return (values @ vectors[:, :-51:-1])[stimulated], obs["guide"].to_numpy(str), obs["batch"].to_numpy(str)


def test_table_holds_what_was_computed(rng):
    vectors, labels = screen(rng, {"control": 60, "a": 25, "b": 40}, {"b": 2})
    result = score_perturbations(vectors, labels, control="control", options=FAST)
    assert tuple(result.table.columns) == SCORE_COLUMNS
    assert list(result.table["perturbation"]) == ["b", "a"]
    found = row(result, "b")
    assert (found["n_cells"], found["n_used"], found["n_controls"]) == (40, 40, 60)
    unit = unit_rows(vectors)
    expected = e_distance(unit[labels == "b"], unit[labels == "control"])
    assert found["distance"] == pytest.approx(expected, rel=1e-5)
    assert found["z"] == pytest.approx((found["distance"] - found["null_mean"]) / found["null_sd"])
    assert (found["p"], found["p_source"], found["exchanges"]) == (0.01, "exchanges", 99)
    assert row(result, "a")["p"] > 0.05
    assert (row(result, "a")["p_source"], row(result, "a")["exchanges"] < 99) == ("sequential", True)
    assert list(result.table["q"]) == list(benjamini_hochberg(result.table["p"]))
    json.dumps(result.provenance)
    assert result.provenance["seed"] == 0
    assert result.provenance["options"] == FAST.to_dict()


@pytest.mark.parametrize("metric", ["e_distance", "cosine_e_distance", "wasserstein"])
@pytest.mark.parametrize("estimator", ["U", "V"])
def test_every_metric_finds_the_shifted_group(rng, metric, estimator):
    vectors, labels = screen(rng, {"control": 90, "same": 30, "moved": 30}, {"moved": 4})
    options = ScoreOptions(metrics=(metric,), estimator=estimator, permutations=99, wasserstein_permutations=39)
    result = score_perturbations(vectors, labels, control="control", options=options)
    assert row(result, "moved", metric)["z"] > 5
    assert row(result, "moved", metric)["q"] < 0.06
    assert abs(row(result, "same", metric)["z"]) < 4
    if estimator == "V" or metric == "wasserstein":
        assert row(result, "same", metric)["null_mean"] > 0


def test_same_seed_same_numbers_and_other_labels_do_not_matter(rng):
    vectors, labels = screen(rng, {"control": 60, "a": 25, "b": 40})
    first = score_perturbations(vectors, labels, control="control", options=FAST)
    again = score_perturbations(vectors, labels, control="control", options=FAST)
    assert first.table.equals(again.table)
    without = labels != "b"
    alone = score_perturbations(vectors[without], labels[without], control="control", options=FAST)
    assert row(alone, "a")[["distance", "z", "p"]].tolist() == pytest.approx(
        row(first, "a")[["distance", "z", "p"]].tolist(), rel=1e-4
    )
    other = score_perturbations(vectors, labels, control="control", options=ScoreOptions(permutations=99, seed=1))
    assert row(other, "a")[["distance", "z"]].tolist() == row(first, "a")[["distance", "z"]].tolist()
    assert row(other, "a")["p"] != row(first, "a")["p"]


def test_normalized_scores_ignore_the_length_of_vectors(rng):
    vectors, labels = screen(rng, {"control": 40, "a": 40})
    scaled = vectors * rng.uniform(0.5, 20, size=(80, 1)).astype(np.float32)
    one, two = (score_perturbations(v, labels, control="control", options=FAST).table for v in (vectors, scaled))
    assert one["z"][0] == pytest.approx(two["z"][0], abs=0.01)
    raw = ScoreOptions(permutations=99, normalize=False)
    assert score_perturbations(scaled, labels, control="control", options=raw).table["distance"][0] != pytest.approx(
        one["distance"][0], rel=0.1
    )


def test_input_is_left_alone(rng):
    vectors, labels = screen(rng, {"control": 40, "a": 40})
    before = vectors.copy()
    score_perturbations(vectors, labels, control="control", options=FAST)
    np.testing.assert_array_equal(vectors, before)


@pytest.mark.parametrize("estimator", ["U", "V"])
def test_z_of_untouched_groups_has_mean_0_and_sd_1(rng, estimator):
    sizes = {"control": 700, **{f"p{i}": int(n) for i, n in enumerate(rng.integers(20, 120, size=150))}}
    vectors, labels = screen(rng, sizes, width=4)
    options = ScoreOptions(permutations=1, estimator=estimator)
    z = score_perturbations(vectors, labels, control="control", options=options).table["z"]
    # The same controls meet all groups, so that the z's share a small part.
    assert abs(z.mean()) < 0.35
    assert 0.8 < z.std() < 1.25


@pytest.mark.parametrize("repeats", [1, 2, 10])
def test_exchanges_of_wasserstein_fit_untouched_groups(rng, repeats):
    # A quarter as many cells as controls: groups of controls alone would make the sd of z 1.5.
    sizes = {"control": 100, **{f"p{i}": 25 for i in range(200)}}
    vectors, labels = screen(rng, sizes, width=4)
    batches = np.array([f"{i % 2}" for i in range(len(labels))])
    options = ScoreOptions(metrics=("wasserstein",), wasserstein_permutations=39, repeats=repeats)
    for shifted, given in ((vectors, None), (vectors + 5.0 * (batches == "1")[:, None], batches)):
        found = score_perturbations(shifted, labels, control="control", batches=given, options=options).table
        assert abs(found["z"].mean()) < 0.5  # the same controls meet all groups
        assert 0.8 < found["z"].std() < 1.25
        assert 0.01 < (found["p"] <= 0.05).mean() < 0.1
        # z is of more samples than p, but both rank the perturbations alike.
        assert correlation(found["z"], found["p"]).spearman < -0.6


def test_fixed_null_is_biased_by_size_and_says_so(rng):
    vectors, labels = screen(rng, {"control": 700, "a": 50, "b": 60}, width=20)
    paper = ScoreOptions(estimator="V", null="fixed", null_size=300, repeats=1, permutations=99)
    result = score_perturbations(vectors, labels, control="control", options=paper)
    assert (result.table["z"] > 8).all()
    assert any("fixed at 300" in text for text in result.warnings)
    matched = ScoreOptions(estimator="V", repeats=1, permutations=99)
    assert (score_perturbations(vectors, labels, control="control", options=matched).table["z"].abs() < 4).all()
    with pytest.raises(TooFewControlsError, match="300"):
        score_perturbations(vectors[150:], labels[150:], control="control", options=paper)


def test_jurkat_anchor_values(jurkat):
    components, guides, _ = jurkat
    assert (guides == "control").sum() == 140
    controls = components[guides == "control"]
    found = {name: e_distance(components[guides == name], controls) for name in np.unique(guides) if name != "control"}
    ranked = sorted(found, key=found.__getitem__, reverse=True)
    assert ranked[:6] == ["ZAP70_2", "LAT_2", "LCK_1", "PTPN6_1", "LCK_2", "PTPN11_1"]
    anchors = {"ZAP70_2": 1.04, "LAT_2": 0.53, "LCK_1": 0.48, "PTPN6_1": 0.45, "LCK_2": 0.42, "PTPN11_1": 0.33}
    for name, value in anchors.items():
        assert found[name] == pytest.approx(value, abs=0.006)  # printed to two decimals
    assert found["NR4A1_2"] == pytest.approx(-0.017, abs=0.002)
    assert found["NFKB1_1"] == pytest.approx(-0.014, abs=0.002)


def test_jurkat_screen(jurkat):
    components, guides, _ = jurkat
    options = ScoreOptions(normalize=False, permutations=500)
    result = score_perturbations(components, guides, control="control", options=options)
    assert len(result.table) == 40
    assert result.table["perturbation"][0] == "ZAP70_2"
    assert 27 <= (result.table["q"] < 0.05).sum() <= 34  # 31 were measured with other draws
    summary = result.summary()
    assert summary["n"][0] == 40
    assert summary["median_z"][0] == pytest.approx(result.table["z"].median())
    assert summary["skewness_z"][0] > 1


def test_batches_hold_the_exchanges(rng):
    """A batch effect alone: seen without batches, gone within them."""
    vectors, labels = screen(rng, {"control": 120, "a": 60})
    batches = np.array(["one"] * 100 + ["two"] * 20 + ["one"] * 10 + ["two"] * 50)
    vectors[batches == "two", 1] += 2
    assert row(score_perturbations(vectors, labels, control="control", options=FAST), "a")["p"] == 0.01
    within = score_perturbations(vectors, labels, control="control", batches=batches, options=FAST)
    assert row(within, "a")["p"] > 0.05
    assert abs(row(within, "a")["z"]) < 3
    assert within.provenance["batches"] == 2


def test_rows_labels_and_batches_may_be_permuted_and_renamed(rng):
    """Numbers are those of the cells, to the last bit: sampled, in batches, of any metric and type of float."""
    vectors, labels = screen(rng, {"control": 90, "a": 30, "b": 70}, {"b": 1})
    batches = rng.integers(3, size=190).astype(str)
    options = ScoreOptions(metrics=("e_distance", "cosine_e_distance"), permutations=500, max_cells=60)
    first = score_perturbations(vectors, labels, control="control", batches=batches, options=options).table
    order = rng.permutation(190)
    renamed = np.array([{"control": "nt", "a": "zz", "b": "0"}[name] for name in labels])[order]
    other = score_perturbations(
        vectors[order].astype(np.float64),
        renamed,
        control="nt",
        batches=np.array([{"0": "x", "1": "c", "2": "b"}[name] for name in batches])[order],
        options=options,
    ).table
    other["perturbation"] = other["perturbation"].map({"zz": "a", "0": "b"})
    pd.testing.assert_frame_equal(first, other, check_exact=True)


def test_an_unequal_share_of_batches_is_no_effect_and_hides_none(rng):
    """Six batches, a perturbation for the most part in one of them: z and p as without batch effects."""
    of_batches = rng.normal(size=(6, 10))
    of_batches *= 2 / np.linalg.norm(of_batches, axis=1, keepdims=True)
    labels = np.repeat(["control", *(f"p{i}" for i in range(30))], [300, *[60] * 30])
    shares = rng.dirichlet(np.full(6, 0.3), size=30)
    batches = np.concatenate([rng.integers(6, size=300), *(rng.choice(6, 60, p=share) for share in shares)])
    plain = rng.normal(size=(len(labels), 10))
    plain[labels == "p0", 0] += 1
    options = ScoreOptions(normalize=False, permutations=400)
    tables = [
        score_perturbations(
            values, labels, control="control", batches=batches.astype(str), options=options
        ).table.set_index("perturbation")
        for values in (plain, plain + of_batches[batches])
    ]
    names = [f"p{i}" for i in range(30)]
    np.testing.assert_allclose(tables[0].loc[names, "z"], tables[1].loc[names, "z"], atol=1e-3)
    null = tables[1].drop("p0")
    assert tables[1].index[0] == "p0"
    assert abs(null["z"].mean()) < 0.6
    assert null["z"].std() < 1.6
    assert (null["p"] < 0.05).mean() < 0.2


def test_an_offset_is_no_constant(rng):
    vectors, labels = screen(rng, {"control": 30, "a": 30}, {"a": 3})
    far = vectors.astype(np.float64) + 1e7
    options = ScoreOptions(permutations=99, normalize=False)
    near, moved = (score_perturbations(v, labels, control="control", options=options).table for v in (vectors, far))
    assert moved["flags"][0] == ""
    assert moved["z"][0] == pytest.approx(near["z"][0], rel=1e-3)


def test_holm_finds_what_bonferroni_does_and_more(rng):
    vectors, labels = screen(rng, {"control": 60, "a": 30, "b": 30, "c": 30}, {"a": 3, "b": 0.5})
    found = {
        name: score_perturbations(
            vectors, labels, control="control", options=ScoreOptions(permutations=400, correction=name)
        ).table
        for name in ("holm", "bonferroni")
    }
    p = np.sort(found["holm"]["p"])
    np.testing.assert_allclose(np.sort(found["holm"]["q"]), np.minimum(np.maximum.accumulate(p * [3, 2, 1]), 1))
    assert (found["holm"]["q"] <= found["bonferroni"]["q"]).all()


def test_scaling_about_the_mean_keeps_effects_along_it_and_scaling_away_is_announced(rng):
    vectors, labels = screen(rng, {"control": 200, "a": 60}, {"a": 0.7})
    vectors[:, 0] += 3  # the mean, along which a is shifted
    options = ScoreOptions(permutations=400)
    away = score_perturbations(vectors, labels, control="control", options=options)
    about = score_perturbations(vectors, labels, control="control", options=replace(options, centre=True))
    assert about.table["z"][0] > away.table["z"][0] + 1
    assert any("is one of their lengths" in text for text in away.warnings)
    assert not any("is one of their lengths" in text for text in about.warnings)
    batches = np.repeat("x", 260)
    one = score_perturbations(
        vectors, labels, control="control", batches=batches, options=replace(options, centre=True)
    )
    assert one.table["z"][0] == about.table["z"][0]
    assert any("in one batch" in text for text in one.warnings)


@pytest.mark.parametrize("batched", [False, True], ids=["", "batches"])
def test_an_omnibus_sees_what_energy_does_not_at_the_price_of_one_test(rng, batched):
    sizes = {"control": 300, "wide": 60, "moved": 60, **{f"p{i}": 40 for i in range(40)}}
    vectors, labels = screen(rng, sizes, {"moved": 3}, width=8)
    vectors *= np.array([4, 3, 2, 1, 1, 1, 1, 0.3])
    vectors[labels == "wide", 7] *= 3  # along the narrowest axis
    batches = rng.integers(3, size=len(labels)).astype(str) if batched else None
    if batches is not None:
        vectors[batches == "1"] += 5
    options = ScoreOptions(permutations=199, normalize=False, omnibus=True)
    result = score_perturbations(vectors, labels, control="control", batches=batches, options=options)
    table = result.table.set_index("perturbation")
    assert table.loc["wide", "p"] > 0.02
    assert table.loc["wide", "p_omnibus"] <= 0.02
    assert "axis" in table.loc["wide", "fired"].split("+")
    assert "energy" in table.loc["moved", "fired"].split("+")
    null = table.drop(["wide", "moved"])
    assert (null["p_omnibus"] <= 0.05).mean() < 0.2
    assert null.loc[null["p_omnibus"] > 0.05, "fired"].eq("").all()
    np.testing.assert_allclose(table["q_omnibus"], benjamini_hochberg(table["p_omnibus"]))
    again = score_perturbations(
        vectors, labels, control="control", batches=batches, options=replace(options, omnibus=False)
    ).table.set_index("perturbation")
    assert again["p_omnibus"].isna().all()
    pd.testing.assert_series_equal(again["p"], table["p"])


def test_a_tail_continues_p_where_no_exchange_reaches(rng):
    vectors, labels = screen(rng, {"control": 200, "a": 40, "b": 40, "c": 40}, {"a": 1.2, "b": 4})
    table = score_perturbations(vectors, labels, control="control").table.set_index("perturbation")
    assert table.loc["b", "p"] == pytest.approx(1 / 1001)
    assert table.loc["b", "p_tail"] < 1e-6
    assert table.loc["b", "p_tail_source"] == "chi_square"
    assert np.isnan(table.loc["c", "p_tail"])
    assert table.loc["c", "p_tail_source"] == ""


def test_confounded_batches_give_no_p(rng):
    vectors, labels = screen(rng, {"control": 40, "a": 30, "b": 30})
    batches = np.array(["x"] * 40 + ["y"] * 30 + ["x"] * 25 + ["y"] * 5)
    options = ScoreOptions(metrics=("e_distance", "wasserstein"), permutations=99, wasserstein_permutations=19)
    result = score_perturbations(vectors, labels, control="control", batches=batches, options=options)
    for metric in options.metrics:
        assert np.isnan(row(result, "a", metric)["p"])
        assert np.isnan(row(result, "a", metric)["q"])
        assert np.isnan(row(result, "a", metric)["z"])
        assert "batch_confounded" in flags(result, "a", metric)
    assert "batch_partly_confounded" in flags(result, "b")
    assert row(result, "b")["n_used"] == 25
    assert any(text.startswith("batch_confounded") and "a" in text for text in result.warnings)


def test_few_exchanges_are_flagged(rng):
    """Every exchange is made, so p is the exact one of all."""
    vectors, labels = screen(rng, {"control": 20, "a": 4})
    batches = np.array(["x"] * 2 + ["y"] * 2 + [f"c{i}" for i in range(16)] + ["x", "x", "y", "a"])
    options = ScoreOptions(permutations=99, min_cells=2)
    result = score_perturbations(vectors, labels, control="control", batches=batches, options=options)
    found = row(result, "a")
    assert {"few_exchanges", "batch_partly_confounded"} <= flags(result, "a")
    assert (found["n_used"], found["p_source"], found["exchanges"]) == (3, "enumerated", 18)
    assert found["p"] * 18 == pytest.approx(round(found["p"] * 18))
    again = score_perturbations(vectors, labels, control="control", batches=batches, options=replace(options, seed=5))
    assert row(again, "a")["p"] == found["p"]


def test_constant_embeddings_look_degenerate(rng):
    _, labels = screen(rng, {"control": 30, "a": 30})
    same = np.tile(rng.normal(size=5).astype(np.float32), (60, 1))
    options = ScoreOptions(
        metrics=("e_distance", "cosine_e_distance", "wasserstein"), permutations=99, wasserstein_permutations=9
    )
    result = score_perturbations(same, labels, control="control", options=options)
    for metric in options.metrics:
        found = row(result, "a", metric)
        assert found["distance"] == 0
        assert found[["z", "p", "q"]].isna().all()
        assert {"constant_embeddings", "null_sd_zero"} <= flags(result, "a", metric)


def test_constant_controls_give_no_z(rng):
    vectors, labels = screen(rng, {"control": 30, "a": 30})
    vectors[labels == "control"] = 1
    options = ScoreOptions(metrics=("e_distance", "wasserstein"), permutations=99, wasserstein_permutations=19)
    result = score_perturbations(vectors, labels, control="control", options=options)
    assert (result.table["z"] > 3).all()  # exchanges of labels do change the distance
    assert (result.table["p"] <= 0.05).all()


def test_ties_among_few_distinct_vectors_are_counted():
    """Two kinds of cells in equal shares in both groups: the observed split is the most likely one."""
    vectors = np.tile([[1.0, 0.0], [0.0, 1.0]], (20, 1)).astype(np.float32)
    labels = np.repeat(["control", "a"], 20)
    result = score_perturbations(vectors, labels, control="control", options=ScoreOptions(permutations=400))
    assert row(result, "a")["p"] == 1.0


def test_small_perturbations_are_listed_not_scored(rng):
    vectors, labels = screen(rng, {"control": 30, "a": 30, "few": 19})
    result = score_perturbations(vectors, labels, control="control", options=FAST)
    found = row(result, "few")
    assert found["n_cells"] == 19
    assert found[["distance", "null_mean", "null_sd", "z", "p", "q", "p_tail"]].isna().all()
    assert (found["n_used"], found["p_source"], found["exchanges"]) == (0, "", 0)
    assert flags(result, "few") == {"too_few_cells"}
    assert result.table["perturbation"].iloc[-1] == "few"
    assert any("few" in text and "20 cells" in text for text in result.warnings)
    kept = labels != "a"
    with pytest.raises(TooFewCellsError, match="'few', has 19"):
        score_perturbations(vectors[kept], labels[kept], control="control")


def test_no_perturbation_at_all(rng):
    vectors, labels = screen(rng, {"control": 30})
    with pytest.raises(TooFewCellsError, match="no label"):
        score_perturbations(vectors, labels, control="control")


def test_labels_that_differ_in_case_or_space_are_flagged(rng):
    vectors, labels = screen(rng, {"control": 30, "STAT1": 25, "stat1 ": 25, "b": 25})
    result = score_perturbations(vectors, labels, control="control", options=FAST)
    assert "similar_label" in flags(result, "STAT1")
    assert "similar_label" in flags(result, "stat1 ")
    assert "similar_label" not in flags(result, "b")
    assert any("'STAT1' and 'stat1 '" in text for text in result.warnings)


def test_missing_control_names_similar_labels(rng):
    vectors, labels = screen(rng, {"Control": 30, "a": 30})
    with pytest.raises(ControlLabelMissingError, match="'Control'"):
        score_perturbations(vectors, labels, control="control")


def test_too_few_controls(rng):
    vectors, labels = screen(rng, {"control": 19, "a": 30})
    with pytest.raises(TooFewControlsError, match="19 cells"):
        score_perturbations(vectors, labels, control="control")


def test_more_cells_than_controls(rng):
    vectors, labels = screen(rng, {"control": 30, "a": 50, "b": 20}, {"a": 3})
    options = ScoreOptions(metrics=("e_distance", "wasserstein"), permutations=99, wasserstein_permutations=39)
    result = score_perturbations(vectors, labels, control="control", options=options)
    assert flags(result, "a") == set()
    assert flags(result, "a", "wasserstein") == {"fewer_controls_than_cells"}
    assert row(result, "a")["z"] > 5
    assert row(result, "a", "wasserstein")["z"] > 3


def test_large_groups_are_sampled_and_flagged(rng):
    vectors, labels = screen(rng, {"control": 300, "a": 120, "b": 40}, {"a": 3})
    result = score_perturbations(
        vectors, labels, control="control", options=ScoreOptions(permutations=99, max_cells=100)
    )
    assert flags(result, "a") == {"cells_subsampled", "controls_subsampled"}
    assert flags(result, "b") == {"controls_subsampled"}
    assert row(result, "a")["n_cells"] == 120
    assert row(result, "a")["n_controls"] == 100
    assert any("sampled" in text for text in result.warnings)


def test_bad_embeddings_name_the_row(rng):
    vectors, labels = screen(rng, {"control": 30, "a": 30})
    for value, message in ((np.nan, "Row 33"), (np.inf, "Row 33")):
        bad = vectors.copy()
        bad[33, 1] = value
        with pytest.raises(InvalidEmbeddingError, match=message):
            score_perturbations(bad, labels, control="control")
    bad[33] = 0
    with pytest.raises(InvalidEmbeddingError, match="Row 33 of embeddings is all zero"):
        score_perturbations(bad, labels, control="control")
    score_perturbations(bad, labels, control="control", options=ScoreOptions(permutations=9, normalize=False))


def test_labels_must_fit_and_be_there(rng):
    vectors, labels = screen(rng, {"control": 30, "a": 30})
    with pytest.raises(MalformedMatrixError, match="60 cells"):
        score_perturbations(vectors, labels[:-1], control="control")
    with pytest.raises(MalformedMatrixError, match="batches"):
        score_perturbations(vectors, labels, control="control", batches=["x"])
    missing = labels.astype(object)
    missing[40] = None
    with pytest.raises(InvalidParameterError, match="row 40"):
        score_perturbations(vectors, missing, control="control")


def test_a_correction_that_permutations_cannot_reach_is_announced(rng):
    vectors, labels = screen(rng, {"control": 30, **{f"p{i}": 20 for i in range(10)}})
    result = score_perturbations(vectors, labels, control="control", options=ScoreOptions(permutations=19))
    assert any("200 permutations" in text for text in result.warnings)


def test_bonferroni_and_progress(rng):
    vectors, labels = screen(rng, {"control": 30, "a": 30, "b": 30, "few": 3})
    seen = []
    options = ScoreOptions(metrics=("e_distance", "cosine_e_distance"), permutations=99, correction="bonferroni")
    result = score_perturbations(
        vectors, labels, control="control", options=options, progress=lambda *args: seen.append(args)
    )
    assert seen == [("score", i, 4) for i in (1, 2, 3, 4)]
    scored = result.table.dropna(subset="p")
    np.testing.assert_allclose(scored["q"], np.minimum(2 * scored["p"], 1))


def test_every_flag_has_words():
    assert all(text and text[0].islower() for text in FLAGS.values())


@pytest.mark.parametrize(
    "values",
    [
        {"metrics": []},
        {"metrics": "e_distance"},
        {"metrics": ["edist"]},
        {"estimator": "W"},
        {"null": "none"},
        {"ground": "manhattan"},
        {"correction": "none"},
        {"permutations": 0},
        {"permutations": 1.5},
        {"permutations": True},
        {"exceedances": -1},
        {"min_cells": 1},
        {"seed": -1},
        {"repeats": 0},
        {"normalize": 1},
        {"min_cells": 60, "max_cells": 50},
        {"colour": "red"},
    ],
    ids=lambda values: "-".join(f"{k}={v}" for k, v in values.items()),
)
def test_options_outside_their_range(values):
    with pytest.raises(InvalidParameterError) as caught:
        ScoreOptions.from_dict(values)
    assert caught.value.field in values


def test_options_survive_the_wire():
    options = ScoreOptions(metrics=("wasserstein", "e_distance"), estimator="V", null="fixed", seed=3)
    assert ScoreOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
