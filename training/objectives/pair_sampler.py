"""Pairs of cells for contrastive fine-tuning, in batches (Zhao et al. 2025).

For each perturbed gene with n cells, n control cells of the same data set are drawn. A dissimilar pair is a perturbed
cell and one of these controls; a similar pair is two different ones of these controls. Batches alternate strictly
between the two kinds, and a dissimilar batch holds cells of one perturbed gene only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError, TooFewCellsError, TooFewControlsError

_POOL, _EPOCH, _ORDER = 1, 2, 3
MIN_CONTROLS = 3
"""Fewest controls of a group; two different ones can then be paired even if controls are used several times."""


@dataclass(frozen=True, eq=False)
class Group:
    """Cells of one perturbed gene in one data set, and the controls that may be paired with them.

    Attributes
    ----------
    name
        Data set and gene, joined by a slash.
    cells
        Perturbed cells, [n].
    controls
        Control cells of the same data set and split, [m].
    """

    name: str
    cells: NDArray[np.int64]
    controls: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Pairs of one kind.

    Attributes
    ----------
    similar
        Whether both cells of a pair are controls.
    first, second
        Numbers of the cells, [n_pairs] each; in a dissimilar batch `first` is perturbed.
    name
        Name of the group that the cells belong to.
    """

    similar: bool
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    name: str


class PairSampler:
    """Alternating batches of dissimilar and similar pairs.

    Parameters
    ----------
    groups
        Groups to make pairs of.
    batch
        Pairs in a batch of one process; at least 3.
    world_size
        Number of processes.
    redraw
        Whether to draw the controls of each group anew every epoch, or once.
    seed
        Seed, which with the epoch decides everything, equally on every process.

    Raises
    ------
    TooFewCellsError
        There is no group, or a group has fewer than 2 cells.
    TooFewControlsError
        A group has fewer than 3 controls.
    """

    def __init__(
        self, groups: Sequence[Group], *, batch: int, world_size: int = 1, redraw: bool = False, seed: int = 0
    ) -> None:
        if batch < 3:
            raise InvalidParameterError(f"micro_batch is {batch} pairs; at least 3 are needed.", field="micro_batch")
        if not groups:
            raise TooFewCellsError("There is no perturbation to make pairs of.", field="split")
        for group in groups:
            if len(group.cells) < 2:
                raise TooFewCellsError(
                    f"{group.name} has {len(group.cells)} cell(s); a batch of pairs needs at least 2.", field="split"
                )
            if len(group.controls) < MIN_CONTROLS:
                raise TooFewControlsError(
                    f"{group.name} has {len(group.controls)} controls in this part of the split; at least "
                    f"{MIN_CONTROLS} are needed. Give this part a larger share of control_fractions.",
                    field="split.control_fractions",
                )
        self._groups = groups
        self._size = batch * world_size
        self._world_size = world_size
        self._redraw = redraw
        self._seed = seed
        self._bounds = [batch_bounds(len(group.cells), self._size) for group in groups]

    def __len__(self) -> int:
        """Number of batches in an epoch, of both kinds."""
        return 2 * sum(len(bounds) - 1 for bounds in self._bounds)

    def batches(self, epoch: int, *, rank: int = 0) -> list[PairBatch]:
        """Return the batches of one process in an epoch: dissimilar, similar, dissimilar, ...

        Each perturbed cell is in one dissimilar pair of an epoch, and there are as many similar pairs. The control in
        its pair, the pairs of controls and the order of all batches change every epoch. The similar batch comes from
        the same group as the dissimilar batch before it. A batch repeats pairs of its own up to a multiple of
        `world_size`, so that each process gets the same number.
        """
        pairs = [self._pairs(number, epoch) for number in range(len(self._groups))]
        places = [(number, at) for number, bounds in enumerate(self._bounds) for at in range(len(bounds) - 1)]
        order = np.random.default_rng([self._seed, _ORDER, epoch]).permutation(len(places))
        batches = []
        for place in order.tolist():
            number, at = places[place]
            start, stop = self._bounds[number][at : at + 2]
            share = np.resize(np.arange(start, stop), -(-(stop - start) // self._world_size) * self._world_size)
            share = share[rank :: self._world_size]
            for similar in (False, True):
                first, second = pairs[number][similar]
                batches.append(PairBatch(similar, first[share], second[share], self._groups[number].name))
        return batches

    def pool(self, number: int, epoch: int) -> NDArray[np.int64]:
        """Return the controls drawn for group `number`: as many as its perturbed cells, each once if possible."""
        group = self._groups[number]
        rng = np.random.default_rng([self._seed, _POOL, number, epoch if self._redraw else 0])
        n, m = len(group.cells), len(group.controls)
        rounds = [rng.permutation(group.controls) for _ in range(-(-n // m))]
        return np.concatenate(rounds)[:n]

    def _pairs(self, number: int, epoch: int) -> tuple[tuple[NDArray[Any], NDArray[Any]], ...]:
        """Return the dissimilar pairs of a group in this epoch, then the similar ones."""
        rng = np.random.default_rng([self._seed, _EPOCH, number, epoch])
        pool = self.pool(number, epoch)
        dissimilar = (rng.permutation(self._groups[number].cells), rng.permutation(pool))
        # In a random order of the distinct controls, equal ones side by side: a shift by the largest multiplicity gives
        # each a partner that differs from it.
        names, codes, counts = np.unique(pool, return_inverse=True, return_counts=True)
        ring = pool[np.argsort(rng.permutation(len(names))[codes], kind="stable")]
        mixed = rng.permutation(len(ring))
        return dissimilar, (ring[mixed], np.roll(ring, -int(counts.max()))[mixed])


def batch_bounds(n: int, size: int) -> list[int]:
    """Return the bounds of batches of `size` among `n` pairs; the last one is smaller, but never a single pair."""
    bounds = [*range(0, n, size), n]
    if n - bounds[-2] == 1 and n > 1:
        bounds[-2] -= 1
    return bounds
