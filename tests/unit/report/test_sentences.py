"""Every sentence of the report, and the states of a screen in which it may appear."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from perturbscope.report import Report, build_report, render_report
from perturbscope.report.sentences import CAUTIONS, CONCLUSIONS, said
from perturbscope.scoring.calibration import Calibration
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.results import ScoreOptions
from perturbscope.tasks.trained_on import Seen
from tests.reports import first_two, make_report

OPTIONS = ScoreOptions(permutations=49, centre=True)
SIZES = {"control": 60, "far": 24, "same": 24}


@cache
def screen(**change: object) -> Report:
    """A screen in which `far` differs from control and `same` does not."""
    sizes = dict(change.get("sizes", tuple(SIZES.items())))
    labels = [name for name, n in sizes.items() for _ in range(n)]
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(labels), 4)) + 2
    vectors[[label == "far" for label in labels], 0] += 3
    if change.get("constant"):
        vectors[:] = 1
    batches = {"apart": labels, "shared": [f"b{i % 6}" for i in range(len(labels))]}.get(str(change.get("batches")))
    scores = score_perturbations(vectors, labels, control="control", batches=batches, options=OPTIONS)
    return build_report(
        vectors.astype(np.float32), labels, scores, title="Screen", options=OPTIONS, batches=batches,
        projector=first_two,
    )  # fmt: skip


def with_q(report: Report, q: float) -> Report:
    table = report.scores.table
    return replace(report, scores=replace(report.scores, table=table.assign(q=table["q"].where(table["q"].isna(), q))))


def known(how: str) -> Report:
    report = screen()
    return replace(report, scores=Seen(how=how, source="x", n_cells=9).add_to(report.scores))  # type: ignore[arg-type]


def covered(n_genes: int, n_matched: int) -> Report:
    report = screen()
    facts = {**report.scores.provenance, "coverage": {"n_genes": n_genes, "n_matched": n_matched}}
    return replace(report, scores=replace(report.scores, provenance=facts))


def few_splits() -> Report:
    report = screen()
    assert isinstance(report.calibration, Calibration)
    sets = tuple(replace(item, p=item.p[:3], z=item.z[:3]) for item in report.calibration.sets)
    return replace(report, calibration=replace(report.calibration, sets=sets))


USUAL, CARE = {"differ", "no difference", "calibrated"}, {"small", "no batches"}
STATES: dict[str, tuple[Callable[[], Report], set[str], set[str], str]] = {
    "one differs": (screen, USUAL, CARE, "1 of 2 perturbations differ from control"),
    "genes too": (make_report, USUAL | {"silent", "alike", "too small"}, CARE | {"warned"}, "6 of 7"),
    "none differs": (lambda: with_q(screen(), 1.0), USUAL, CARE, "0 of 2 perturbations differ from control"),
    "all differ": (lambda: with_q(screen(), 0.01), {"differ", "calibrated"}, CARE, "2 of 2 perturbations differ"),
    "one perturbation": (
        lambda: screen(sizes=(("control", 60), ("far", 24))),
        {"differ", "calibrated"}, CARE, "1 of 1 perturbation differs from control",
    ),
    "large groups": (
        lambda: screen(sizes=(("control", 120), ("same", 60))),
        USUAL, {"no batches"}, "0 of 1 perturbation differs from control",
    ),
    "batches shared": (lambda: screen(batches="shared"), USUAL, {"small"}, "1 of 2 perturbations differ"),
    "batches apart": (
        lambda: screen(batches="apart"),
        {"untested", "calibrated"}, {"warned"}, "cannot be told for any perturbation (E-distance): p is undefined, "
        "because no batch holds cells of both groups.",
    ),
    "all vectors the same": (
        lambda: screen(constant=True), {"untested"}, {"warned"}, "because all cells of both groups have the same vector"
    ),
    "one too small": (
        lambda: screen(sizes=(*SIZES.items(), ("few", 3))),
        USUAL | {"too small"}, CARE | {"warned"}, "Not scored, too few cells: few.",
    ),
    "fine-tuned on it": (
        lambda: known("fine_tuned_on_this_file"), USUAL, CARE | {"warned"}, "Not to be believed, since the model was"
    ),
    "pre-trained on it": (
        lambda: known("pretrained_on_this_file"), USUAL, CARE | {"warned"}, "1 of 2 perturbations differ"
    ),
    "few genes": (lambda: covered(300, 1), USUAL, CARE | {"coverage"}, "1 of 2 perturbations differ"),
    "a panel": (lambda: covered(300, 300), USUAL, CARE | {"coverage"}, "1 of 2 perturbations differ"),
    "many genes": (lambda: covered(20_000, 15_000), USUAL, CARE, "1 of 2 perturbations differ"),
    "few splits": (few_splits, USUAL, CARE, "3 splits of the controls by cell are too few to tell"),
}  # fmt: skip
NEVER = (
    r"\b(0 of 0|of the 0|nan|None)\b",
    r"give the batches",
    r"\b1 (perturbations|genes|cells)\b",
    r"\bThe one that differs have\b",
)
"""What no state of a screen may make the page say."""


@pytest.mark.parametrize("name", STATES)
def test_sentences_follow_from_the_numbers(name: str) -> None:
    make, concluded, warned, sentence = STATES[name]
    report = make()
    found, cautions = said(report, CONCLUSIONS), said(report, CAUTIONS)
    assert (set(found), set(cautions)) == (concluded, warned)
    assert sentence in "\n".join(line for lines in found.values() for line in lines)
    text = "\n".join(line for lines in [*found.values(), *cautions.values()] for line in lines)
    for pattern in NEVER:
        assert not re.search(pattern, text), text
    page = render_report(report)
    shown = re.search(r'<div class="fact[^"]*"><b>([^<]*)</b><span>differ', page)
    assert shown is not None
    # A number of differences is shown only where one could be found.
    assert (shown[1] == "\N{EN DASH}") == ("differ" not in concluded)


def test_the_table_of_states_has_every_sentence() -> None:
    concluded = set().union(*(state[1] for state in STATES.values()))
    warned = set().union(*(state[2] for state in STATES.values()))
    assert (concluded, warned) == (set(CONCLUSIONS), set(CAUTIONS))
