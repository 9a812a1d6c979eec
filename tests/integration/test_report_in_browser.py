"""The report in a real browser: nothing fetched, nothing wrong, everything usable, on a laptop and on a phone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.report import Report, write_report
from serving.access.keys import keys_to_json, make_key
from tests.integration.browser import MISSING, Browser, find_browser
from tests.integration.server import ROOT, environment
from tests.ports import free_ports
from tests.reports import EVIL, make_report
from tests.unit.serving.conftest import write_h5ad

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)
SIZES = [(1280, False), (1280, True), (390, False), (390, True)]
NAMES = ["laptop-light", "laptop-dark", "phone-light", "phone-dark"]

CONTRAST = """(() => {
  // The smallest contrast (WCAG 2) of text against what lies behind it, and that text.
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour) => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => {
    const part = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = c.slice(0, 3).map((v) => part(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let e = node; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  let worst = [99, ''];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.getClientRects().length) continue;
    if (['SCRIPT', 'OPTION', 'TITLE', 'title'].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(rgb(node.closest('svg') ? style.fill : style.color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, walk.currentNode.data.trim()];
  }
  return worst;
})()"""

COLLISIONS = """[...document.querySelectorAll('svg.points')].flatMap((chart) => {
  if (!chart.getClientRects().length) return [];
  const names = [...chart.querySelectorAll('.label text')].map((t) => [t.textContent, t.getBoundingClientRect()]);
  const hits = [];
  names.forEach(([a, p], i) => names.slice(0, i).forEach(([b, q]) => {
    if (p.left < q.right - 1 && q.left < p.right - 1 && p.top + 3 < q.bottom - 3 && q.top + 3 < p.bottom - 3)
      hits.push(`${a} ${b}`);
  }));
  return hits;
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, make_report(names=12, title=f"A screen with a {'very ' * 12}long name {EVIL}"))
    return path.as_uri()


def choose(browser: Browser, selector: str, value: str) -> None:
    """Set a field, as its reader would."""
    browser.run(
        f"(() => {{ const f = document.querySelector({json.dumps(selector)}); f.value = {json.dumps(value)}; "
        "f.dispatchEvent(new Event('input')); f.dispatchEvent(new Event('change')); })()"
    )


def shown(browser: Browser) -> list[str]:
    """Names of the rows of the table that are to be seen, in their order."""
    found: list[str] = browser.run(
        "[...document.querySelectorAll('#scores tbody tr')].filter((r) => !r.hidden).map((r) => r.dataset.name)"
    )
    return found


@pytest.mark.parametrize(("width", "dark"), SIZES, ids=NAMES)
def test_it_fits_reads_well_and_fetches_nothing(browser: Browser, page: str, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.run("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
    ratio, text = browser.run(CONTRAST)
    assert ratio >= 4.5, f"{text!r} has a contrast of {ratio:.2f}"
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (max(json.loads(background.replace("rgb(", "[").replace(")", "]"))) < 60) == dark
    assert browser.run("document.querySelectorAll('.label text').length") > 8
    assert browser.run(COLLISIONS) == []
    assert browser.requests == [page]
    assert browser.problems == []


def test_text_of_charts_can_be_read_on_a_phone(browser: Browser, page: str) -> None:
    browser.open(page, width=390)
    smallest = browser.run(
        "Math.min(...[...document.querySelectorAll('.points .tick, .points .label text, .heat text')]"
        ".filter((t) => t.getClientRects().length)"
        ".map((t) => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a || 99))"
    )
    assert smallest >= 9
    assert browser.run("document.querySelectorAll('.for-narrow svg').length") == browser.run(
        "document.querySelectorAll('.for-wide svg').length"
    )


def test_the_table_searches_and_sorts(browser: Browser, page: str) -> None:
    browser.open(page)
    first = shown(browser)
    assert len(first) == 14
    assert first[0] == "gene0"
    browser.type("#search", "GENE1")
    assert sorted(shown(browser)) == ["gene1", "gene10", "gene11"]
    assert browser.run("document.querySelector('#count').textContent") == "3 shown"
    choose(browser, "#search", "")
    browser.click("#scores th:nth-child(1) button")
    assert shown(browser) == sorted(first, key=str.casefold)
    browser.click("#scores th:nth-child(3) button")
    z = browser.run(
        "[...document.querySelectorAll('#scores tbody tr:not([hidden]) td:nth-child(3)')].map((c) => c.dataset.value)"
    )
    assert z[-1] == ""  # not scored: last, both ways
    assert [float(v) for v in z[:-1]] == sorted((float(v) for v in z[:-1]), reverse=True)
    browser.click("#scores th:nth-child(3) button")
    assert browser.run("document.querySelector('#scores th:nth-child(3)').ariaSort") == "ascending"
    assert shown(browser)[-2:] == ["gene0", "few"]
    assert browser.problems == []


def test_the_metric_is_chosen(browser: Browser, page: str) -> None:
    browser.open(page)
    choose(browser, "#metric", "cosine_e_distance")
    assert browser.run("document.querySelector('#effect-e_distance').hidden") is True
    assert browser.run("document.querySelector('#effect-cosine_e_distance').hidden") is False
    assert len(shown(browser)) == 14


def test_a_perturbation_in_focus_is_marked_everywhere(browser: Browser, page: str) -> None:
    browser.open(page)
    colour = (
        "getComputedStyle([...document.querySelectorAll('.map .cells')].find((c) => c.dataset.name === 'gene3')).stroke"
    )
    before = browser.run(colour)
    choose(browser, "#focus", "gene3")
    assert browser.run(colour) != before
    assert browser.run("document.querySelector('.map').classList.contains('one')")
    assert browser.run("[...document.querySelectorAll('#keys .key')].map((k) => k.textContent)") == ["control", "gene3"]
    assert browser.run("document.querySelector('.map').lastElementChild.dataset.name") == "gene3"
    assert set(browser.run("[...document.querySelectorAll('.focus')].map((e) => e.dataset.name)")) == {"gene3"}
    # A click on a row does the same, and a second one undoes it; labels from the data are only ever text.
    browser.click(f"#scores tr[data-name={json.dumps(EVIL)}]")
    assert browser.run("document.querySelector('#focus').value") == EVIL
    assert EVIL in browser.run("document.querySelector('#keys').textContent")
    browser.click(f"#scores tr[data-name={json.dumps(EVIL)}]")
    assert browser.run("document.querySelector('#focus').value") == ""
    assert browser.run("document.querySelectorAll('.focus').length") == 0
    assert browser.problems == []


def test_the_heat_map_names_its_pairs(browser: Browser, page: str) -> None:
    browser.open(page)
    browser.run(
        "(() => { const g = document.querySelector('.heat .pick'); const b = g.getBoundingClientRect(); "
        "g.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + 2, clientY: b.bottom - 2})) })()"
    )
    assert "distance" in browser.run("document.querySelector('#pair').textContent")


def test_a_report_of_scores_alone_works(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bare.html"
    write_report(path, Report(title="Bare", scores=make_report(names=2).scores))
    browser.open(path.as_uri())
    browser.click("#scores tbody tr")
    assert browser.run("document.querySelectorAll('tr.focus').length") == 2  # one a metric
    assert browser.problems == []


def test_a_screen_is_uploaded_in_the_browser(browser: Browser, tmp_path: Path, upload_server: tuple[str, Path]) -> None:
    address, file = upload_server
    for width in (390, 1280):
        browser.open(address, width=width, dark=width == 390)
        assert browser.run("document.documentElement.scrollWidth") == width
        ratio, text = browser.run(CONTRAST)
        assert ratio >= 4.5, f"{text!r} has a contrast of {ratio:.2f}"
    browser.choose_file("#file", file)
    browser.wait("document.querySelector('select#control')")
    assert browser.run("document.querySelector('#perturbation_key').value") == "perturbation"
    assert browser.run("document.querySelector('#control').value") == "control"
    assert "24 cells" in browser.run("document.querySelector('#status').textContent")
    # A label that cannot be scored: the server's own words are shown.
    browser.run("document.querySelector('#batch_key').value = 'batch'")
    browser.run("document.querySelector('#use_rep').value = 'X_pca'")
    browser.click("#go")
    browser.wait("!document.querySelector('#error').hidden || !document.querySelector('#done').hidden")
    assert "at least 20 are needed" in browser.run("document.querySelector('#error').textContent")
    # Nothing is chosen that was not recognised: without a control among the labels, the form is not sent.
    choose(browser, "#perturbation_key", "batch")
    assert browser.run("document.querySelector('#control').selectedOptions.length") == 0
    assert "none is chosen" in browser.run("document.querySelector('#control_note').textContent")
    assert browser.run("document.querySelector('#form').checkValidity()") is False
    browser.click("#example")
    browser.wait("document.querySelector('#status').textContent.startsWith('2,038 cells')")
    assert browser.run("document.querySelector('#control').value") == "control"
    assert browser.run("['layer', 'gene_key'].map((id) => document.getElementById(id).tagName)") == ["SELECT"] * 2
    assert all(item.startswith((address, "blob:")) for item in browser.requests)


@pytest.mark.parametrize("with_key", [True])
def test_a_key_is_typed_in_and_kept_nowhere(
    browser: Browser, upload_server: tuple[str, Path], key: str, with_key: bool
) -> None:
    address, file = upload_server
    browser.open(address)
    browser.choose_file("#file", file)
    browser.wait("!document.querySelector('#error').hidden")
    error = "document.querySelector('#error').textContent"
    assert browser.run(error) == "Give your API key first."
    for typed, said in (("psk_00000000_no", "wants a valid API key"), ("ключ", "not an API key")):
        browser.run(f"document.querySelector('#key').value = '{typed}'")
        browser.run("document.querySelector('#key').dispatchEvent(new Event('change'))")
        browser.wait(f"{error}.includes('{said}')")
    browser.run("document.querySelector('#key').value = ''")
    browser.type("#key", key)
    browser.run("document.querySelector('#key').dispatchEvent(new Event('change'))")
    browser.wait("document.querySelector('select#control')")
    kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
    assert key not in browser.run(kept)
    assert browser.run("new FormData(document.querySelector('#form')).get('key')") is None
    assert all(key not in item for item in browser.requests)


@pytest.fixture
def with_key() -> bool:
    """Whether the server asks for a key."""
    return False


@pytest.fixture
def key(tmp_path: Path) -> str:
    """A good key; its file lies beside the screen."""
    entry, text = make_key("browser")
    (tmp_path / "keys.json").write_bytes(keys_to_json((entry,)))
    return text


@pytest.fixture
def upload_server(tmp_path: Path, key: str, with_key: bool) -> Iterator[tuple[str, Path]]:
    """The upload page and its routes over a fake model, in a process of its own, and a screen for it."""
    environ = environment(keys=tmp_path / "keys.json") if with_key else environment()
    counts = np.random.default_rng(0).poisson(2.0, size=(24, 5)) + 1
    file = write_h5ad(CountMatrix.from_matrix(counts, ["STAT1", "JAK2", "ACTB", "GAPDH", "CD3E"]), tmp_path / "a.h5ad")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.integration.upload_server", str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=environ) as process:
        address = f"http://127.0.0.1:{port}/"
        try:
            for _ in range(600):
                try:
                    httpx.get(address, timeout=1)
                    break
                except httpx.TransportError:
                    assert process.poll() is None
            yield address, file
        finally:
            process.kill()
