"""Charts of the report as inline SVG: no library, no image, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 16, 52
LABELS = 14
"""Most points that are named; the others have a tooltip."""


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
class _Axis:
    """Maps values to pixels; `log` is the inverse hyperbolic sine, which is linear near 0 and logarithmic far off."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (math.asinh(x / 2) if self.log else x for x in (self.low, self.high, value))
        return self.start + (v - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.log and max(abs(self.low), abs(self.high)) > 10:
            decades = [sign * base * 10**k for sign in (-1, 1) for k in range(5) for base in (1, 3)]
            spread = [0.0, *decades] if self.high < 100 else [0.0, *(v for v in decades if abs(v) in (3, 10, 30, 100))]
            if self.high >= 300:
                spread += [300.0, 1000.0, 10000.0]
            return sorted({v for v in spread if self.low <= v <= self.high})
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(span / 4))
        step *= next(k for k in (1, 2, 5, 10) if span / (step * k) <= 6)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def effect_chart(points: Sequence[Point], *, metric: str) -> str:
    """Effect size (z) against the evidence for it (-log10 q)."""
    shown = [point for point in points if math.isfinite(point.z) and math.isfinite(point.q)]
    if not shown:
        return '<p class="muted">No perturbation has both z and q.</p>'
    z_values = [point.z for point in shown]
    low, high = min(-2.0, *z_values), max(4.0, *z_values)
    log = high - low > 20
    x = _Axis(low - 0.5, high * (1.35 if log else 1.12), LEFT, WIDTH - RIGHT, log)
    top = max(1.6, *(-math.log10(point.q) for point in shown)) * 1.12
    y = _Axis(0.0, top, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, "effect size z (sd of the null)", "\N{MINUS SIGN}log₁₀ q")]
    threshold = y(-math.log10(0.05))
    parts.append(
        f'<line class="threshold" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{threshold:.1f}" y2="{threshold:.1f}"/>'
    )
    parts.append(f'<text class="note" x="{WIDTH - RIGHT}" y="{threshold - 5:.1f}" text-anchor="end">q = 0.05</text>')
    placed: list[tuple[float, float, float, float]] = []
    labels = []
    ranked = sorted(shown, key=lambda point: -point.z)
    for point in ranked:
        px, py = x(point.z), y(-math.log10(point.q))
        placed.append((px - 4, py - 4, px + 4, py + 4))
        kind = "hit" if point.significant else "miss"
        parts.append(
            f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="4.5"><title>{escape(point.name)}: '
            f"z {point.z:.3g}, q {point.q:.2g}</title></circle>"
        )
    for i, point in enumerate(ranked[:LABELS]):
        if point.significant or i < 3:
            label = _label(point.name, x(point.z), y(-math.log10(point.q)), placed, minor=i >= 3)
            if label:
                labels.append(label)
    return _svg(parts + labels, f"Effect size against significance of {len(shown)} perturbations, {metric}")


def qq_chart(sets: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Observed against expected p-values of control-against-control splits, on a -log10 scale, one colour a set."""
    curves = []
    top = 1.0
    for _, values in sets:
        ordered = sorted(values)
        expected = [-math.log10((i + 0.5) / len(ordered)) for i in range(len(ordered))]
        observed = [-math.log10(p) for p in ordered]
        curves.append((expected, observed))
        top = max(top, *expected, *observed)
    x = _Axis(0.0, top * 1.05, LEFT, WIDTH - RIGHT)
    y = _Axis(0.0, top * 1.05, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, "expected \N{MINUS SIGN}log₁₀ p", "observed \N{MINUS SIGN}log₁₀ p")]
    parts.append(f'<line class="threshold" x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(top):.1f}" y2="{y(top):.1f}"/>')
    for i, ((name, _), (expected, observed)) in enumerate(zip(sets, curves, strict=True)):
        dots = "".join(
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>' for a, b in zip(expected, observed, strict=True)
        )
        parts.append(f'<g class="series{i % 4}">{dots}</g>')
        at = HEIGHT - BOTTOM - 14 - 22 * (len(sets) - 1 - i)
        parts.append(
            f'<g class="series{i % 4}"><circle cx="{WIDTH - RIGHT - 8}" cy="{at - 4}" r="5"/></g>'
            f'<text x="{WIDTH - RIGHT - 20}" y="{at}" text-anchor="end">{escape(name)}</text>'
        )
    return _svg(parts, "Quantiles of control-against-control p-values against the uniform distribution")


def _label(
    name: str, px: float, py: float, placed: list[tuple[float, float, float, float]], *, minor: bool
) -> str | None:
    """A point's name at the first free place around it; none if all are taken."""
    text = name if len(name) <= 18 else name[:17] + "…"
    width = 8.4 * len(text)
    for step in range(5):
        for dx, dy, anchor in (
            (8, 4, "start"),
            (0, -9 - 15 * step, "middle"),
            (0, 19 + 15 * step, "middle"),
            (-8, 4, "end"),
        ):
            left = px + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (left, py + dy - 11, left + width, py + dy + 3)
            inside = box[0] > LEFT and box[2] < WIDTH - 2 and box[1] > 2 and box[3] < HEIGHT - BOTTOM
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in placed):
                placed.append(box)
                leader = ""
                if step:
                    end = py + dy + (4 if dy < 0 else -12)
                    leader = f'<line class="leader" x1="{px:.1f}" y1="{py:.1f}" x2="{px:.1f}" y2="{end:.1f}"/>'
                return (
                    f'<g class="{"label minor" if minor else "label"}">{leader}<text x="{px + dx:.1f}" '
                    f'y="{py + dy:.1f}" text-anchor="{anchor}">{escape(text)}</text></g>'
                )
    return None


def _frame(x: _Axis, y: _Axis, x_title: str, y_title: str) -> str:
    parts = []
    for value in x.ticks():
        at = x(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
        )
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{round(value, 6):g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{x_title}</text>'
        f'<text class="axis" transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{y_title}</text>'
    )
    return "".join(parts)


def _svg(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
