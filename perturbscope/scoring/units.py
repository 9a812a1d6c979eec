"""Tests of whole units: wells, guides or donors, whose cells share more than a perturbation.

Cells of one well or one guide resemble each other, so a test that exchanges cells takes what wells differ by for an
effect: with an intra-class correlation of 0.05 and one well of 50 cells for each perturbation, 95 % of those without an
effect have p < 0.05. Units were assigned, and so units are exchanged: the g units of a perturbation and the units of
controls are pooled, every other choice of g of them (or a random thousand) is called perturbed, and its distance from
the cells of the remaining units is the null of the observed one. For g = 1 that is each control unit against the rest.
Larger units are cut to the sizes of the perturbation's by chance, since the spread of a distance depends on them. With
batches, units are exchanged within batches.

``p_unit = (1 + as large) / (1 + choices)`` is exact for units of equal size. With G control units and g = 1 it cannot
be below ``1 / (G + 1)``. ``z_unit`` is the distance in standard deviations of the same choices.

The design effect ``1 + (n - 1) icc`` says by how much n cells of a unit are worth less than n independent cells; the
intra-class correlation is that of a one-way analysis of variance (Donner 1986), summed over dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError, TooFewControlsError
from perturbscope.scoring.energy.pool import Labels, Pool
from perturbscope.scoring.results import ScoreOptions
from perturbscope.scoring.statistics import Exchange, generator
from perturbscope.threads import checkpoint

UNIT_EXCHANGES = 1000
"""Most choices of units, unless `permutations` asks for a number."""
FEWEST_CHOICES = 19
"""Fewest choices beside the observed one that allow p_unit = 0.05."""
LARGE_EFFECT = 1.5
"""Design effect above which p over cells is warned of."""
_CHUNK = 100


@dataclass(frozen=True)
class UnitScore:
    """Score of one perturbation over whole units; NaN where there is none, and a flag says why."""

    n_units: int = 0
    z: float = float("nan")
    p: float = float("nan")
    flags: tuple[str, ...] = ()


class Units:
    """The units of a screen.

    Parameters
    ----------
    units, labels
        Code of each cell's unit and of its label, [n]. Cells of one unit with two labels are two units.
    controls
        Positions of the controls.
    batches
        Batch of each cell, or None.

    Raises
    ------
    TooFewControlsError
        All controls are in one unit.
    InvalidParameterError
        The units are the batches.
    """

    def __init__(
        self,
        units: NDArray[np.intp],
        labels: NDArray[np.intp],
        controls: NDArray[np.intp],
        batches: NDArray[np.intp] | None,
    ) -> None:
        self.codes: NDArray[np.intp] = np.unique(np.stack([units, labels]), axis=1, return_inverse=True)[1].ravel()
        self.spanning = int(self.codes.max() - units.max()) if len(units) else 0
        """Units that were divided since they hold several labels."""
        of_controls = np.unique(self.codes[controls])
        self.n_control_units = len(of_controls)
        if batches is not None and _same(units, batches):
            raise InvalidParameterError(
                "The units are the batches: within a batch there is nothing to exchange whole. Give the column as "
                "units or as batches, not as both.",
                field="units",
            )
        if self.n_control_units < 2:
            raise TooFewControlsError(
                f"All {len(controls)} controls are in one unit, and nothing tells how units differ by themselves. Name "
                "a column with several units of controls (20 or more for p_unit of 0.05), or leave the units out.",
                field="units",
            )
        self.batches = None
        self.crossing = False
        """Whether a unit has cells in several batches, so that units are exchanged freely."""
        if batches is not None:
            self.crossing = len(np.unique(np.stack([self.codes, batches]), axis=1).T) > int(self.codes.max()) + 1
            self.batches = None if self.crossing else batches

    def facts(self, rows: NDArray[np.float64], controls: NDArray[np.intp]) -> dict[str, Any]:
        """Return number, intra-class correlation and design effect of the control units, from the controls' vectors."""
        codes = np.unique(self.codes[controls], return_inverse=True)[1]
        sizes = np.bincount(codes)
        n, count = len(codes), len(sizes)
        sums = np.zeros((count, rows.shape[1]))
        np.add.at(sums, codes, rows)
        means = sums / sizes[:, None]
        size = (n - float((sizes**2).sum()) / n) / (count - 1)
        icc = float("nan")
        if n > count:
            between = float((sizes @ ((means - rows.mean(axis=0)) ** 2)).sum()) / (count - 1)
            within = float(((rows - means[codes]) ** 2).sum()) / (n - count)
            total = between + (size - 1) * within
            icc = (between - within) / total if total > 0 else float("nan")
        effect = 1 + (size - 1) * max(icc, 0.0) if not np.isnan(icc) else float("nan")
        return {
            "n_control_units": count,
            "cells_per_control_unit": size,
            "intraclass_correlation": None if np.isnan(icc) else icc,
            "design_effect": None if np.isnan(effect) else effect,
        }

    def warnings(self, facts: dict[str, Any]) -> list[str]:
        """Return sentences about the units; `facts` are those of :meth:`facts`."""
        said = []
        effect = facts["design_effect"]
        if effect is not None and effect > LARGE_EFFECT:
            said.append(
                f"Controls of one unit are alike (intra-class correlation {facts['intraclass_correlation']:.3f}, "
                f"design effect {effect:.1f} at {facts['cells_per_control_unit']:.0f} cells a unit): z and p over "
                "cells take what units differ by for effects. Judge by z_unit and p_unit."
            )
        if self.n_control_units < FEWEST_CHOICES:
            said.append(
                f"There are {self.n_control_units} units of controls, so p_unit of a perturbation in one unit is "
                f"{1 / (1 + self.n_control_units):.2g} at least."
            )
        if self.spanning:
            said.append(
                f"units_span_labels: {self.spanning} more units than named, since some hold cells of several labels; "
                "the cells of each label were taken as a unit of their own. If such a unit shifts all its cells (a "
                "donor, a plate), give it as a batch."
            )
        if self.crossing:
            said.append(
                "units_span_batches: some units have cells in several batches, so units were exchanged freely, about "
                "the means of the batches."
            )
        return said


