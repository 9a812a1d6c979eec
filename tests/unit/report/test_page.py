"""The report: complete, escaped, self-contained, and true to the table."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from perturbscope.report import Absent, Report, render_report, write_report
from perturbscope.report.charts.frame import NARROW, WIDE
from perturbscope.report.charts.quantiles import qq_chart
from perturbscope.report.charts.scatter import Point, effect_chart
from perturbscope.report.sentences import cautions, conclusions, listing, number, p_value
from perturbscope.tasks.trained_on import Seen
from tests.reports import EVIL, make_report


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def bare(report) -> Report:
    """Scores alone."""
    return Report(title="Screen", scores=report.scores)


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


def test_page_is_well_formed_and_fetches_nothing(report):
    text = render_report(report)
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.fetched)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", text)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_every_row_of_the_table_is_there(report):
    page = Page(render_report(report))
    table = report.scores.table
    names = page.cells[: 11 * len(table) : 11]
    assert names == list(table["perturbation"])
    row = table.iloc[0]
    assert page.cells[2] == number(row["z"])
    assert page.cells[3] == p_value(row["q"])
    genes = report.degs.set_index("perturbation")["n_degs"]
    assert page.cells[6] == number(float(genes[row["perturbation"]]))
    assert "\N{EN DASH}" in page.cells  # what could not be scored is a dash, not a number


def test_all_text_is_escaped(report):
    text = render_report(replace(report, title=EVIL))
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "&lt;script&gt;alert(" in text


def test_conclusions_say_what_the_tables_say(report):
    hits = report.scores.table.query("metric == 'e_distance' and q < 0.05")
    scored = report.scores.table.query("metric == 'e_distance' and p == p")
    said = conclusions(report)
    assert said[0] == f"{len(hits)} of {len(scored)} perturbations differ from control at q < 0.05 (E-distance)."
    assert said[1].startswith("Strongest by E-distance: gene0 (z ")
    counts = report.degs.set_index("perturbation")["n_degs"]
    silent = [name for name in hits["perturbation"] if counts[name] == 0]
    assert silent
    verb = "has" if len(silent) == 1 else "have"
    assert any(f"{len(silent)} of the {len(hits)} that differ {verb} no" in line for line in said)
    assert "Not scored, too few cells: few." in said
    assert any("200 splits of the controls by cell gave p-values that are uniform" in line for line in said)


def test_cautions_name_few_cells_missing_batches_and_low_coverage(report):
    said = "\n".join(cautions(report))
    assert report.scores.warnings[0] in said
    assert "have fewer than 50; only large effects" in said
    assert "No batches were named" in said
    assert "coverage" not in said

    def with_facts(**facts):
        scores = replace(report.scores, provenance={**report.scores.provenance, **facts})
        return "\n".join(cautions(replace(report, scores=scores)))

    assert "No batches" not in with_facts(batches=4)
    assert "knows 200 of the file's 500 genes" in with_facts(coverage={"n_genes": 500, "n_matched": 200})
    assert "holds 260 genes that the model knows" in with_facts(coverage={"n_genes": 300, "n_matched": 260})
    assert "coverage" not in with_facts(coverage={"n_genes": 20_000, "n_matched": 15_000})


@pytest.mark.parametrize(
    ("how", "said", "warned"),
    [
        ("fine_tuned_on_this_file", "Not to be believed, since the model was fine-tuned", "Fine-tuned on this file: "),
        ("perhaps_fine_tuned_on_these_cells", "Not to be believed if these are", "Perhaps fine-tuned on these cells: "),
        ("pretrained_on_this_file", "", "Trained on this file, without its labels: "),
    ],
)
def test_no_number_of_differences_without_saying_that_the_model_knew_the_cells(report, how, said, warned):
    seen = Seen(how=how, source="<thp1>", n_cells=9)
    known = replace(report, scores=seen.add_to(report.scores))
    counts = [line for line in conclusions(known) if "perturbations differ from control" in line]
    assert len(counts) == 2
    assert all(line.startswith(said) for line in counts)
    assert conclusions(known)[0] == counts[0]
    assert cautions(known)[0].startswith(warned)
    text = render_report(known)
    assert Page(text).open == []
    assert "<thp1>" not in text
    assert text.count('class="fact doubtful"') == (2 if said else 0)
    assert ("differ from control (q &lt; 0.05), not to be believed" in text) == bool(said)


def test_what_calibration_warns_of_is_on_the_page(report):
    calibration = replace(report.calibration, warnings=["Calibration used 9 of the 99 controls."])
    assert "Calibration used 9 of the 99 controls." in cautions(replace(report, calibration=calibration))


def test_parts_that_are_missing_say_why(bare):
    text = render_report(replace(bare, projection=Absent("No scranpy <here>.")))
    assert "cannot show that its p-values hold" in text
    assert "Genes were not tested one by one." in text
    assert "No gene sets were given." in text
    assert "No scranpy &lt;here&gt;." in text
    assert Page(text).open == []


def test_where_nothing_differs_the_heat_map_says_so(report):
    text = "None of these perturbations was shown to differ"
    assert text not in render_report(report)
    assert text in render_report(replace(report, pairs=replace(report.pairs, n_hits=0)))


def test_file_is_replaced_whole_or_not_at_all(report, bare, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, bare)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_report(path, report)
    assert path.read_text(encoding="utf-8") == render_report(report)


@pytest.mark.parametrize("frame", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scale", [1, 5, 30, 500, 20_000])
def test_effect_chart_places_every_point_inside(scale, frame):
    rng = np.random.default_rng(scale)
    points = [
        Point(f"gene{i}", float(z), float(q)) for i, (z, q) in enumerate(rng.uniform(0.001, 1, (40, 2)) * [scale, 1])
    ]
    svg = ET.fromstring(
        effect_chart([*points, Point("none", float("nan"), float("nan"))], metric="E-distance", frame=frame)
    )
    dots = svg.findall("circle")
    assert len(dots) == 40
    assert all(frame.x0 <= float(dot.get("cx")) <= frame.x1 for dot in dots)
    assert all(frame.y1 <= float(dot.get("cy")) <= frame.y0 for dot in dots)
    at = {dot.find("title").text.split(":")[0]: float(dot.get("cx")) for dot in dots}
    assert (np.diff([at[point.name] for point in sorted(points, key=lambda point: point.z)]) >= 0).all()
    assert len([tick for tick in svg.findall("text") if tick.get("class") == "tick"]) >= 6
    boxes = [box_of(text) for text in svg.findall("g[@class='label']/text")]
    assert boxes or frame is NARROW  # where all points crowd together there is no room
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if overlap(a, b)]


def box_of(text):
    """Left, top, right, bottom of a name, at 7.5 units a letter."""
    x, y, width = float(text.get("x")), float(text.get("y")), 7.5 * len(text.text)
    left = x - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
    return left, y - 11, left + width, y + 3


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


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


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b and c"), (["a", "b", "c", "d"], "a, b and 2 more")],
)
def test_listings(names, text):
    assert listing(names, 3 if len(names) < 4 else 2) == text
