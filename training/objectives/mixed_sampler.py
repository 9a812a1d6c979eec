"""Mixed batches: random cells of one data set, many perturbations side by side.

The alternating pairs of Zhao et al. 2025 hold one perturbed gene and its controls at a time. Objectives that the paper
names as future work compare more than two groups at once. Cells are compared only within a context (a stimulation, a
cell type), so that a pair differs by its perturbation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import TooFewCellsError

_ORDER, _CHOICE = 41, 42
UNLABELLED = -1
"""Class of a cell in a data set without perturbations."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Cells of one data set, to train or to validate on.

    Attributes
    ----------
    name
        Name of the data set.
    cells
        Numbers of the cells in the corpus, [n].
    classes
        Class of each cell (its perturbation in its context), [n]; :data:`UNLABELLED` without perturbations.
    contexts
        Context of each cell, [n].
    is_control
        Whether each cell is a control, [n].
    geometry
        Expression geometry, float32 [n, K]; see :mod:`training.objectives.geometry`.
    """

    name: str
    cells: NDArray[np.int64]
    classes: NDArray[np.int64]
    contexts: NDArray[np.int64]
    is_control: NDArray[np.bool_]
    geometry: NDArray[np.float32]


class MixedSampler:
    """Batches of one data set each, with every cell once an epoch, times the weight of its data set.

    Parameters
    ----------
    pools
        Cells of each data set.
    batch
        Cells in a batch of one process.
    weights
        Mean number of times that a cell is used in an epoch, by data set; 1 by default.
    world_size
        Number of processes.
    seed
        Seed, which with the epoch decides everything, equally on every process.

    Raises
    ------
    TooFewCellsError
        A data set has fewer training cells than a batch over all processes.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        *,
        batch: int,
        weights: Mapping[str, float] | None = None,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self._block = batch * world_size
        self._world_size = world_size
        self._seed = seed
        self._sizes = [len(pool.cells) for pool in pools]
        for pool in pools:
            if len(pool.cells) < self._block:
                raise TooFewCellsError(
                    f"{pool.name} has {len(pool.cells)} training cells, fewer than a batch of {self._block}. Make the "
                    "batch smaller, or leave the data set out.",
                    field="loop.micro_batch",
                )
        self._blocks = [
            max(1, round((weights or {}).get(pool.name, 1.0) * len(pool.cells) / self._block)) for pool in pools
        ]

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return sum(self._blocks)

    def batches(self, epoch: int, *, rank: int = 0) -> list[tuple[int, NDArray[np.int64]]]:
        """Return the batches of one process in an epoch, each as the number of a pool and places of cells in it."""
        blocks: list[tuple[int, NDArray[np.int64]]] = []
        for number, (n_blocks, n) in enumerate(zip(self._blocks, self._sizes, strict=True)):
            rng = np.random.default_rng([self._seed, _CHOICE, number, epoch])
            rounds = [rng.permutation(n) for _ in range(-(-n_blocks * self._block // n))]
            cells = np.concatenate(rounds)[: n_blocks * self._block].reshape(n_blocks, self._block)
            blocks.extend((number, block[rank :: self._world_size]) for block in cells)
        order = np.random.default_rng([self._seed, _ORDER, epoch]).permutation(len(blocks))
        return [blocks[at] for at in order.tolist()]
