"""Tables and figures beside the page, and the sections that they come from."""

from __future__ import annotations

import builtins
import struct
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest

from perturbscope.errors import ProviderUnavailableError
from perturbscope.report import Absent, Report, files, render_report, write_figures, write_tables
from perturbscope.report.charts.cells import cell_map
from perturbscope.report.charts.heatmap import heat_map
from tests.reports import EVIL, make_report


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


def test_tables_are_those_of_the_report(report, tmp_path):
    written = write_tables(tmp_path, report)
    names = {"scores", "genes", "pairs", "umap", "enrichment", "calibration"}
    assert {path.name for path in written} == {f"{name}{end}" for name in names for end in (".csv", ".parquet")}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    for name, table in files.tables(report).items():
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{name}.parquet"), table)
        assert pd.read_csv(tmp_path / f"{name}.csv").shape == table.shape


def test_figures_are_complete_documents_in_fixed_colours(report, tmp_path):
    written, why = write_figures(tmp_path, report)
    assert why == ""
    names = {f"{kind}-{metric}" for kind in ("effect", "genes") for metric in ("e_distance", "cosine_e_distance")}
    assert {path.stem for path in written} == names | {"umap", "pairs", "calibration"}
    for path in written:
        if path.suffix == ".png":
            data = path.read_bytes()
            assert data.startswith(b"\x89PNG")
            assert struct.unpack(">I", data[16:20])[0] > 900  # pixels across
            continue
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in path.read_text()
        width, height = root.get("width"), root.get("height")
        assert root.get("viewBox") == f"0 0 {width} {height}"
    umap = (tmp_path / "umap.svg").read_text()
    assert "other perturbations</text>" in umap  # a figure has its own legend
    assert "other perturbations</text>" not in render_report(report)
    assert "<script>" not in umap
    assert "&lt;script&gt;" in umap


def test_a_figure_without_its_rasteriser_is_svg_alone(report, tmp_path, monkeypatch):
    real = builtins.__import__

    def fail(name, *rest, **named):
        if name == "resvg_py":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", fail)
    written, why = write_figures(tmp_path, report)
    assert {path.suffix for path in written} == {".svg"}
    assert "pip install 'perturbscope[report]'" in why


def test_a_system_without_fonts_gets_no_figure_without_words(monkeypatch):
    monkeypatch.setattr(files, "_png", lambda text: b"the same")
    assert "no fonts" in files.no_png()


def test_a_figure_that_is_absent_is_not_written(report, tmp_path):
    written, _ = write_figures(tmp_path, Report(title="Bare", scores=report.scores))
    assert {path.stem for path in written} == {"effect-e_distance", "effect-cosine_e_distance"}
    assert set(files.tables(Report(title="Bare", scores=report.scores))) == {"scores"}


def test_pairs_are_symmetric_and_name_who_acts_alike(report):
    frame = pd.DataFrame(report.pairs.distances, index=report.pairs.names, columns=report.pairs.names)
    np.testing.assert_array_equal(frame, frame.T)
    assert frame.index[0] == "control"
    assert (np.diag(frame) == 0).all()
    for row in report.pairs.table.itertuples():
        assert frame.loc[row.a, row.b] == max(row.distance, 0)
    # gene0, gene2, ... are moved along the first axis, gene1, gene3, ... along the second.
    groups = [set(group) for group in report.pairs.alike]
    assert {"gene1", "gene3"} in groups
    assert not any(group & {"gene0", "gene2", "gene4"} and group & {"gene1", "gene3"} for group in groups)


def test_one_perturbation_has_no_pairs_and_no_umap_is_no_end():
    def fail(*_, **__):
        raise ProviderUnavailableError("not installed")

    made = make_report(names=1, projector=fail)
    assert made.projection == Absent("not installed")
    assert not isinstance(made.pairs, Absent)  # the evil name is the second
    assert len(made.pairs.names) == 3


def test_the_heat_map_draws_every_pair_once(report):
    pairs = report.pairs
    svg = ET.fromstring(heat_map(pairs.names, pairs.distances, pairs.tree, control="control"))
    n = len(pairs.names)
    squares = sum(path.get("d").count("M") for path in svg.findall("path") if path.get("class", "").startswith("h"))
    assert squares == n * n
    assert [text.text for text in svg.findall("text")].count(EVIL[:17] + "…") == 2
    calm = ET.fromstring(heat_map(pairs.names, pairs.distances, pairs.tree, control="control", noise=1e6))
    assert [path.get("class") for path in calm.findall("path")] == ["tree", "h8"]  # all of it is noise, all the same
    constant = ET.fromstring(heat_map(["a", "b"], np.zeros((2, 2)), np.array([[0.0, 1.0, 0.0, 2.0]]), control="a"))
    assert len(constant.findall("path[@class='h0']")) == 1


def test_the_map_draws_every_cell_once_in_the_frame():
    points = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    labels = ["control"] * 10 + [f"g{i}" for i in range(10) for _ in range(3)]
    svg = ET.fromstring(cell_map(points, labels, control="control", ranked=[f"g{i}" for i in range(10)]))
    paths = svg.findall("path")
    assert sum(path.get("d").count("M") for path in paths) == 40
    assert [path.get("data-name") for path in paths][:1] == ["control"]
    assert {path.get("class") for path in paths} == {
        "cells control",
        "cells others",
        *(f"cells c{i}" for i in range(7)),
    }
    at = np.array(
        [dot.split() for path in paths for dot in path.get("d").replace("h0", "").split("M")[1:]], dtype=float
    )
    assert (at >= 9.9).all()
    assert (at[:, 0] <= 630.1).all()
    assert (at[:, 1] <= 470.1).all()
    single = ET.fromstring(cell_map(points[:1], ["a"], control="control", ranked=["a"]))
    assert single.find("path").get("d") == "M320.0 240.0h0"
