"""Ways to embed the same tokens, each in a process of its own.

A process waits until it is told to run, so routes take turns, no route's threads use another's time, and each route
has a peak memory of its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding.models import Weights, tokens
from benchmarks.performance.harness import Child, Watch, padding_share
from perturbscope.threads import usable_cores

BATCHES = 10
"""Geneformer's extractor takes 1,000 cells in batches of 100, by default. Fewer cells, sorted and cut into batches of
100, would be padded more than they are there."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Cells to embed, and the model.

    Attributes
    ----------
    weights
        Weights of the model.
    source, n_cells
        Arguments of :func:`benchmarks.performance.embedding.models.tokens`.
    """

    weights: Weights
    source: str
    n_cells: int


@dataclass(frozen=True)
class Ready:
    """A route that has loaded everything.

    Attributes
    ----------
    run
        Function that embeds all cells; float32 [n_cells, width], in the order of the tokens.
    padding
        Share of the padded slots that hold no token.
    """

    run: Callable[[], NDArray[np.float32]]
    padding: float


def ours(job: Job, variant: str = "fp32") -> Ready:
    """Run :class:`perturbscope.Embedder`, from tokens to vectors."""
    from perturbscope.inference.bundle import Bundle
    from perturbscope.inference.embedder import Embedder

    embedder = Embedder.from_bundle(Bundle.open(job.weights.bundle), variant=variant)
    cells = tokens(job.weights.bundle, job.source, job.n_cells)
    return Ready(lambda: embedder.embed_tokens(cells), padding_share(cells.lengths, embedder.plan(cells)))


def extractor(job: Job, by_length: bool = True, head: bool = False, batch: int | None = None) -> Ready:
    """Run the model in transformers as Geneformer's ``EmbExtractor`` does.

    It runs all blocks on batches that are padded to their longest cell, and averages ``hidden_states[-2]`` over genes.

    Parameters
    ----------
    job
        Cells to embed, and the model.
    by_length
        Whether the longest cells come first, as in the extractor; else cells are in the order of the file.
    head
        Whether the language-model head runs too, as in the extractor for a pre-trained model.
    batch
        Number of cells of a forward pass; None: a tenth of all.
    """
    import torch

    from perturbscope.inference.bundle import Bundle

    torch.set_num_threads(usable_cores())
    whole = job.weights.torch()
    model: Any = whole if head else whole.bert
    cells = tokens(job.weights.bundle, job.source, job.n_cells)
    lengths = cells.lengths
    ends = Bundle.open(job.weights.bundle).manifest.family_config
    order = np.argsort(-lengths, kind="stable") if by_length else np.arange(len(lengths))
    batch = batch or -(-len(order) // BATCHES)
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]

    @torch.inference_mode()
    def run() -> NDArray[np.float32]:
        values = np.empty((len(lengths), whole.config.hidden_size), dtype=np.float32)
        for rows in batches:
            longest = int(lengths[rows].max())
            mask = torch.arange(longest) < torch.tensor(lengths[rows])[:, None]
            ids = torch.full(mask.shape, whole.config.pad_token_id, dtype=torch.int64)
            for place, row in enumerate(rows):
                ids[place, : lengths[row]] = torch.tensor(cells[row]["input_ids"].astype(np.int64))
            output = model(input_ids=ids, attention_mask=mask.to(torch.int64), output_hidden_states=True)
            if "start" in ends:
                mask[:, 0] = False
            if "end" in ends:
                mask[torch.arange(len(rows)), torch.tensor(lengths[rows] - 1)] = False
            states = output.hidden_states[-2].masked_fill(~mask[:, :, None], 0.0)
            values[rows] = (states.sum(dim=1) / mask.sum(dim=1, keepdim=True)).numpy()
        return values

    return Ready(run, padding_share(lengths, batches))


class Route:
    """A route in a process of its own."""

    def __init__(self, make: Callable[..., Ready], *args: Any, **options: Any) -> None:
        self._child = Child(_serve, make, args, options)
        self.padding: float = self._child.receive()

    def run(self) -> None:
        """Run one turn."""
        self._child.send("run")
        self._child.receive()

    def close(self) -> tuple[NDArray[np.float32], float]:
        """Return the last turn's vectors, and the peak memory in MiB that turns added to the loaded model."""
        self._child.send("close")
        values, added = self._child.receive()
        self._child.close()
        return values, added


def _serve(pipe: Any, make: Callable[..., Ready], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    ready = make(*args, **options)
    gc.collect()
    values: NDArray[np.float32] | None = None
    pipe.send(ready.padding)
    with Watch() as memory:
        while pipe.recv() == "run":
            values = ready.run()
            pipe.send(None)
    pipe.send((values, memory.above))
