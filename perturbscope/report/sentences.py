"""The report's sentences: conclusions, cautions, and how to read the numbers.

:data:`CONCLUSIONS` and :data:`CAUTIONS` are the table of all sentences. Each is a function of :class:`_Facts`, which
are taken from the numbers alone, and returns nothing where it does not hold; a test says in which states of a screen
each may appear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from perturbscope.report.contents import Pairs, Report
from perturbscope.scoring.calibration import Calibration, CalibrationSet
from perturbscope.scoring.results import FLAGS
from perturbscope.tasks.trained_on import KEY

METRIC_NAMES = {
    "e_distance": "E-distance",
    "cosine_e_distance": "cosine E-distance",
    "wasserstein": "Wasserstein distance",
}
_SEEN = {
    "fine_tuned_on_this_file": (
        "Fine-tuned on this file",
        "not to be believed, since the model was fine-tuned on cells of this file",
    ),
    "perhaps_fine_tuned_on_these_cells": (
        "Perhaps fine-tuned on these cells",
        "not to be believed if these are the cells on which the model was fine-tuned",
    ),
    "pretrained_on_this_file": ("Trained on this file, without its labels", ""),
}
"""Finding of :mod:`perturbscope.tasks.trained_on` -> its heading, and the doubt that it casts on all numbers."""
FEW_CELLS = 50
"""Number of cells below which only large effects can be detected."""
FEW_SPLITS = 20
"""Number of splits of the controls below which they say nothing of p-values."""
_WITHOUT_P = {
    "batch_confounded": "no batch holds cells of both groups",
    "constant_embeddings": "all cells of both groups have the same vector",
}
"""Flag of a row without a p -> the reason."""
FEW_GENES = 1000
"""Number of known genes below which the model sees only a small part of a cell's transcriptome."""

READING = [
    "Distance: how far a perturbation's cells lie from control cells, less how far cells lie from each other within "
    "each group. With the U estimator it is 0 on average if nothing happened, and may be negative.",
    "z: the distance above its mean over exchanges of the labels 'perturbed' and 'control', in their standard "
    "deviations. It measures an effect relative to noise. It grows with the number of cells, so compare z of equal "
    "numbers alone; and it is skewed, so that about 1 % of perturbations without an effect have z above 3.",
    "p: the share of exchanges of these labels that give a distance at least as large, within batches if there are "
    "any. Its smallest value is 1 / (1 + exchanges). q: p corrected for the number of perturbations.",
    "p treats cells as independent. Wells, donors and guides are not: an effect of the well a perturbation sits in "
    "looks like an effect of the perturbation. Calibration by batch shows how large that can be.",
    "A small q says that cells differ from control, not that the named gene is the cause, nor that the change is "
    "large.",
]


