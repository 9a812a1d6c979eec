"""Order of the cells in pre-training: batches of similar length, in random order.

Sorting cells by length saves padding, but a sorted epoch runs from long to short cells, so successive gradients come
from one kind of cell; Zhao et al. 2025 measured a far worse perplexity. Shuffling the sorted batches mends this, if the
shuffled blocks are those of ALL processes together: if blocks for one process were shuffled and dealt out by rank, the
processes of one step would get cells of different length, and wait for the longest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError


class LengthGroupedSampler:
    """Global blocks of `batch` x `world_size` cells of similar length, shuffled.

    Parameters
    ----------
    lengths
        Tokens of each cell, [n_cells].
    batch
        Cells in a batch of one process.
    world_size
        Number of processes.
    megabatch
        Number of blocks that are sorted by length together.
    seed
        Seed, which with the epoch decides the order, equally on every process and machine.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer[Any]],
        *,
        batch: int,
        world_size: int = 1,
        megabatch: int = 50,
        seed: int = 0,
    ) -> None:
        if not len(lengths):
            raise InvalidParameterError("There are no cells to sample from.", field="corpus")
        self._lengths = lengths
        self._block = batch * world_size
        self._world_size = world_size
        self._megabatch = megabatch
        self._seed = seed

    def __len__(self) -> int:
        """Number of blocks in an epoch."""
        return -(-len(self._lengths) // self._block)

    def blocks(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the cells of each global block of an epoch, in order.

        1. one random permutation of the cells; 2. cut into runs of `megabatch` blocks; 3. each run sorted by length,
        longest first; 4. cut into blocks, and the full blocks of a run shuffled (an incomplete one stays last, filled
        up to a multiple of `world_size` with its own first cells); 5. the full block of the longest cell moved to the
        front, so that a batch that does not fit into memory fails at once.
        """
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._lengths))
        blocks: list[NDArray[np.int64]] = []
        run_size = self._megabatch * self._block
        for start in range(0, len(order), run_size):
            run = order[start : start + run_size]
            run = run[np.argsort(-self._lengths[run].astype(np.int64), kind="stable")]
            n_full = len(run) // self._block
            full = run[: n_full * self._block].reshape(n_full, self._block)
            blocks.extend(full[rng.permutation(n_full)])
            rest = run[n_full * self._block :]
            if len(rest):
                even = -(-len(rest) // self._world_size) * self._world_size
                blocks.append(np.resize(rest, even))
        n_full = len(self._lengths) // self._block
        if n_full:
            longest = max(range(n_full), key=lambda at: int(self._lengths[blocks[at]].max()))
            blocks.insert(0, blocks.pop(longest))
        return blocks

    def batches(self, epoch: int, *, rank: int = 0) -> list[NDArray[np.int64]]:
        """Return the cells of each micro-batch of one process in an epoch."""
        return [block[rank :: self._world_size] for block in self.blocks(epoch)]
