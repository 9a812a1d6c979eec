"""Gene sets at the top of a ranking: the two nulls against brute force, the strata, files, the command line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturbscope.analysis.enrichment import (
    ENRICHMENT_COLUMNS,
    count_strata,
    default_grid,
    enrich,
    enrich_scores,
    members_of,
)
from perturbscope.analysis.gene_sets import read_gmt
from perturbscope.cli.app import run
from perturbscope.errors import InvalidParameterError, MalformedMatrixError, MissingColumnError, UnreadableFileError
from tests.screens import make_screen

NAMES = [f"target-{i}" for i in range(60)]


def test_counts_and_exact_p(rng: np.random.Generator) -> None:
    wanted = [*NAMES[:6], *NAMES[30:34]]
    found = enrich(NAMES, {"top": [*wanted, "not screened"]}, grid=[10, 5, 60], draws=4000)
    table = found.table
    assert tuple(table.columns) == ENRICHMENT_COLUMNS
    assert table[["n_genes", "n_members"]].to_numpy().tolist() == [[11, 10]] * 3
    assert table["n"].tolist() == [5, 10, 60]
    assert table["k"].tolist() == [5, 6, 10]
    assert table["expected"].tolist() == pytest.approx([5 / 6, 10 / 6, 10])
    exact = stats.hypergeom.sf(np.array([4, 5, 9]), 60, 10, [5, 10, 60])
    np.testing.assert_allclose(table["p_exact"], exact, rtol=1e-9)
    # A share of draws: its distance from the exact p is binomial.
    assert (np.abs(table["p"] - exact) <= 4 * np.sqrt(exact * (1 - exact) / 4000) + 1 / 4000).all()
    np.testing.assert_allclose(table["p_exact_adjusted"], np.minimum(exact * 3, 1), rtol=1e-9)
    np.testing.assert_allclose(table["p_adjusted"], np.minimum(table["p"] * 3, 1))
    assert table.filter(like="stratified").isna().all().all()
    assert found.best()["n"].tolist() == [5]
    assert found.provenance["n_tests"] == 3
    json.dumps(found.provenance)


def test_the_stratified_null_equals_shuffling_within_strata(rng: np.random.Generator) -> None:
    strata = np.repeat([2, 0, 1], 20)[rng.permutation(60)]
    members = np.zeros(60, dtype=bool)
    members[rng.choice(60, 15, replace=False)] = True
    genes = [name for name, member in zip(NAMES, members, strict=True) if member]
    table = enrich(NAMES, {"s": genes}, grid=[12, 30], strata=strata, draws=20_000).table
    shuffled = np.empty((20_000, 60), dtype=bool)
    for stratum in range(3):
        inside = np.flatnonzero(strata == stratum)
        shuffled[:, inside] = rng.permuted(np.tile(members[inside], (20_000, 1)), axis=1)
    for _, row in table.iterrows():
        drawn = shuffled[:, : row["n"]].sum(axis=1)
        assert row["expected_stratified"] == pytest.approx(drawn.mean(), abs=0.05)
        brute = (drawn >= row["k"]).mean()
        assert row["p_stratified_exact"] == pytest.approx(brute, abs=0.015)
        assert row["p_stratified"] == pytest.approx(row["p_stratified_exact"], abs=0.015)
        assert row["p_exact"] == pytest.approx(stats.hypergeom.sf(row["k"] - 1, 60, 15, row["n"]), rel=1e-9)


def test_what_cell_numbers_alone_explain_is_gone_within_strata(rng: np.random.Generator) -> None:
    """The set's members have many cells, and the ranking is by number of cells and nothing else."""
    cells = rng.integers(20, 500, size=400)
    names = [f"g{i}" for i in range(400)]
    order = np.argsort(-cells + rng.normal(0, 5, size=400))
    genes = [names[i] for i in np.flatnonzero(cells > 350)[::2]]
    found = enrich(
        [names[i] for i in order], {"large": genes}, grid=[80], strata=count_strata(cells[order]), draws=2000
    ).table.iloc[0]
    assert found["p_exact"] < 1e-10
    assert found["p"] == 1 / 2001
    assert found["p_stratified_exact"] > 0.05
    assert found["p_stratified"] > 0.05


