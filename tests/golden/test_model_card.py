"""The default model's card says what its manifest and the tables of the benchmarks say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CARD = (ROOT / "docs/default-model-card.md").read_text()
WORDS = " ".join(CARD.split())
MANIFEST = json.loads((ROOT / "bundles/default/manifest.json").read_text())
QUALITY = (ROOT / "benchmarks/quality.md").read_text()
SCREENS = {"Papalexi": "## Papalexi et al.", "Jurkat": "## Datlinger et al.", "Kang": "## Kang et al."}
COLUMNS = ["HVG-300", "PCA-200", "PCA-50", "scVI-Linear", "scVI-5L", "default"]
"""Models of the card's table, by their names in the tables of the benchmark."""


def at_a_glance(screen: str) -> dict[str, dict[str, str]]:
    """Rows of a screen's first table by model, each by column."""
    section = QUALITY[QUALITY.index(f"\n{SCREENS[screen]}") :]
    lines = section[section.index("### At a glance") :].split("\n\n")[1].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def rows_of_the_card(screen: str) -> dict[str, list[str]]:
    """The three measures of a screen in the card's table, a value a model."""
    lines = CARD.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {screen}, ") and "median z" in line)
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[first : first + 3]]
    return {row[1]: row[2:] for row in cells}


def test_the_card_in_the_bundle_is_the_page() -> None:
    assert (ROOT / "bundles/default/MODEL_CARD.md").read_text() == CARD


def test_cost_and_size_are_those_of_the_manifest() -> None:
    tuned, trained = MANIFEST["training"], MANIFEST["training"]["parent"]
    model, loop = tuned["model_config"], tuned["hyper_parameters"]["loop"]
    result, before = tuned["result"], trained["result"]
    perplexity = before["validation"][-1]["validation_perplexity"]
    claims = [
        f"{model['layers']} blocks x {model['hidden']}, {model['heads']} heads, feed-forward {model['feed_forward']}",
        f"up to {model['max_length']} genes",
        f"{before['steps']} steps of {trained['hyper_parameters']['loop']['micro_batch']} cells",
        f"perplexity on held-out cells {perplexity:,.0f}",
        f"| {before['seconds']:,.0f} s, ",
        f"{loop['epochs']} epochs, {result['steps']:,} steps of {loop['micro_batch']} cells",
        f"| {result['seconds']:,.0f} s on one core |",
        f"from commit {tuned['code']['git_revision'][:7]}",
        f"from commit {trained['code']['git_revision'][:7]}",
        ", ".join(tuned["split"]["papalexi"]["targets"]["train"]),
    ]
    assert [claim for claim in claims if claim not in WORDS] == []
    assert ("changes that were not committed" in WORDS) == tuned["code"]["modified"]


@pytest.mark.parametrize("screen", ["Papalexi", "Jurkat"])
def test_the_tables_are_those_of_the_benchmark(screen: str) -> None:
    table, card = at_a_glance(screen), rows_of_the_card(screen)
    for model, z, detected, found in zip(COLUMNS, card["median z"], card["q < 0.05"], card[mean(card)], strict=True):
        row = table[model]
        assert float(z) == pytest.approx(float(row["median z"]), abs=0.051), model
        assert detected == row["detected (pretended)"].partition(" (")[0], model
        value, _, chance = row["mAP by guide (chance)"].partition(" (")
        assert (found, mean(card)) == (value, f"mAP (chance {chance[:-1]})"), model


def mean(card: dict[str, list[str]]) -> str:
    """Name of the row of retrieval, which holds its chance."""
    return next(name for name in card if name.startswith("mAP"))


def test_what_speaks_against_the_model_is_said() -> None:
    null = {screen: float(at_a_glance(screen)["default"]["null KS p"]) for screen in SCREENS}
    assert f"(Kolmogorov-Smirnov p {null['Papalexi']:.2f} and {null['Jurkat']:.2f}" in WORDS
    assert f"not on Kang ({null['Kang']:.4f})" in WORDS
    jurkat = at_a_glance("Jurkat")
    before, now = (jurkat[name]["mAP by guide (chance)"].partition(" (")[0] for name in ("pre-trained", "default"))
    assert f"mAP is {before} after pre-training, {now} now" in WORDS
    steps = re.search(r"\((\d+) steps instead of ([\d,]+)\)|; (\d+) steps instead of ([\d,]+)\)", QUALITY)
    assert steps
    short, whole = (int(value.replace(",", "")) for value in steps.groups() if value)
    assert whole == MANIFEST["training"]["result"]["steps"]
    assert round(whole / short) == 9
    assert "a ninth of the steps" in WORDS