def number(value: float) -> str:
    """Format a number with three significant digits; a missing one is a dash."""
    if math.isnan(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")
    return (f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}").replace("-", "\N{MINUS SIGN}")


def p_value(value: float) -> str:
    """Format a probability with three decimals, or as a power of ten below 0.001."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:.3f}" if value >= 0.00095 else f"{value:.1e}".replace("-", "\N{MINUS SIGN}")


def listing(names: list[str], limit: int = 8) -> str:
    """Join names in a sentence; names above the limit are counted."""
    if len(names) > limit:
        return f"{', '.join(names[:limit])} and {len(names) - limit} more"
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def doubt(report: Report) -> str:
    """Return why the numbers of the page are not to be believed; empty if nothing speaks against them."""
    seen = report.scores.provenance.get(KEY) or {}
    return _SEEN.get(str(seen.get("how")), ("", ""))[1]


@dataclass(frozen=True, eq=False)
class _Facts:
    """What the sentences are made of."""

    report: Report

    @property
    def metrics(self) -> list[str]:
        return list(self.report.scores.provenance["metrics"])

    @cached_property
    def first(self) -> pd.DataFrame:
        """Rows of the first metric, which ranks the perturbations."""
        return self.of(self.metrics[0])

    def of(self, metric: str) -> pd.DataFrame:
        table = self.report.scores.table
        return table[table["metric"] == metric]

    def flagged(self, flag: str) -> list[str]:
        """Perturbations with a flag, by the first metric."""
        return _names(self.first[[flag in flags.split(";") for flags in self.first["flags"].astype(str)]])

    @cached_property
    def hits(self) -> list[str]:
        return _names(self.first[self.first["q"] < 0.05])

    @property
    def calibration(self) -> Calibration | None:
        found = self.report.calibration
        return found if isinstance(found, Calibration) else None


Saying = Callable[[_Facts], list[str]]


def conclusions(report: Report) -> list[str]:
    """Return the report's conclusions as sentences, the most important first."""
    return [sentence for sentences in said(report, CONCLUSIONS).values() for sentence in sentences]


def cautions(report: Report) -> list[str]:
    """Return what a reader should know before trusting a number, as sentences."""
    return [sentence for sentences in said(report, CAUTIONS).values() for sentence in sentences]


def said(report: Report, table: Mapping[str, Saying]) -> dict[str, list[str]]:
    """Return what a report says, by the names of :data:`CONCLUSIONS` or :data:`CAUTIONS`; only those that it says."""
    facts = _Facts(report)
    return {name: sentences for name, say in table.items() if (sentences := say(facts))}


def _names(rows: pd.DataFrame) -> list[str]:
    return [str(name) for name in rows["perturbation"]]


def _differ(facts: _Facts) -> list[str]:
    """How many differ, among those that have a p; where none has one, nothing is said of differences."""
    undone, sentences = doubt(facts.report), []
    for metric in facts.metrics:
        rows, name = facts.of(metric), METRIC_NAMES[metric]
        tested = rows[rows["q"].notna()]
        if not len(tested):
            continue
        hits = tested[tested["q"] < 0.05]
        differ = "differs" if len(tested) == 1 else "differ"
        text = f"{len(hits)} of {count(len(tested), 'perturbation')} {differ} from control at q < 0.05 ({name})"
        sentences.append(f"{undone[0].upper()}{undone[1:]}: {text}." if undone else f"{text}.")
        if len(hits):
            strongest = zip(_names(hits.head(5)), hits["z"].head(5), strict=True)
            listed = [f"{label} (z {number(float(z))})" for label, z in strongest]
            sentences.append(f"Strongest by {name}: {', '.join(listed)}.")
    return sentences


def _untested(facts: _Facts) -> list[str]:
    """Which were scored without a p, and why."""
    sentences = []
    for metric in facts.metrics:
        rows = facts.of(metric)
        scored = ["too_few_cells" not in flags.split(";") for flags in rows["flags"].astype(str)]
        without = rows[rows["q"].isna() & np.asarray(scored, dtype=bool)]
        if not len(without):
            continue
        flags = dict.fromkeys(flag for text in without["flags"].astype(str) for flag in text.split(";"))
        why = [_WITHOUT_P[flag] for flag in flags if flag in _WITHOUT_P]
        because = f", because {' or '.join(why)}" if why else ""
        which = "any perturbation" if rows["q"].isna().all() else listing(_names(without))
        sentences.append(
            f"Whether cells differ from control cannot be told for {which} ({METRIC_NAMES[metric]}): p is "
            f"undefined{because}."
        )
    return sentences


def _silent(facts: _Facts) -> list[str]:
    """Which differ although no gene does."""
    degs, hits = facts.report.degs, facts.hits
    if not isinstance(degs, pd.DataFrame):
        return []
    counts = dict(zip(degs["perturbation"].astype(str), degs["n_degs"], strict=True))
    tested = dict(zip(degs["perturbation"].astype(str), degs.get("n_tested", degs["n_degs"] * 0 + 1), strict=True))
    silent = [name for name in hits if counts.get(name) == 0 and tested[name] > 0]
    if not silent:
        return []
    which = f"{len(silent)} of the {len(hits)} that differ" if len(hits) > 1 else "The one that differs"
    return [
        f"{which} {'have' if len(silent) > 1 else 'has'} no differentially expressed gene, so a test gene by gene "
        f"would miss {'them' if len(silent) > 1 else 'it'}: {listing(silent)}."
    ]


def _alike(facts: _Facts) -> list[str]:
    pairs = facts.report.pairs
    groups = pairs.alike[:3] if isinstance(pairs, Pairs) else []
    return [f"These act alike, nearer to each other than to control: {listing(group)}." for group in groups]


def _no_difference(facts: _Facts) -> list[str]:
    none = facts.first[facts.first["q"] >= 0.05]
    if not len(none):
        return []
    small = (none["n_cells"] < FEW_CELLS).any()
    text = f"No difference was shown for {listing(_names(none))}. That is not proof of no effect"
    return [f"{text}: small groups show only large effects." if small else f"{text}."]


def _too_small(facts: _Facts) -> list[str]:
    skipped = facts.flagged("too_few_cells")
    return [f"Not scored, too few cells: {listing(skipped)}."] if skipped else []


def _calibrated(facts: _Facts) -> list[str]:
    return [_calibration(item) for item in facts.calibration.sets] if facts.calibration else []


def _warned(facts: _Facts) -> list[str]:
    """The warnings of scoring and calibration, in which names of flags become text."""
    warnings = facts.report.scores.warnings + (facts.calibration.warnings if facts.calibration else [])
    return [_readable(warning) for warning in dict.fromkeys(warnings)]


def _small(facts: _Facts) -> list[str]:
    few = _names(facts.first[facts.first["p"].notna() & (facts.first["n_cells"] < FEW_CELLS)])
    have = "have" if len(few) > 1 else "has"
    text = f"{have} fewer than {FEW_CELLS}; only large effects can be seen in so few."
    return [f"Few cells: {listing(few, 5)} {text}"] if few else []


def _no_batches(facts: _Facts) -> list[str]:
    """Said where labels were exchanged, and freely."""
    if facts.report.scores.provenance.get("batches") is not None or facts.report.scores.table["p"].isna().all():
        return []
    return [
        "No batches were named, so labels were exchanged freely. If perturbations are spread unevenly over wells, "
        "lanes or donors, part of what is seen here may be the batch."
    ]


def _coverage(facts: _Facts) -> list[str]:
    """Low gene coverage, if the model embedded the cells in this run."""
    coverage: dict[str, Any] | None = facts.report.scores.provenance.get("coverage")
    if not coverage:
        return []
    n_genes, n_matched = int(coverage["n_genes"]), int(coverage["n_matched"])
    if n_matched < 0.5 * n_genes:
        return [
            f"Low gene coverage: the model knows {n_matched:,} of the file's {n_genes:,} genes. Check that the gene "
            "identifiers are Ensembl ids or symbols of human genes."
        ]
    if n_matched < FEW_GENES:
        return [
            f"Low gene coverage: the file holds {count(n_matched, 'gene')} that the model knows, a small part of the "
            "transcriptome. Effects on other genes cannot be seen."
        ]
    return []


CONCLUSIONS: Mapping[str, Saying] = MappingProxyType(
    {
        "differ": _differ,
        "untested": _untested,
        "silent": _silent,
        "alike": _alike,
        "no difference": _no_difference,
        "too small": _too_small,
        "calibrated": _calibrated,
    }
)
"""Every conclusion by its name, in the order of the page."""
CAUTIONS: Mapping[str, Saying] = MappingProxyType(
    {"warned": _warned, "small": _small, "no batches": _no_batches, "coverage": _coverage}
)
"""Every caution by its name, in the order of the page."""


def _readable(warning: str) -> str:
    """Replace the name of a flag or metric at the start of a warning with readable text."""
    name, colon, rest = warning.partition(": ")
    if colon and (name in FLAGS or name in METRIC_NAMES or name in _SEEN):
        text = METRIC_NAMES.get(name) or (_SEEN[name][0] if name in _SEEN else name.replace("_", " ").capitalize())
        return f"{text}: {rest}"
    return warning


def count(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural if it is not 1."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _calibration(item: CalibrationSet) -> str:
    name, values = METRIC_NAMES[item.metric], f"mean z {number(round(item.z_mean, 2))}, sd {number(item.z_sd)}"
    splits = f"{len(item.p)} splits of the controls by {item.kind}"
    if item.kind == "cell":
        if len(item.p) < FEW_SPLITS:
            return f"{splits} are too few to tell whether p-values are uniform ({values}; {name})."
        verdict = "uniform, as they should be" if item.uniform.p >= 0.01 else "not uniform, so p cannot be relied on"
        test = f"Kolmogorov-Smirnov p = {item.uniform.p:.2g}"
        return f"{splits} gave p-values that are {verdict} ({test}; {values}; {name})."
    small = sum(p < 0.05 for p in item.p) / len(item.p)
    return f"{splits} gave p < 0.05 in {small:.0%} of cases, where 5% are expected by chance ({values}; {name})."