def test_p_is_uniform_for_random_sets(rng: np.random.Generator) -> None:
    sets = {str(i): rng.choice(NAMES, 20, replace=False).tolist() for i in range(200)}
    strata = count_strata(rng.integers(20, 90, size=60))
    table = enrich(NAMES, sets, grid=[25], strata=strata, draws=500).table
    for column in ("p", "p_exact", "p_stratified", "p_stratified_exact"):
        assert (table[column] <= 0.05).mean() < 0.1
        assert (table[column] <= 0.5).mean() < 0.65  # discrete, so at most uniform
    assert (table["p_exact_adjusted"] == 1).mean() > 0.9


def test_seeds_and_other_sets() -> None:
    sets = {"a": NAMES[10:30], "b": NAMES[::3]}
    one, two = (enrich(NAMES, sets, draws=300, strata=np.arange(60) % 4) for _ in range(2))
    pd.testing.assert_frame_equal(one.table, two.table)
    alone = enrich(NAMES, {"b": sets["b"]}, draws=300).table
    np.testing.assert_array_equal(alone["p"], one.table["p"][one.table["gene_set"] == "b"])
    assert not enrich(NAMES, sets, draws=300, seed=1).table["p"].equals(one.table["p"])


def test_sets_outside_the_ranking_are_named_not_dropped() -> None:
    seen: list[tuple[str, int, int]] = []
    found = enrich(
        NAMES, {"a": NAMES[:9], "elsewhere": ["FOXP3"], "few": NAMES[:2]}, progress=lambda *a: seen.append(a)
    )
    assert set(found.table["gene_set"]) == {"a", "few"}
    assert any("1 of 3 gene sets has no gene" in text and "elsewhere" in text for text in found.warnings)
    assert any("1 gene set has fewer than 5 genes" in text and "few" in text for text in found.warnings)
    assert found.provenance["gene_sets_without_members"] == ["elsewhere"]
    assert seen == [("enrich", 1, 2), ("enrich", 2, 2)]
    nothing = enrich(NAMES, {"elsewhere": ["FOXP3"]})
    assert nothing.table.empty
    assert nothing.best().empty


def test_draws_that_cannot_reach_significance_are_announced() -> None:
    assert any("p_exact" in text for text in enrich(NAMES, {"a": NAMES[:9]}, draws=100).warnings)
    assert any("one stratum" in text for text in enrich(NAMES, {"a": NAMES[:9]}, strata=[0] * 60).warnings)


def test_genes_match_by_any_name() -> None:
    ranking = ["STAT1", "ENSG00000096968.14", "IRF1", "my-construct"]
    assert members_of(ranking, ["ENSG00000115415", "JAK2", "my-construct"]).tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("n_ranked", "grid"), [(1500, tuple(range(100, 1500, 100))), (40, tuple(range(4, 40, 4))), (3, (1, 2)), (2, (1,))]
)
def test_default_grid(n_ranked: int, grid: tuple[int, ...]) -> None:
    assert default_grid(n_ranked) == grid


