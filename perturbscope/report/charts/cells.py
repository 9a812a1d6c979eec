"""The map of the cells: one path a perturbation, so that a page with thousands of points stays small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape

import numpy as np
from numpy.typing import NDArray

from perturbscope.report.charts.frame import Frame, svg

COLOURS = 7
"""Perturbations with a colour of their own; more could not be told apart, least of all by the colour-blind."""
_FRAME = Frame(640, 480, left=10, right=10, top=10, bottom=10, labels=0)


def cell_map(
    coordinates: NDArray[np.float32],
    labels: Sequence[str],
    *,
    control: str,
    ranked: Sequence[str],
    legend: bool = False,
) -> str:
    """Draw cells at their coordinates.

    Parameters
    ----------
    coordinates
        Coordinates, [n, 2].
    labels
        Perturbation of each cell.
    control
        Label of the control cells, which are drawn below all others.
    ranked
        Perturbations, strongest first; the first :data:`COLOURS` of them have a colour each.
    legend
        Whether to write the names beside the map, for a figure in its own file.
    """
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    room = np.array([_FRAME.x1 - _FRAME.x0, _FRAME.y0 - _FRAME.y1])
    scale = float((room / span).min())
    middle = np.array([_FRAME.x0 + _FRAME.x1, _FRAME.y0 + _FRAME.y1]) / 2
    placed = (coordinates - (low + high) / 2) * scale * [1, -1] + middle
    members: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    coloured = [name for name in ranked if name in members and name != control][:COLOURS]
    others = [name for name in members if name not in coloured and name != control]
    # Later paths lie above earlier ones: the strongest on top.
    order = [*([control] if control in members else []), *others, *reversed(coloured)]
    elements = []
    for name in order:
        kind = "control" if name == control else f"c{coloured.index(name)}" if name in coloured else "others"
        points = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in placed[members[name]])
        elements.append(f'<path class="cells {kind}" data-name="{escape(name)}" d="{points}"/>')
    if legend:
        keys = [(control, "control"), *((name, f"c{i}") for i, name in enumerate(coloured))]
        keys += [("other perturbations", "others")] if others else []
        for i, (name, kind) in enumerate(keys):
            at = 24 + 24 * i
            text = escape(name if len(name) <= 20 else name[:19] + "…")
            elements.append(f'<path class="cells {kind} key-dot" d="M{_FRAME.width + 8} {at}h0"/>')
            elements.append(f'<text x="{_FRAME.width + 20}" y="{at + 5}">{text}</text>')
    frame = replace(_FRAME, width=_FRAME.width + (190 if legend else 0))
    return svg(frame, elements, f"Map of {len(labels)} cells of {len(members)} groups", kind="map")
