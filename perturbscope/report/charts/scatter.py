"""Charts with one point a perturbation: effect against evidence, and effect against changed genes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from perturbscope.report.charts.frame import WIDE, Axis, Frame, Names, axes, svg

_EFFECT = "effect z (sd of the null)"


@dataclass(frozen=True)
class Point:
    """A perturbation on the effect chart."""

    name: str
    z: float
    q: float

    @property
    def significant(self) -> bool:
        """Whether q is below 0.05."""
        return self.q < 0.05


@dataclass(frozen=True)
class DegPoint(Point):
    """A perturbation with its number of differentially expressed genes."""

    n_degs: int = 0


def effect_chart(points: Sequence[Point], *, metric: str, frame: Frame = WIDE) -> str:
    """Draw the effect size (z) against the evidence for it (-log10 q)."""
    shown = [point for point in points if math.isfinite(point.z) and math.isfinite(point.q)]
    if not shown:
        return '<p class="muted">No perturbation has both z and q.</p>'
    x = _effect_axis([point.z for point in shown], frame.x0, frame.x1)
    top = max(1.6, *(-math.log10(point.q) for point in shown)) * 1.3
    y = Axis(0.0, top, frame.y0, frame.y1)
    threshold = y(-math.log10(0.05))
    note = (frame.x1 - 70, threshold - 18, frame.x1, threshold)
    elements = [
        axes(frame, x, y, _EFFECT, "\N{MINUS SIGN}log₁₀ q"),
        f'<line class="threshold" x1="{frame.x0}" x2="{frame.x1}" y1="{threshold:.1f}" y2="{threshold:.1f}"/>',
        f'<text class="note" x="{frame.x1}" y="{threshold - 5:.1f}" text-anchor="end">q = 0.05</text>',
    ]
    ranked = sorted(shown, key=lambda point: -point.z)
    where = [(x(point.z), y(-math.log10(point.q))) for point in ranked]
    elements += [_dot(point, at, f"z {point.z:.3g}, q {point.q:.2g}") for point, at in zip(ranked, where, strict=True)]
    names = Names(frame, [note, *map(_around, where)])
    elements += [
        names.place(point.name, *at)
        for i, (point, at) in enumerate(zip(ranked[: frame.labels], where, strict=False))
        if point.significant or i < 3
    ]
    return svg(
        frame, elements, f"Effect size against significance of {len(shown)} perturbations, {metric}", kind="points"
    )


def deg_chart(points: Sequence[DegPoint], *, metric: str, frame: Frame = WIDE) -> str:
    """Draw the number of differentially expressed genes against the effect size (z)."""
    shown = [point for point in points if math.isfinite(point.z)]
    if not shown:
        return '<p class="muted">No perturbation has z.</p>'
    most = max(1, *(point.n_degs for point in shown))
    x = Axis(-0.04 * most if most <= 20 else -0.5, most * (1.25 if most > 20 else 1.1), frame.x0, frame.x1, most > 20)
    y = _effect_axis([point.z for point in shown], frame.y0, frame.y1)
    ranked = sorted(shown, key=lambda point: -point.z)
    where = [(x(point.n_degs), y(point.z)) for point in ranked]
    elements = [axes(frame, x, y, "differentially expressed genes", _EFFECT)]
    elements += [
        _dot(point, at, f"z {point.z:.3g}, {point.n_degs} differentially expressed genes")
        for point, at in zip(ranked, where, strict=True)
    ]
    names = Names(frame, [_around(at) for at in where])
    # The strongest, and then those that a count of genes would miss.
    silent = [i for i, point in enumerate(ranked) if point.significant and not point.n_degs]
    order = list(dict.fromkeys([*range(min(len(ranked), frame.labels // 2)), *silent]))
    elements += [names.place(ranked[i].name, *where[i]) for i in order[: frame.labels]]
    return svg(
        frame,
        elements,
        f"Differentially expressed genes against effect size of {len(shown)} perturbations, {metric}",
        kind="points",
    )


def _effect_axis(z: Sequence[float], start: float, end: float) -> Axis:
    low, high = min(-2.0, *z), max(4.0, *z)
    log = high - low > 20
    return Axis(low - 0.5, high * (1.35 if log else 1.12), start, end, log)


def _dot(point: Point, at: tuple[float, float], text: str) -> str:
    kind = "hit" if point.significant else "miss"
    name = escape(point.name)
    return (
        f'<circle class="{kind}" data-name="{name}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4.5">'
        f"<title>{name}: {text}</title></circle>"
    )


def _around(at: tuple[float, float]) -> tuple[float, float, float, float]:
    return at[0] - 5, at[1] - 5, at[0] + 5, at[1] + 5
