"""Mean and spread of an energy distance between groups of controls, in closed form.

Write a distance between two control cells as ``d(i, j) = mean + g_i + g_j + k_ij`` (Hoeffding's decomposition), with
uncorrelated parts of variance ``var_g`` and ``var_k``. An energy distance is a weighted sum of distances,
``sum_ij A_ij d(i, j)``, hence over random control groups::

    mean = mean distance * sum_ij A_ij        (0 for the U estimator)
    variance = 4 var_g sum_i (sum_j A_ij)^2 + 2 var_k sum_ij A_ij^2

For the U estimator every row of A sums to zero and only ``var_k`` counts; its unbiased estimate from the controls is
the U-centred distance variance of Szekely and Rizzo (2014). For one pair of disjoint control groups this is exactly
the mean and variance over ALL such pairs, which a finite number of random draws only approaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Estimator = Literal["U", "V"]

RELATIVE_NOISE = 1e-6
"""Statistics closer than this share of the mean distance are equal: rounding of float32 sums must not break ties."""


@dataclass(frozen=True)
class Moments:
    """What the null needs to know about the distances between controls.

    Attributes
    ----------
    mean
        Mean distance between two different cells.
    var_g
        Variance of a cell's mean distance to the others.
    var_k
        Variance of the part of a distance that its two cells' means do not explain.
    """

    mean: float
    var_g: float
    var_k: float


def null_moments(
    moments: Moments, n: int, m: int, *, pool: int, repeats: int, estimator: Estimator
) -> tuple[float, float]:
    """Mean and sd of the energy distance between a group of n controls and other controls.

    The statistic is the mean of D(X, Y_r) over `repeats` groups Y_r of m cells, each drawn from the same `pool` cells;
    with ``repeats=1`` it is D of two disjoint groups. Averaging narrows the null, since only Y varies between repeats:
    comparing an averaged distance with single draws would make z too small by up to a half.
    """
    own = 1 if estimator == "U" else 0
    # Expected squares of the share of the repeats that a cell of the pool, and a pair of them, is drawn in.
    one, two = m / pool, m * (m - 1) / (pool * max(pool - 1, 1))
    cell = one / repeats + (1 - 1 / repeats) * one**2
    pair = two / repeats + (1 - 1 / repeats) * two**2
    squares = (
        (n - 1) / (n * (n - own) ** 2) + 2 * pool * cell / (n * m**2) + pool * (pool - 1) * pair / (m * (m - own)) ** 2
    )
    variance = 2 * moments.var_k * squares
    if estimator == "U":
        return 0.0, float(np.sqrt(variance))
    variance += 4 * moments.var_g * (1 / n**3 + pool * cell / m**4)
    return moments.mean * (1 / n + 1 / m), float(np.sqrt(variance))


def moments_of(row_sums: NDArray[np.float64], squares: float) -> Moments:
    """Moments from the row sums of a distance matrix and the sum of its squared values.

    Each is an unbiased U-statistic: of means over pairs, pairs of pairs that share a cell, and those that do not.
    """
    n = len(row_sums)
    pairs = n * (n - 1)
    mean = float(row_sums.sum()) / pairs
    rows = row_sums - (n - 1) * mean
    same = max(squares - pairs * mean**2, 0.0)
    sharing = float(rows @ rows) - same
    apart = -4 * float(rows @ rows) + 2 * same
    e_same = same / pairs
    e_sharing = sharing / (pairs * (n - 2))
    e_apart = apart / (pairs * (n - 2) * (n - 3))
    var_g, var_k = max(e_sharing - e_apart, 0.0), max(e_same - 2 * e_sharing + e_apart, 0.0)
    # Below this, what varies is the rounding of the distances.
    floor = (RELATIVE_NOISE * mean) ** 2
    return Moments(mean, var_g if var_g > floor else 0.0, var_k if var_k > floor else 0.0)
