"""``perturbscope report``: page, tables and figures of a screen; errors before any work."""

from __future__ import annotations

import pytest

from perturbscope.analysis import umap
from perturbscope.cli.app import run
from tests.reports import first_two
from tests.screens import make_screen

LABELS = ["--perturbation-key", "perturbation", "--control", "control", "--set", "max_cells=60"]


@pytest.fixture(autouse=True)
def _quick_map(monkeypatch):
    monkeypatch.setattr(umap, "umap_coordinates", first_two)


@pytest.fixture
def screen(tmp_path):
    path = tmp_path / "cells.h5ad"
    make_screen().write_h5ad(path)
    return path


def test_a_folder_gets_page_tables_and_figures(screen, tmp_path, capsys, tiny_bundle):
    sets = tmp_path / "sets.gmt"
    sets.write_text("A_SET\twhere from\tstrong\tweak\nOTHER\twhere from\tSTAT1\n")
    out = tmp_path / "out"
    more = ["--gene-sets", str(sets), "--batch-key", "batch", "--total-counts-key", "total"]
    code = run(["report", str(screen), str(out), *LABELS, "--bundle", str(tiny_bundle), *more])
    told = capsys.readouterr()
    assert code == 0, told.err
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "scores.csv", "scores.parquet", "genes.csv", "umap.csv", "pairs.csv"} <= names
    assert {"effect-e_distance.svg", "effect-e_distance.png", "genes-e_distance.svg", "umap.png", "pairs.svg"} <= names
    page = (out / "report.html").read_text()
    assert "<h1>Perturbations of cells</h1>" in page
    assert "A_SET" in page
    assert "tiny-0.1-" in page
    assert "3 perturbations" in page
    assert "2 perturbations of cells.h5ad ->" in told.out.replace("\n", "")


def test_a_page_alone_from_an_embedding(screen, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert run(["report", str(screen), str(out), *LABELS, "--use-rep", "X_pca", "--title", "<mine>"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "page.html"}
    page = out.read_text()
    assert "<h1>&lt;mine&gt;</h1>" in page
    assert "differentially expressed genes" in page
    assert "--gene-sets FILE.gmt looks for them" in page


def test_a_file_without_raw_counts_says_so_on_the_page(tmp_path):
    screen = make_screen()
    screen.X = screen.layers["logged"]
    screen.write_h5ad(tmp_path / "logged.h5ad")
    out = tmp_path / "page.html"
    assert run(["report", str(tmp_path / "logged.h5ad"), str(out), *LABELS, "--use-rep", "X_pca"]) == 0
    assert "The file has no raw counts that could be tested gene by gene" in out.read_text()


@pytest.mark.parametrize(
    ("out", "more", "said"),
    [
        ("cells.h5ad", [], "is a file; give a folder, or a page that ends in .html"),
        ("missing/page.html", [], "of the output does not exist"),
        ("page.html", ["--gene-sets", "nothing.gmt"], "cannot be read"),
        ("page.html", ["--figures", "cells.h5ad"], "is a file; give a folder"),
    ],
)
def test_what_cannot_work_ends_before_it_starts(screen, tmp_path, capsys, monkeypatch, out, more, said):
    monkeypatch.chdir(tmp_path)
    assert run(["report", str(screen), out, *LABELS, "--use-rep", "X_pca", *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "page.html").exists()