def test_strata_are_deciles_and_keep_equal_numbers_together(rng: np.random.Generator) -> None:
    assert np.bincount(count_strata(rng.permutation(1000))).tolist() == [100] * 10
    counts = rng.integers(0, 4, size=300)
    strata = count_strata(counts)
    assert all(len(np.unique(strata[counts == value])) == 1 for value in range(4))
    assert count_strata([7] * 5).tolist() == [0] * 5
    with pytest.raises(MalformedMatrixError):
        count_strata([1.0, np.nan])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ranking": ["a", "b", "a"]}, InvalidParameterError, "'a' is ranked more than once"),
        ({"ranking": ["a"]}, InvalidParameterError, "at least 2"),
        ({"gene_sets": {}}, InvalidParameterError, "no gene sets"),
        ({"grid": [0, 5]}, InvalidParameterError, "from 1 to 60"),
        ({"grid": [61]}, InvalidParameterError, "from 1 to 60"),
        ({"grid": []}, InvalidParameterError, "from 1 to 60"),
        ({"draws": 0}, InvalidParameterError, "1 or more"),
        ({"strata": [1, 2]}, MalformedMatrixError, "one a perturbation"),
    ],
)
def test_what_enrich_refuses(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        enrich(**{"ranking": NAMES, "gene_sets": {"s": NAMES[:5]}, **arguments})


# --- from a table of scores --------------------------------------------------------------------------------------


def scores() -> tuple[pd.DataFrame, pd.DataFrame]:
    """60 perturbations by two metrics, one without z; and their numbers of differential genes, one missing."""
    table = pd.DataFrame({"perturbation": NAMES, "n_cells": np.arange(20, 80), "z": np.linspace(9, 0, 60)})
    table.loc[59, "z"] = np.nan
    both = pd.concat([table.assign(metric="e_distance"), table.assign(metric="wasserstein", z=-table["z"])])
    degs = pd.DataFrame({"perturbation": NAMES[1:], "n_degs": [0, 0, 3] + [0] * 56})
    return both.sample(frac=1, random_state=0), degs


def test_scores_are_ranked_by_z_within_the_perturbations_without_differential_genes() -> None:
    table, degs = scores()
    found = enrich_scores(table, {"s": [*NAMES[:6], NAMES[59]]}, metric="e_distance", degs=degs, grid=[4])
    assert found.provenance["n_ranked"] == 57
    assert found.table["k"].tolist() == [4]  # 1, 2, 4, 5: number 0 is not in the table, 3 has differential genes
    assert found.table["n_members"].tolist() == [4]
    assert found.table["p_stratified_exact"].notna().all()
    assert any("1 of 60 perturbations have no z" in text for text in found.warnings)
    assert any("'" not in text and "target-0" in text for text in found.warnings)
    assert found.provenance["metric"] == "e_distance"
    assert enrich_scores(table, {"s": NAMES[:6]}, metric="wasserstein", grid=[6]).table["k"].tolist() == [0]
    more = enrich_scores(table, {"s": NAMES[:6]}, metric="e_distance", degs=degs, max_degs=3, grid=[5])
    assert more.table["k"].tolist() == [5]


def test_tables_that_do_not_fit() -> None:
    table, degs = scores()
    with pytest.raises(InvalidParameterError, match="e_distance"):
        enrich_scores(table, {"s": NAMES[:6]})
    with pytest.raises(MissingColumnError, match="'effect'"):
        enrich_scores(table, {"s": NAMES[:6]}, metric="e_distance", rank_by="effect")
    with pytest.raises(MissingColumnError, match="'n_degs'"):
        enrich_scores(table, {"s": NAMES[:6]}, metric="e_distance", degs=degs[["perturbation"]])


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_gmt_plain_and_gzipped(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    text = "one\thttp://where\tB\tA\tB\t\n\ntwo\t\tC\r\n"
    path = tmp_path / "sets.gmt"
    path.write_bytes(pack(text.encode()))
    assert read_gmt(path) == {"one": ("B", "A"), "two": ("C",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\tx\tA\ntwo\tx\n", "line 2: a set needs"),
        (b"one\tx\tA\n\ttwo\tx\n", "line 2: a set needs"),
        (b"one two A B\n", "line 1.*1 field"),
        (b"one\tx\tA\nother\tx\tB\none\tx\tC\n", "line 3: the set 'one' stands in line 1"),
        (b"\n\n", "no gene set"),
        (b"\xff\xfe\x00a\tb\tc", "cannot be read"),
        (gzip.compress(b"one\tx\tA\n" * 99, mtime=0)[:-20], "cannot be read"),
    ],
)
def test_bad_gmt(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "sets.gmt"
    path.write_bytes(content)
    with pytest.raises(UnreadableFileError, match=message):
        read_gmt(path)
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        read_gmt(tmp_path / "absent.gmt")


def test_the_shipped_sets(data_dir: Path) -> None:
    found = read_gmt(data_dir / "hallmark_interferon.gmt")
    assert {name: len(genes) for name, genes in found.items()} == {
        "HALLMARK_INTERFERON_ALPHA_RESPONSE": 97,
        "HALLMARK_INTERFERON_GAMMA_RESPONSE": 200,
    }
    assert {"STAT1", "IRF1", "JAK2"} <= set(found["HALLMARK_INTERFERON_GAMMA_RESPONSE"])


# --- command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    table, degs = scores()
    table.to_csv("scores.csv", index=False)
    table.to_parquet("scores.parquet", index=False)
    degs.to_parquet("degs.parquet", index=False)
    (tmp_path / "sets.gmt").write_text("first\t\t" + "\t".join(NAMES[:8]) + "\nelsewhere\t\tFOXP3\n")
    make_screen().write_h5ad("in.h5ad")
    return tmp_path


def test_enrich_command(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--gene-sets", "sets.gmt", "--metric", "e_distance", "--draws", "500", "--grid", "5,20"]
    assert run(["enrich", "scores.csv", "a.csv", *command]) == 0
    captured = capfd.readouterr()
    assert "first" in captured.out
    assert "elsewhere" in captured.err
    assert run(["enrich", "scores.parquet", "b.parquet", *command, "--degs", "degs.parquet", "--top", "0"]) == 0
    assert capfd.readouterr().out == ""
    plain, weak = pd.read_csv("a.csv"), pd.read_parquet("b.parquet")
    assert tuple(plain.columns) == tuple(weak.columns) == ENRICHMENT_COLUMNS
    assert (plain["n_members"].tolist(), weak["n_members"].tolist()) == ([8, 8], [6, 6])
    facts = json.loads((folder / "a.csv.provenance.json").read_text())
    assert (facts["grid"], facts["gene_sets"]) == ([5, 20], "sets.gmt")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["enrich", "scores.csv", "o.csv", "--gene-sets", "sets.gmt"], "invalid_parameter"),
        (["enrich", "absent.csv", "o.csv", "--gene-sets", "sets.gmt"], "unreadable_file"),
        (["enrich", "sets.gmt", "o.csv", "--gene-sets", "sets.gmt"], "unreadable_file"),
        (["enrich", "scores.csv", "o.csv", "--gene-sets", "scores.csv", "--metric", "e_distance"], "unreadable_file"),
        (["enrich", "scores.csv", "o.csv", "--gene-sets", "sets.gmt", "--grid", "a"], "invalid_parameter"),
        (["enrich", "degs.parquet", "o.csv", "--gene-sets", "sets.gmt"], "missing_column"),
        (["degs", "in.h5ad", "o.csv", "--perturbation-key", "x", "--control", "control"], "missing_column"),
        (
            ["degs", "in.h5ad", "o.csv", "--perturbation-key", "perturbation", "--control", "ctrl"],
            "control_label_missing",
        ),
        (
            ["degs", "in.h5ad", "o.csv", "--perturbation-key", "perturbation", "--control", "control", "--alpha", "2"],
            "invalid_parameter",
        ),
    ],
)
def test_bad_commands(folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: str) -> None:
    assert run(arguments) == 2
    assert f"[{code}]" in capfd.readouterr().err
    assert not (folder / "o.csv").exists()


def test_degs_command(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adata = make_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(object)
    adata.obs.loc["cell122", "perturbation"] = None
    adata.write_h5ad("in.h5ad")
    command = ["--perturbation-key", "perturbation", "--control", "control", "--total-counts-key", "total"]
    assert run(["degs", "in.h5ad", "out.parquet", *command]) == 0
    captured = capfd.readouterr()
    assert "Differentially expressed genes" in captured.out
    assert "1 of 123 cells have no value" in captured.err
    assert "not named by a gene" in captured.err
    table = pd.read_parquet("out.parquet").set_index("perturbation")
    assert table["n_cells"].to_dict() == {"rare": 2, "strong": 30, "weak": 30}
    assert table.loc["strong", "n_degs"] >= 10
    assert table.loc["rare", "n_degs"] == 0
