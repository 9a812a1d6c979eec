"""The report's sentences: conclusions in plain words, and how to read the numbers."""

from __future__ import annotations

import math

from perturbscope.calibration import Calibration, CalibrationSet
from perturbscope.results import ScoreResult

METRIC_NAMES = {
    "e_distance": "E-distance",
    "cosine_e_distance": "cosine E-distance",
    "wasserstein": "Wasserstein distance",
}

READING = [
    "Distance: how far a perturbation's cells lie from control cells, less how far cells lie from each other within "
    "each group. With the U estimator it is 0 on average where nothing happened, and may be negative.",
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
    """Three significant digits; a dash for a missing number."""
    if math.isnan(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return (f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}").replace("-", "\N{MINUS SIGN}")


def p_value(value: float) -> str:
    """A probability: three decimals, or a power of ten below 0.001."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:.3f}" if value >= 0.00095 else f"{value:.1e}".replace("-", "\N{MINUS SIGN}")


def conclusions(result: ScoreResult, calibration: Calibration | None) -> list[str]:
    """What the table says, in sentences."""
    found = []
    for metric in result.provenance["metrics"]:
        part = result.table[result.table["metric"] == metric]
        scored = part[part["p"].notna()]
        hits = scored[scored["q"] < 0.05]
        name = METRIC_NAMES[metric]
        found.append(f"{len(hits)} of {len(scored)} perturbations differ from control at q < 0.05 ({name}).")
        if len(hits):
            listed = [f"{row.perturbation} (z {number(float(row.z))})" for row in hits.head(5).itertuples(index=False)]
            found.append(f"Strongest by {name}: {', '.join(listed)}.")
    first = result.table[result.table["metric"] == result.provenance["metrics"][0]]
    none = list(first["perturbation"][first["q"] >= 0.05])
    if none:
        found.append(
            f"No difference was shown for {', '.join(none[:8])}"
            f"{f' and {len(none) - 8} more' if len(none) > 8 else ''}. "
            "That is not proof of no effect: small groups show only large effects."
        )
    skipped = list(first["perturbation"][first["flags"].str.split(";").map(lambda flags: "too_few_cells" in flags)])
    if skipped:
        found.append(f"Not scored, too few cells: {', '.join(skipped[:8])}{', ...' if len(skipped) > 8 else ''}.")
    if calibration is not None:
        found += [_calibration(item) for item in calibration.sets]
    return found


def _calibration(item: CalibrationSet) -> str:
    name, values = METRIC_NAMES[item.metric], f"mean z {number(round(item.z_mean, 2))}, sd {number(item.z_sd)}"
    splits = f"{len(item.p)} splits of the controls by {item.kind}"
    if item.kind == "cell":
        verdict = "uniform, as they should be" if item.uniform.p >= 0.01 else "not uniform, so p cannot be relied on"
        test = f"Kolmogorov-Smirnov p = {item.uniform.p:.2g}"
        return f"{splits} gave p-values that are {verdict} ({test}; {values}; {name})."
    small = sum(p < 0.05 for p in item.p) / len(item.p)
    return f"{splits} gave p < 0.05 in {small:.0%} of cases, where 5% are expected by chance ({values}; {name})."
