"""Sizes of charts, axes with round ticks, and names that do not overlap; shared by all charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
_LETTER = 9.0
"""Largest mean width of a letter at 13 px, bold capitals included."""
_LONGEST = 18
"""Letters of the longest name; others are cut."""


@dataclass(frozen=True)
class Frame:
    """Size of a chart and its margins, in units of its view box; text is 13 units high.

    Attributes
    ----------
    labels
        Most points that are named; all others have a tooltip only.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    labels: int

    @property
    def x0(self) -> float:
        """Left end of the plot."""
        return self.left

    @property
    def x1(self) -> float:
        """Right end of the plot."""
        return self.width - self.right

    @property
    def y0(self) -> float:
        """Lower end of the plot."""
        return self.height - self.bottom

    @property
    def y1(self) -> float:
        """Upper end of the plot."""
        return self.top


WIDE = Frame(560, 400, left=70, right=18, top=16, bottom=52, labels=14)
"""Frame for a column of a laptop's screen."""
NARROW = Frame(340, 360, left=64, right=10, top=14, bottom=50, labels=7)
"""Frame for a phone, at about one unit a pixel."""


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels; `log` uses the inverse hyperbolic sine, linear near 0 and logarithmic far from it."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, v = (math.asinh(x / 2) if self.log else x for x in (self.low, self.high, value))
        return self.start + (v - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values within the axis, far enough apart for their numbers."""
        if self.log and max(abs(self.low), abs(self.high)) > 10:
            decades = [0.0] + [s * b * 10.0**k for k in range(7) for b in (1, 3) for s in (1, -1)]
            chosen: list[float] = []
            # Zero first, then from large to small: where two are too close, the rounder one further out stays.
            for value in [0.0, *sorted(decades[1:], key=lambda v: (-abs(v), v))]:
                inside = self.low <= value <= self.high
                if inside and all(abs(self(value) - self(other)) >= self._apart(value, other) for other in chosen):
                    chosen.append(value)
            return sorted(chosen)
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(span / 4))
        step *= next(k for k in (1, 2, 5, 10) if span / (step * k) <= 6)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _apart(self, a: float, b: float) -> float:
        """Return the pixels that two numbers need: their width if side by side, a line if stacked."""
        return 4.2 * (len(plain_number(a)) + len(plain_number(b))) + 8 if self.start < self.end else 24


def plain_number(value: float) -> str:
    """Format a tick without needless digits, thousands separated."""
    rounded = round(value, 6)
    text = f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"
    return text.replace("-", "\N{MINUS SIGN}")


def axes(frame: Frame, x: Axis, y: Axis, x_title: str, y_title: str) -> str:
    """Draw grid, ticks and titles."""
    elements = []
    for value in x.ticks():
        at = x(value)
        elements.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{frame.y1}" y2="{frame.y0}"/>')
        elements.append(
            f'<text class="tick" x="{at:.1f}" y="{frame.y0 + 18}" text-anchor="middle">{plain_number(value)}</text>'
        )
    for value in y.ticks():
        at = y(value)
        elements.append(f'<line class="grid" x1="{frame.x0}" x2="{frame.x1}" y1="{at:.1f}" y2="{at:.1f}"/>')
        elements.append(
            f'<text class="tick" x="{frame.x0 - 7}" y="{at + 4:.1f}" text-anchor="end">{plain_number(value)}</text>'
        )
    elements.append(
        f'<text class="axis" x="{(frame.x0 + frame.x1) / 2}" y="{frame.height - 10}" text-anchor="middle">'
        f"{x_title}</text>"
        f'<text class="axis" transform="translate(12 {(frame.y0 + frame.y1) / 2}) rotate(-90)" text-anchor="middle">'
        f"{y_title}</text>"
    )
    return "".join(elements)


def svg(frame: Frame, elements: Sequence[str], label: str, *, kind: str = "") -> str:
    """Return the chart as SVG; a screen reader reads `label` in its place."""
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(elements)}</svg>'
    )


class Names:
    """Places names beside points so that none covers a point or another name.

    Parameters
    ----------
    frame
        Frame whose plot the names must not leave.
    taken
        Boxes of the points, and of everything else that must stay free.
    """

    def __init__(self, frame: Frame, taken: Sequence[Box]) -> None:
        self._frame = frame
        self._taken = list(taken)

    def place(self, name: str, px: float, py: float) -> str:
        """Draw the name at the first free place around its point; return an empty string if all are taken."""
        frame = self._frame
        text = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        width = _LETTER * len(text)
        for step in range(6):
            for dx, dy, anchor in _places(step):
                left = px + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
                box = (left, py + dy - 11, left + width, py + dy + 3)
                inside = box[0] > frame.x0 and box[2] < frame.width - 2 and box[1] > 2 and box[3] < frame.y0
                if inside and not any(_overlap(box, other) for other in self._taken):
                    self._taken.append(box)
                    leader = ""
                    if step:
                        end = (px, py + dy + (4 if dy < 0 else -12)) if not dx else (px + dx - 2, py + dy - 4)
                        leader = (
                            f'<line class="leader" x1="{px:.1f}" y1="{py:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
                        )
                    return (
                        f'<g class="label">{leader}<text x="{px + dx:.1f}" y="{py + dy:.1f}" '
                        f'text-anchor="{anchor}">{escape(text)}</text></g>'
                    )
        return ""


def _places(step: int) -> list[tuple[float, float, str]]:
    """Return offsets and anchors of a name around its point, nearest first; from the second step on with a line."""
    if step == 0:
        return [(8, 4, "start"), (0, -9, "middle"), (0, 19, "middle"), (-8, 4, "end")]
    down = 14 * step
    return [(16, 4 - down, "start"), (16, 4 + down, "start"), (0, -9 - down, "middle"), (0, 19 + down, "middle")]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