def unit_score(
    units: Units,
    cells: NDArray[np.intp],
    controls: NDArray[np.intp],
    pool: Callable[[NDArray[np.intp]], Pool],
    options: ScoreOptions,
    name: str,
) -> UnitScore:
    """Score a perturbation by exchanges of whole units.

    Parameters
    ----------
    units
        The units of the screen.
    cells, controls
        Positions of the perturbation's cells (of those that are scored) and of the controls.
    pool
        Returns the pool of some cells and the controls.
    options
        Options; `permutations` is the most choices of units.
    name
        Name of the random draws.
    """
    codes = [units.codes[cells], units.codes[controls]]
    own, of_controls = (np.unique(some) for some in codes)
    joined = np.concatenate([own, of_controls])
    place = np.searchsorted(joined, np.concatenate(codes), sorter=np.argsort(joined))
    place = np.argsort(joined)[place]
    members = [np.flatnonzero(place == i) for i in range(len(joined))]
    where = None
    if units.batches is not None:
        batch = units.batches[np.concatenate([cells, controls])]
        where = np.array([batch[some[0]] for some in members])
    exchange = Exchange.of(len(own), len(of_controls), where)
    if not exchange.blocks:
        return UnitScore(len(own), flags=("unit_confounded",))
    most = options.permutations or UNIT_EXCHANGES
    every = exchange.log_count < np.log(most + 1)
    rng = generator(options.seed, "units", name)
    chunks = [exchange.every()] if every else exchange.draw(most, rng)
    observed = np.arange(len(joined)) < len(own)
    chosen = [column > 0 for chunk in chunks for column in chunk.T]
    chosen = [column for column in chosen if not every or (column != observed).any()]
    flags = ("few_units",) if len(chosen) < FEWEST_CHOICES else ()
    if len(chosen) < 2:
        return UnitScore(len(own), flags=flags)
    both = pool(cells)
    sizes = np.sort([len(some) for some in members[: len(own)]])[::-1]
    null = np.concatenate(
        [
            _distances(both, members, chosen[start : start + _CHUNK], sizes, rng)
            for start in range(0, len(chosen), _CHUNK)
        ]
    )
    distance = both.observed
    p = float((1 + np.count_nonzero(null >= distance - both.noise)) / (1 + len(null)))
    sd = float(null.std(ddof=1))
    z = (distance - float(null.mean())) / sd if sd > both.noise else float("nan")
    return UnitScore(len(own), z, p, flags if sd > both.noise else (*flags, "unit_sd_zero"))


def _distances(
    pool: Pool,
    members: list[NDArray[np.intp]],
    chosen: list[NDArray[np.bool_]],
    sizes: NDArray[np.intp],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Return the distance of the cells of chosen units, cut to `sizes`, from those of the others, for each choice."""
    cells = pool.a.size + pool.b.size
    kept, marked = np.zeros((2, cells, len(chosen)), dtype=np.float32)
    for column, units in enumerate(chosen):
        checkpoint()
        picked = sorted((members[i] for i in np.flatnonzero(units)), key=len, reverse=True)
        for some, size in zip(picked, sizes, strict=True):
            marked[some, column] = 1
            kept[some if len(some) <= size else rng.choice(some, size, replace=False), column] = 1
    (inside, reach), (all_inside, all_reach) = (pool.sums(_labels(pool, part)) for part in (kept, marked))
    cut = marked - kept
    cut_inside = pool.sums(_labels(pool, cut))[0] if cut.any() else np.zeros(len(chosen))
    n, m = kept.sum(axis=0, dtype=np.float64), cells - marked.sum(axis=0, dtype=np.float64)
    between = reach - (all_inside + inside - cut_inside) / 2
    rest = pool.total - 2 * all_reach + all_inside
    own = 1 if pool.estimator == "U" else 0
    value: NDArray[np.float64] = 2 * between / (n * m) - inside / (n * (n - own)) - rest / (m * (m - own))
    return value


def _labels(pool: Pool, members: NDArray[np.float32]) -> Labels:
    return Labels.of(members[: pool.a.size], members[pool.a.size :], pool.b)


def _same(a: NDArray[np.intp], b: NDArray[np.intp]) -> bool:
    """Whether two labellings divide the cells in the same way."""
    pairs = len(np.unique(np.stack([a, b]), axis=1).T)
    return pairs == len(np.unique(a)) == len(np.unique(b))
