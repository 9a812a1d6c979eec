"""Stand-ins for slow parts, for tests of the code around them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.families.outputs import CELL_EMBEDDING, cell_embedding
from perturbscope.inference.encoder import Values


class FakeEncoder:
    """An encoder without a model: a cell's vector says which cell it is.

    Value 0 is the cell's length, value 1 its best-ranked token, value 2 the mean of its tokens; the rest are 0. So a
    test can tell whether every caller got its own cells back, whatever the batches were.

    Parameters
    ----------
    width
        Dimensions of a vector; at least 3.
    delay
        Seconds that one batch takes.
    error
        Raised by every batch while it is set.
    gate
        If given, a batch waits until the event is set: a test decides when the "GPU" is free.

    Attributes
    ----------
    batches
        Shape [cells, longest] of each batch that arrived, in order.
    """

    provider = ""

    def __init__(
        self,
        width: int = 8,
        *,
        delay: float = 0.0,
        error: Exception | None = None,
        gate: threading.Event | None = None,
    ) -> None:
        self.width = width
        self.outputs = (cell_embedding(width),)
        self.delay = delay
        self.error = error
        self.gate = gate
        self.batches: list[tuple[int, int]] = []

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        tokens, mask = inputs["input_ids"], inputs["attention_mask"]
        self.batches.append((mask.shape[0], mask.shape[1]))
        if self.gate is not None:
            assert self.gate.wait(30), "the test never opened the gate"
        if self.delay:
            time.sleep(self.delay)
        if self.error is not None:
            raise self.error
        values = np.zeros((len(mask), self.width), dtype=np.float32)
        values[:, 0] = mask.sum(axis=1)
        values[:, 1] = tokens[:, 0]
        values[:, 2] = (tokens * mask).sum(axis=1) / mask.sum(axis=1)
        return {CELL_EMBEDDING: values}

    def close(self) -> None:
        """Do nothing: there is no model."""
