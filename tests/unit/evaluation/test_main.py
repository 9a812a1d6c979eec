"""The command: one screen or a file of them, from counts to tables, figures and a page."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from evaluation.__main__ import MARKER, PLACE, main
from evaluation.config import read_config
from evaluation.figures import write_figures
from evaluation.models import Model
from evaluation.replication import ReplicationOptions
from evaluation.run import RunOptions, by_target, deg_correlation, evaluate, overview, separation_table
from evaluation.screens import open_screen
from evaluation.separation import SeparationOptions
from evaluation.tables import markdown, screen_page
from perturbscope.analysis.gene_sets import read_gmt
from perturbscope.analysis.umap import project
from perturbscope.errors import InvalidParameterError, UnreadableFileError
from tests.screens import make_screen

FAST = {
    "separation": {"permutations": 39, "splits": 5, "transport_cells": 20, "transport_draws": 10},
    "replication": {"permutations": 19, "draws": 19, "power_repeats": 2, "power_grid": [20]},
    "umap_cells": 0,
}
OPTIONS = RunOptions(
    separation=SeparationOptions(**FAST["separation"]),
    replication=ReplicationOptions(**FAST["replication"] | {"power_grid": (20,)}),
    umap_cells=0,
    relations={"pathway": ["strong", "weak", "other"], "else": ["other", "weak"]},
)
PCA = Model("PCA-4", "pca", {"n_components": 4})
MINE = Model("mine", "obsm", {"key": "X_pca"})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    adata = make_screen(repeats=2)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "control")[:40]] = "other"
    adata.obs["perturbation"] = pd.Categorical(labels)
    adata.obs["guide"] = [f"{label}_{i % 2}" for i, label in enumerate(labels)]
    place = tmp_path_factory.mktemp("screens") / "tiny.h5ad"
    adata.write_h5ad(place)
    return place


@pytest.fixture(scope="module")
def result(path):
    screen = open_screen(path, batch_key="batch", guide_key="guide", obsm=["X_pca"])
    return evaluate(screen, [PCA, MINE], options=OPTIONS)


def run(*arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(word) for word in arguments])


def test_the_overview_has_a_row_a_model_and_the_embedding_with_the_effect_wins(result):
    table = overview(result).set_index("model")
    assert list(table.index) == ["PCA-4", "mine"]
    assert table.loc["PCA-4", "median z"] > table.loc["mine", "median z"]
    for column in ("paper z", "detected", "pretended", "batch r", "map_guide", "map_batch", "split_half_correlation"):
        assert np.isfinite(table[column]).all(), column
    wide = by_target(result).set_index("perturbation")
    assert wide.loc["strong", "PCA-4"] > 20
    assert wide["mine"].abs().max() < 5
    assert wide.loc["strong", "n_degs"] > 5
    assert np.isnan(wide.loc["rare", "PCA-4"])
    assert deg_correlation(result.models[0], result.degs).set_index("metric").loc["e_distance", "n"] == 3


def test_separation_has_both_modes_of_all_metrics(result):
    table = separation_table(result)
    rows = table[(table["model"] == "mine") & (table["against"] == "control")]
    assert len(rows) == 6
    assert set(rows["n"]) == {3}
    assert (table[table["against"] == "pairs"]["n"] == 3).all()


def test_the_page_says_what_the_tables_hold(result):
    page = screen_page(result, title="Tiny", note="A note.", figures={"a figure": "a.png"})
    for text in ("## Tiny\n\nA note.", "246 cells x 40 genes; 4 perturbation(s), 80 controls", "![a figure](a.png)"):
        assert text in page
    for heading in ("At a glance", "Without controls", "Separation", "Controls against", "One batch", "Cells needed"):
        assert f"### {heading}" in page
    assert "nan" not in page
    assert markdown(pd.DataFrame({"a": [1.23456, np.nan], "b": ["x", "y"]})) == (
        "| a | b |\n|---|---|\n| 1.23 | x |\n| - | y |\n"
    )


def test_results_are_used_again_until_labels_or_options_change(path, tmp_path):
    screen = open_screen(path, batch_key="batch")
    kept = []

    def announce(model, seconds, from_cache):
        kept.append(from_cache)

    options = RunOptions(separation=OPTIONS.separation, replication=None, umap_cells=0)
    first = evaluate(screen, [PCA], options=options, cache=tmp_path, finished=announce)
    again = evaluate(screen, [PCA], options=options, cache=tmp_path, finished=announce)
    for name, table in first.models[0].tables.items():
        pd.testing.assert_frame_equal(table, again.models[0].tables[name])
    pd.testing.assert_frame_equal(overview(first), overview(again))
    other = open_screen(path)
    evaluate(other, [PCA], options=options, cache=tmp_path, finished=announce)
    assert kept == [False, True, False]


def test_contexts_are_rows_of_their_own_in_tables_and_figures(path, tmp_path, monkeypatch):
    import anndata

    flat = partial(project, projector=lambda vectors, **_: vectors[:, :2].astype(np.float32))
    monkeypatch.setattr("evaluation.run.project", flat)
    adata = anndata.read_h5ad(path)
    adata.obs["cell_type"] = ["B" if i % 2 else "T" for i in range(adata.n_obs)]
    adata.write_h5ad(tmp_path / "s.h5ad")
    screen = open_screen(tmp_path / "s.h5ad", context_key="cell_type", keep={"perturbation": ["control", "strong"]})
    options = RunOptions(separation=OPTIONS.separation, replication=OPTIONS.replication, umap_cells=60)
    found = evaluate(screen, [PCA], options=options)
    wide = by_target(found)
    assert wide[["context", "perturbation"]].to_numpy().tolist() in (
        [["B", "strong"], ["T", "strong"]],
        [["T", "strong"], ["B", "strong"]],
    )
    assert (wide["PCA-4"] > 10).all()
    page = screen_page(found)
    assert "in 2 contexts, each with its own controls" in page
    assert "### Without controls" not in page
    drawn = write_figures(found, tmp_path)
    assert [place.name for place in drawn.values()] == [
        "calibration.png", "z-by-model.png", "z-by-target.png", "umap.png",
    ]  # fmt: skip
    assert set(found.models[0].tables["umap"]["perturbation"]) == {
        f"{label} in {name}" for label in ("control", "strong") for name in "BT"
    }


def test_a_model_that_fails_is_named_and_the_others_go_on(path):
    options = RunOptions(separation=OPTIONS.separation, replication=None, umap_cells=0)
    found = evaluate(open_screen(path), [MINE, PCA], options=options)
    assert [model.model for model in found.models] == ["PCA-4"]
    assert "X_pca" in found.failed["mine"]
    assert "**mine** gave nothing" in screen_page(found)


def test_the_command_writes_tables_figures_and_a_page(path, tmp_path, tiny_bundle):
    relations = tmp_path / "sets.gmt"
    relations.write_text("pathway\tfrom nowhere\tstrong\tweak\n")
    config = tmp_path / "c.yaml"
    config.write_text(
        json.dumps(
            {
                "models": {"hvg": 0, "pca": [4], "bundles": {"tiny": str(tiny_bundle)}},
                "options": FAST | {"umap_cells": 0},
                "screens": [
                    {
                        "path": str(path), "name": "small", "batch_key": "batch", "guide_key": "guide",
                        "relations": str(relations), "title": "A small screen",
                    }
                ],
            }
        )
    )  # fmt: skip
    template = tmp_path / "t.md"
    template.write_text(f"# Mine\n\n{PLACE}\n")
    out, page = tmp_path / "out", tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    words = ("--config", config, "--out", out, "--cache", tmp_path / "cache", "--page", page, "--template", template)
    done = run(*words)
    assert done.exit_code == 0, done.output
    summary = json.loads((out / "small" / "summary.json").read_text())
    assert list(summary["models"]) == ["PCA-4", "tiny"]
    assert set(pd.read_parquet(out / "small" / "scores.parquet")["model"]) == {"PCA-4", "tiny"}
    text = page.read_text()
    assert text.startswith("# Mine\n\n## A small screen\n")
    for name in ("calibration", "z-by-model", "z-by-target"):
        assert f"(page/small-{name}.png)" in text
        assert (page.parent / "page" / f"small-{name}.png").read_bytes().startswith(b"\x89PNG")
    again = run(*words)
    assert again.exit_code == 0
    assert "from the cache" in again.output
    assert page.read_text() == text
    assert not [place for place in tmp_path.iterdir() if place.name.startswith(".")]


def test_mistakes_end_with_a_message_before_any_work(path, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for words, text in (
        ((), "Give a screen"),
        ((path, "--config", "c.yaml"), "not both"),
        ((path, "--bundle", "bundles/default"), "NAME=DIRECTORY"),
        ((path, "--out", tmp_path / "mine"), "does not hold results"),
        ((path, "--obsm", "mine=X_none"), "X_none"),
        ((path, "--bundle", "PCA-50=x"), "Two models"),
        ((path, path), "Two screens"),
        ((path, "--control", "vehicle"), "vehicle"),
    ):
        done = run(*words, "--cache", tmp_path / "cache", *(() if "--out" in words else ("--out", tmp_path / "o")))
        assert done.exit_code == 2, done.output
        assert text in " ".join(done.output.split()), done.output
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_configurations_are_checked(tmp_path):
    file = tmp_path / "c.yaml"
    for text, message in (
        ("screens: []", "at least one screen"),
        ("screens: [{name: a}]", "has no path"),
        ("screens: [{path: a, colour: red}]", "unknown key 'colour'"),
        ("screens: [{path: a}]\nmodels: {scvi: {epochs: 3}}", "unknown key 'epochs'"),
        ("screens: [{path: a}]\noptions: {replication: 3}", "must be a mapping"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidParameterError, match=message):
            read_config(file)
    file.write_text("screens: [")
    with pytest.raises(UnreadableFileError, match="as YAML"):
        read_config(file)
    file.write_text("screens: [{path: a, scvi_epochs: 2}]\nmodels: {scvi: {max_epochs: 9}}\noptions: {seed: 4}")
    found = read_config(file)
    assert found.models.models(scvi_epochs=2)[-1].options["max_epochs"] == 2
    assert found.options.separation.seed == 4


def test_the_shipped_configuration_reads(monkeypatch, data_dir):
    monkeypatch.chdir(data_dir.parent)
    found = read_config(data_dir.parent / "evaluation" / "configs" / "quality.yaml")
    for settings in found.screens:
        assert settings.path.is_file()
        if settings.relations:
            assert len(read_gmt(settings.relations)) > 100
    assert MARKER == "evaluation.json"
