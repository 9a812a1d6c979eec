"""Quantile plot of observed against expected p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from perturbscope.report.charts.frame import WIDE, Axis, Frame, axes, svg


def qq_chart(sets: Sequence[tuple[str, Sequence[float]]], *, frame: Frame = WIDE) -> str:
    """Draw observed against expected p-values of control-against-control splits on a -log10 scale, one colour a set."""
    curves = []
    top = 1.0
    for _, values in sets:
        ordered = sorted(values)
        expected = [-math.log10((i + 0.5) / len(ordered)) for i in range(len(ordered))]
        observed = [-math.log10(p) for p in ordered]
        curves.append((expected, observed))
        top = max(top, *expected, *observed)
    x = Axis(0.0, top * 1.05, frame.x0, frame.x1)
    y = Axis(0.0, top * 1.05, frame.y0, frame.y1)
    elements = [
        axes(frame, x, y, "expected \N{MINUS SIGN}log₁₀ p", "observed \N{MINUS SIGN}log₁₀ p"),
        f'<line class="threshold" x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(top):.1f}" y2="{y(top):.1f}"/>',
    ]
    for i, ((name, _), (expected, observed)) in enumerate(zip(sets, curves, strict=True)):
        dots = "".join(
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>' for a, b in zip(expected, observed, strict=True)
        )
        elements.append(f'<g class="c{i % 7}">{dots}</g>')
        at = frame.y0 - 14 - 22 * (len(sets) - 1 - i)
        elements.append(
            f'<g class="c{i % 7}"><circle cx="{frame.x1 - 8}" cy="{at - 4}" r="5"/></g>'
            f'<text x="{frame.x1 - 20}" y="{at}" text-anchor="end">{escape(name)}</text>'
        )
    return svg(frame, elements, "Quantiles of control-against-control p-values against the uniform distribution")
