"""Heat map of distances between perturbations, in the order of a hierarchical clustering, with its tree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from scipy.cluster import hierarchy

from perturbscope.report.charts.frame import Frame, svg

LEVELS = 9
"""Number of colours, from far (0) to near."""
_CELL, _TREE, _LETTER = 17, 64, 8.8


def heat_map(
    names: Sequence[str],
    distances: NDArray[np.float64],
    tree: NDArray[np.float64],
    *,
    control: str,
    noise: float = 0.0,
) -> str:
    """Draw one square a pair; close pairs are dark.

    Parameters
    ----------
    names
        Names of rows and columns.
    distances
        Distances, [n, n], symmetric and not negative.
    tree
        Linkage of the n rows in scipy's format, whose order of leaves is that of the chart.
    control
        Name that is set in italics.
    noise
        Standard deviation of distances between groups of controls; the colours span at least 20 of them, so that chance
        does not look like structure.
    """
    order = [int(i) for i in hierarchy.leaves_list(tree)]
    names = [names[i] for i in order]
    shown = distances[np.ix_(order, order)]
    n = len(names)
    margin = _LETTER * min(18, max(len(name) for name in names)) + 12
    frame = Frame(
        width=round(margin + n * _CELL + 8),
        height=round(_TREE + n * _CELL + margin),
        left=round(margin),
        right=8,
        top=_TREE,
        bottom=round(margin),
        labels=n,
    )
    # The square root spreads the small distances, which show the groups.
    root = np.sqrt(shown)
    top = max(float(root.max()), (20 * noise) ** 0.5)
    steps = (root / top * LEVELS).astype(int) if top > 0 else np.full((n, n), LEVELS - 1)
    level = LEVELS - 1 - np.minimum(steps, LEVELS - 1)
    elements = [_branches(tree, frame)]
    for step in range(LEVELS):
        squares = "".join(
            f"M{frame.left + column * _CELL} {_TREE + row * _CELL}h{_CELL}v{_CELL}h-{_CELL}z"
            for row, column in np.argwhere(level == step)
        )
        if squares:
            elements.append(f'<path class="h{step}" d="{squares}"/>')
    for i, name in enumerate(names):
        text = escape(name if len(name) <= 18 else name[:17] + "…")
        kind = ' class="control-name"' if name == control else ""
        at = _TREE + i * _CELL + 13
        elements.append(f'<text{kind} x="{frame.left - 6}" y="{at}" text-anchor="end">{text}</text>')
        elements.append(
            f'<text{kind} transform="translate({frame.left + i * _CELL + 13} {frame.y0 + 6}) rotate(-90)" '
            f'text-anchor="end">{text}</text>'
        )
    numbers = json.dumps([[float(f"{value:.3g}") for value in row] for row in shown])
    elements.append(
        f'<rect class="pick" x="{frame.left}" y="{_TREE}" width="{n * _CELL}" height="{n * _CELL}" '
        f'data-names="{escape(json.dumps(names))}" data-values="{numbers}"/>'
    )
    chart = svg(frame, elements, f"Distances between {n} groups of cells, clustered", kind="heat")
    # Small enough to be seen as a whole, large enough to be read; on a phone it is scrolled.
    room = f"min-width:{round(0.72 * frame.width)}px;max-width:{round(1.5 * frame.width)}px"
    return chart.replace("<svg ", f'<svg style="{room}" ', 1)


def scale() -> str:
    """Draw the colours from near to far, for the legend."""
    width = 14
    squares = "".join(
        f'<path class="h{LEVELS - 1 - i}" d="M{i * width} 0h{width}v{width}h-{width}z"/>' for i in range(LEVELS)
    )
    return f'<svg class="chart scale" viewBox="0 0 {LEVELS * width} {width}" aria-hidden="true">{squares}</svg>'


def _branches(tree: NDArray[np.float64], frame: Frame) -> str:
    drawn = hierarchy.dendrogram(tree, no_plot=True)
    highest = max(max(heights) for heights in drawn["dcoord"]) or 1.0  # heights as roots, like the colours
    lines = []
    for across, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        # scipy puts leaf i at 5 + 10 i.
        points = [
            (frame.left + place / 10 * _CELL, _TREE - 4 - (height / highest) ** 0.5 * (_TREE - 12))
            for place, height in zip(across, heights, strict=True)
        ]
        lines.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points))
    return f'<path class="tree" d="{"".join(lines)}"/>'
