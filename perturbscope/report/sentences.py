"""The report's sentences: conclusions, cautions, and how to read the numbers."""

from __future__ import annotations

import math

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
FEW_GENES = 1000
"""Number of known genes below which the model sees only a small part of a cell's transcriptome."""

READING = [
    "Distance: how far a perturbation's cells lie from control cells, less how far cells lie from each other within "
    "each group. With the U estimator it is 0 on average if nothing happened, and may be negative.",
    "z: the distance in standard deviations of what groups of controls of the same size show against other controls. "
    "It measures the size of an effect relative to noise, and grows with the number of cells.",
    "p: the share of random exchanges of the labels 'perturbed' and 'control' that give a distance at least as large. "
    "Its smallest value is 1 / (1 + permutations). q: p corrected for the number of perturbations.",
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


def conclusions(report: Report) -> list[str]:
    """Return the report's conclusions as sentences, the most important first."""
    result, undone = report.scores, doubt(report)
    sentences = []
    for metric in result.provenance["metrics"]:
        rows = result.table[result.table["metric"] == metric]
        scored = rows[rows["p"].notna()]
        hits = scored[scored["q"] < 0.05]
        name = METRIC_NAMES[metric]
        said = f"{len(hits)} of {len(scored)} perturbations differ from control at q < 0.05 ({name})"
        sentences.append(f"{undone[0].upper()}{undone[1:]}: {said}." if undone else f"{said}.")
        if len(hits):
            listed = [f"{row.perturbation} (z {number(float(row.z))})" for row in hits.head(5).itertuples(index=False)]
            sentences.append(f"Strongest by {name}: {', '.join(listed)}.")
    first = result.table[result.table["metric"] == result.provenance["metrics"][0]]
    hits = first[first["q"] < 0.05]
    if isinstance(report.degs, pd.DataFrame):
        sentences += _degs(list(hits["perturbation"].astype(str)), report.degs)
    if isinstance(report.pairs, Pairs):
        sentences += [
            f"These act alike, nearer to each other than to control: {listing(g)}." for g in report.pairs.alike[:3]
        ]
    none = list(first["perturbation"][first["q"] >= 0.05].astype(str))
    if none:
        sentences.append(
            f"No difference was shown for {listing(none)}. "
            "That is not proof of no effect: small groups show only large effects."
        )
    skipped = list(first["perturbation"][first["flags"].str.split(";").map(lambda flags: "too_few_cells" in flags)])
    if skipped:
        sentences.append(f"Not scored, too few cells: {listing(skipped)}.")
    if isinstance(report.calibration, Calibration):
        sentences += [_calibration(item) for item in report.calibration.sets]
    return sentences


def cautions(report: Report) -> list[str]:
    """Return what a reader should know before trusting a number, as sentences."""
    result = report.scores
    warnings = list(result.warnings)
    if isinstance(report.calibration, Calibration):
        warnings += report.calibration.warnings
    warnings = list(dict.fromkeys(warnings))
    first = result.table[result.table["metric"] == result.provenance["metrics"][0]]
    few = first[first["p"].notna() & (first["n_cells"] < FEW_CELLS)]
    if len(few):
        warnings.append(
            f"Few cells: {listing(list(few['perturbation'].astype(str)), 5)} {'have' if len(few) > 1 else 'has'} fewer "
            f"than {FEW_CELLS}; only large effects can be seen in so few."
        )
    if result.provenance.get("batches") is None:
        warnings.append(
            "No batches were named, so labels were exchanged freely. If perturbations are spread unevenly over wells, "
            "lanes or donors, part of what is seen here may be the batch."
        )
    return [*map(_readable, warnings), *_coverage(result.provenance.get("coverage"))]


def _readable(warning: str) -> str:
    """Replace the name of a flag or metric at the start of a warning with readable text."""
    name, colon, rest = warning.partition(": ")
    if colon and (name in FLAGS or name in METRIC_NAMES or name in _SEEN):
        text = METRIC_NAMES.get(name) or (_SEEN[name][0] if name in _SEEN else name.replace("_", " ").capitalize())
        return f"{text}: {rest}"
    return warning


def _coverage(coverage: dict[str, object] | None) -> list[str]:
    """Return a warning of low gene coverage, if the model embedded the cells in this run."""
    if not coverage:
        return []
    n_genes, n_matched = int(str(coverage["n_genes"])), int(str(coverage["n_matched"]))
    warnings = []
    if n_matched < 0.5 * n_genes:
        warnings.append(
            f"Low gene coverage: the model knows {n_matched:,} of the file's {n_genes:,} genes. Check that the gene "
            "identifiers are Ensembl ids or symbols of human genes."
        )
    elif n_matched < FEW_GENES:
        warnings.append(
            f"Low gene coverage: the file holds {n_matched:,} genes that the model knows, a small part of the "
            "transcriptome. Effects on other genes cannot be seen."
        )
    return warnings


def _degs(hits: list[str], degs: pd.DataFrame) -> list[str]:
    counts = degs.set_index(degs["perturbation"].astype(str))["n_degs"]
    silent = [name for name in hits if name in counts.index and counts[name] == 0]
    if not silent:
        return []
    return [
        f"{len(silent)} of the {len(hits)} that differ have no differentially expressed gene, so a test gene by gene "
        f"would miss them: {listing(silent)}."
    ]


def _calibration(item: CalibrationSet) -> str:
    name, values = METRIC_NAMES[item.metric], f"mean z {number(round(item.z_mean, 2))}, sd {number(item.z_sd)}"
    splits = f"{len(item.p)} splits of the controls by {item.kind}"
    if item.kind == "cell":
        verdict = "uniform, as they should be" if item.uniform.p >= 0.01 else "not uniform, so p cannot be relied on"
        test = f"Kolmogorov-Smirnov p = {item.uniform.p:.2g}"
        return f"{splits} gave p-values that are {verdict} ({test}; {values}; {name})."
    small = sum(p < 0.05 for p in item.p) / len(item.p)
    return f"{splits} gave p < 0.05 in {small:.0%} of cases, where 5% are expected by chance ({values}; {name})."
