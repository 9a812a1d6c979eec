"""Tests that see what the energy distance is nearly blind to, and one p for all of them.

The energy distance weighs axes by their spread and finds shifts along wide ones best. It has little power for a change
of variance, for cells in two states about the same mean, and for shifts along narrow axes. So four members are computed
of the same exchanges of labels:

``energy``    the energy distance of the vectors
``whitened``  the energy distance of the vectors scaled to unit variance along all of their principal axes
``narrow``    the maximum mean discrepancy (Gretton et al. 2012) with a Gaussian kernel of a third of the median
              distance: cells in states of their own
``axis``      the largest difference along one principal axis, of means or of variances, each in its own standard errors

Axes and scales are those of ALL cells of the screen, or those of its batches, whatever their labels, so exchanges stay
exchanges. The statistic of the omnibus is the smallest of the members' p, and its own p is the share of exchanges with
one as small: four tests cost no more false hits than one. The member with the smallest p names the kind of effect.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring.energy.matrix import DenseGroup, DenseLink, to_numpy
from perturbscope.scoring.energy.pool import Group, Labels, Pool

MEMBERS = ("energy", "whitened", "narrow", "axis")
"""Names of the members, in the order in which ties are broken."""
NARROW = 3.0
"""Share of the median distance that is the width of the narrow kernel: one third."""
LEAST_SPREAD = 1e-4
"""Spread along a principal axis, as a share of the largest, below which there is nothing but rounding."""
MEDIAN_OF = 500
"""Cells whose distances give the median."""
KEPT = 8
"""Parts of exchanges whose sums among controls are kept."""


@dataclass(frozen=True)
class Scales:
    """Axes and scales of a screen's cells, blind to their labels.

    Attributes
    ----------
    axes
        Principal axes over their standard deviations, [width, rank]: vectors times these are white.
    width
        Width of the narrow kernel.
    """

    axes: NDArray[np.float64]
    width: float

    @classmethod
    def of(cls, covariance: NDArray[np.float64], some: NDArray[np.float64]) -> Scales:
        """Return the scales of cells with a covariance about their means, [width, width]; `some` are examples."""
        values, vectors = np.linalg.eigh(covariance)
        kept = values > LEAST_SPREAD**2 * max(float(values[-1]), 0.0)
        axes = vectors[:, kept] / np.sqrt(values[kept])
        matrix = to_numpy(DenseGroup(some, np.zeros(some.shape[1])).matrix)
        apart = matrix[np.triu_indices(len(some), 1)]
        return cls(axes[:, ::-1], float(np.median(apart)) / NARROW if len(apart) else 0.0)

    @property
    def useful(self) -> bool:
        """Whether the cells differ at all."""
        return self.axes.shape[1] > 0 and self.width > 0

    def white(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return vectors about their means [n, width] on the axes, [n, rank]."""
        found: NDArray[np.float64] = rows @ self.axes
        return found


