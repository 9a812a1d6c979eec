"""The report: complete, escaped, self-contained, and true to the table."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from perturbscope.report import render_report, write_report
from perturbscope.report.charts import Point, effect_chart, qq_chart
from perturbscope.report.words import number, p_value
from perturbscope.scoring import ScoreOptions, calibrate, score_perturbations

EVIL = "<script>alert('x')</script>&\"quoted\""


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(0)
    sizes = {"control": 80, EVIL: 30, "moved": 30, "same": 30, "few": 4}
    labels = np.repeat(list(sizes), list(sizes.values()))
    vectors = rng.normal(size=(len(labels), 4)) + 1
    vectors[labels == "moved", 0] += 3
    options = ScoreOptions(metrics=("e_distance", "cosine_e_distance"), permutations=199)
    batches = np.array([f"b{i % 8}" for i in range(len(labels))])
    result = score_perturbations(vectors, labels, control="control", options=options)
    return result, calibrate(vectors, labels, control="control", batches=batches, splits=20)


class Page(HTMLParser):
    """Tags that are left open, text by tag, and everything that would be fetched."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.cells, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.fetched += [found[key] for key in ("src", "href", "action") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.remove(tag) if tag in self.open else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


def test_page_is_well_formed_and_fetches_nothing(scored):
    text = render_report(scored[0], title="Screen", calibration=scored[1])
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", text)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_every_row_of_the_table_is_there(scored):
    page = Page(render_report(scored[0], title="Screen"))
    names = page.cells[::10]
    assert names == list(scored[0].table["perturbation"])
    row = scored[0].table.iloc[0]
    assert page.cells[2] == number(row["z"])
    assert page.cells[3] == p_value(row["q"])
    assert "\N{EN DASH}" in page.cells  # what could not be scored is a dash, not a number


def test_all_text_is_escaped(scored):
    text = render_report(scored[0], title=EVIL, calibration=scored[1])
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "&lt;script&gt;alert(" in text


def test_conclusions_say_what_the_table_says(scored):
    text = render_report(scored[0], title="Screen", calibration=scored[1])
    assert "1 of 3 perturbations differ from control at q &lt; 0.05 (E-distance)" in text
    assert "Strongest by E-distance: moved" in text
    assert "Not scored, too few cells: few." in text
    assert "20 splits of the controls by cell gave p-values that are uniform" in text
    assert "fewer cells than the floor" in text
    assert scored[0].warnings[0].split(":")[0] in text
    assert "cannot show that its p-values hold" in render_report(scored[0], title="Screen")


def test_file_is_replaced_whole_or_not_at_all(scored, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, scored[0], title="Screen")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_report(path, scored[0], title="Screen", calibration=scored[1])
    assert path.read_text(encoding="utf-8") == render_report(scored[0], title="Screen", calibration=scored[1])


@pytest.mark.parametrize("scale", [1, 5, 30, 500, 20_000])
def test_effect_chart_places_every_point_inside(scale):
    rng = np.random.default_rng(scale)
    points = [
        Point(f"gene{i}", float(z), float(q)) for i, (z, q) in enumerate(rng.uniform(0.001, 1, (40, 2)) * [scale, 1])
    ]
    svg = ET.fromstring(effect_chart([*points, Point("none", float("nan"), float("nan"))], metric="E-distance"))
    dots = svg.findall("circle")
    assert len(dots) == 40
    assert all(58 <= float(dot.get("cx")) <= 542 and 16 <= float(dot.get("cy")) <= 348 for dot in dots)
    at = {dot.find("title").text.split(":")[0]: float(dot.get("cx")) for dot in dots}
    assert (np.diff([at[point.name] for point in sorted(points, key=lambda point: point.z)]) >= 0).all()
    assert len([tick for tick in svg.findall("text") if tick.get("class") == "tick"]) >= 6


def test_effect_chart_without_points():
    assert "<svg" not in effect_chart([Point("a", float("nan"), 0.1)], metric="E-distance")


def test_qq_of_perfect_p_values_lies_on_the_diagonal():
    svg = ET.fromstring(qq_chart([("perfect", [(i + 0.5) / 50 for i in range(50)])]))
    line = svg.find("line[@class='threshold']")
    slope = (float(line.get("y2")) - float(line.get("y1"))) / (float(line.get("x2")) - float(line.get("x1")))
    for dot in svg.find("g").findall("circle"):
        expected = float(line.get("y1")) + slope * (float(dot.get("cx")) - float(line.get("x1")))
        assert float(dot.get("cy")) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (float("nan"), "\N{EN DASH}"),
        (12345.6, "12,346"),
        (-0.5, "\N{MINUS SIGN}0.5"),
        (2e-5, "2.0e\N{MINUS SIGN}05"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_probabilities():
    assert [p_value(p) for p in (1.0, 0.0312, 0.000999, 0.0001)] == ["1.000", "0.031", "0.001", "1.0e\N{MINUS SIGN}04"]