class Omnibus:
    """Tests groups of cells against one group of controls by all members.

    Parameters
    ----------
    scales
        Axes and scales of the screen.
    controls
        The group of all controls, whose energy distance is the first member.
    """

    def __init__(self, scales: Scales, controls: Group) -> None:
        self._scales, self._controls = scales, controls
        white = scales.white(controls.rows)
        self._origin = np.zeros(controls.rows.shape[1])
        self._white = DenseGroup(white, np.zeros(white.shape[1]))
        self._plain = controls if isinstance(controls, DenseGroup) else DenseGroup(controls.rows, self._origin)
        self._narrow = self._kernel(self._plain)
        self._kept: list[tuple[Labels, list[Labels]]] = []
        self._lock = threading.Lock()

    def _kernel(self, group: DenseGroup) -> DenseGroup:
        """Return a group with the distances 1 - k of the narrow kernel k."""
        return DenseGroup(group.rows, group.origin, matrix=self._one_less(group.matrix))

    def _one_less(self, matrix: Any) -> NDArray[np.float32]:
        found: NDArray[np.float32] = -np.expm1(-np.square(to_numpy(matrix) / np.float32(self._scales.width)))
        return found

    def _labels(self, labels: Labels) -> list[Labels]:
        """Return the same labels with sums of the distances of each other member, kept for other perturbations."""
        with self._lock:
            for known, found in self._kept:
                if known is labels:
                    return found
            found = []
            for group in (self._white, self._narrow):
                marked = group.mark(labels.b)
                found.append(Labels(labels.a, labels.b, marked, group.within(marked), labels.b.sums(group.row_sums)))
            self._kept = [*self._kept[-KEPT:], (labels, found)]
            return found

    def members(self, pool: Pool, draws: Sequence[Labels]) -> NDArray[np.float64]:
        """Return each member's statistic, first of the observed labels and then of exchanged ones, [members, 1 + R].

        Parameters
        ----------
        pool
            The perturbation and the controls.
        draws
            Exchanges of labels, in parts.
        """
        white = DenseGroup(self._scales.white(pool.a.rows), self._white.origin)
        whitened = Pool(white, self._white, "U")
        own = pool.a if isinstance(pool.a, DenseGroup) else DenseGroup(pool.a.rows, self._origin)
        link = pool.link if isinstance(pool.link, DenseLink) else own.link(self._plain)
        kernel = self._kernel(own)
        narrow = Pool(kernel, self._narrow, "U", DenseLink(kernel, self._narrow, self._one_less(link.matrix)))
        n, m = white.size, self._white.size
        observed = Labels.of(np.ones((n, 1), dtype=np.float32), np.zeros((m, 1), dtype=np.float32), self._white)
        first = np.array([[pool.observed], [whitened.observed], [narrow.observed], _axes(whitened, observed)])
        parts = [first]
        for labels in draws:
            of_white, of_narrow = self._labels(labels)
            distances_ = (pool.exchanged(labels), whitened.exchanged(of_white), narrow.exchanged(of_narrow))
            parts.append(np.stack([*distances_, _axes(whitened, labels)]))
        return np.concatenate(parts, axis=1)


def smallest_p(members: NDArray[np.float64], noise: NDArray[np.float64]) -> tuple[float, tuple[str, ...]]:
    """Return the p-value of the smallest of the members' p, and the members that have it.

    Parameters
    ----------
    members
        Statistics of the observed labels and of exchanged ones, [members, 1 + R].
    noise
        Difference up to which two values of a member are equal, [members].
    """
    ordered = np.sort(members, axis=1)
    reached = [
        values.size - np.searchsorted(line, values - some, side="left")
        for line, values, some in zip(ordered, members, noise, strict=True)
    ]
    counts = np.array(reached)
    least = counts.min(axis=0)
    p = float(np.count_nonzero(least <= least[0]) / len(least))
    return p, tuple(name for name, count in zip(MEMBERS, counts[:, 0], strict=True) if count == least[0])


def _axes(white: Pool, labels: Labels) -> NDArray[np.float64]:
    """Return the largest difference of means or of log variances along an axis, in standard errors, [R]."""
    x, y = white.a.rows, white.b.rows
    n, m = len(x), len(y)
    first: NDArray[np.float64] = labels.a.sums(x) + labels.b.sums(y)
    second: NDArray[np.float64] = labels.a.sums(x**2) + labels.b.sums(y**2)
    whole, whole_second = x.sum(axis=0) + y.sum(axis=0), (x**2).sum(axis=0) + (y**2).sum(axis=0)
    mean, other = first / n, (whole - first) / m
    spread = np.maximum(second / n - mean**2, 1e-12)
    other_spread = np.maximum((whole_second - second) / m - other**2, 1e-12)
    scale = n * m / (n + m)
    of_means = np.abs(mean - other).max(axis=1) * np.sqrt(scale)
    of_variances = np.abs(np.log(spread / other_spread)).max(axis=1) * np.sqrt(scale / 2)
    found: NDArray[np.float64] = np.maximum(of_means, of_variances)
    return found
