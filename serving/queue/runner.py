"""Forward passes of batches: their speed, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InferenceError, PerturbScopeError
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.embedder import Embedder
from serving.queue.batches import Caller, Part, chosen, joined
from serving.queue.observer import DispatchObserver
from serving.queue.worker import Worker

MAX_BATCH_SECONDS = 120.0
"""After so long, a forward pass is taken to hang."""
_Vectors = tuple[NDArray[np.float32], float]


class Runner:
    """Runs the batches of a dispatcher on a thread of its own, one after the other.

    Parameters
    ----------
    embedder
        The model.
    max_seconds
        A forward pass that takes longer is taken to hang.
    observer
        Is told of what succeeds and what fails.
    on_stall
        Called with the error when a forward pass is taken to hang.
    """

    def __init__(
        self,
        embedder: Embedder,
        max_seconds: float,
        observer: DispatchObserver,
        on_stall: Callable[[PerturbScopeError], None],
    ) -> None:
        self.stalled = asyncio.Event()
        """Set while a forward pass hangs."""
        self.last_failed = False
        """Whether the most recent forward pass failed."""
        self._embedder = embedder
        self._max_seconds = max_seconds
        self._observer = observer
        self._on_stall = on_stall
        self._worker: Worker[_Vectors] = Worker("perturbscope-inference")
        self._tokens_per_second = 0.0
        self._probe: TokenizedCells | None = None
        """A cell that the model has answered: if it fails on this one, it is not the cells' fault."""

    def seconds(self, n_tokens: float) -> float | None:
        """How long so many tokens take at the present speed; None while it is not known.

        Batches that were not a quarter full tell of overhead only, and are not counted.
        """
        return n_tokens / self._tokens_per_second if self._tokens_per_second else None

    async def run(self, parts: list[Part]) -> _Vectors:
        """Vectors of a batch, in the order of its parts, and seconds.

        Raises
        ------
        InferenceError
            The forward pass failed; or it came back after it was taken to hang.
        """
        now = time.perf_counter()
        waited = [now - part.caller.started for part in parts if not part.caller.served]
        for part in parts:
            part.caller.served = True
        values, seconds = await self._forward(parts)
        lengths = np.concatenate([part.caller.tokens.lengths[part.rows] for part in parts])
        n_tokens = int(lengths.sum())
        n_padded = math.prod(self._embedder.limits.shape(len(lengths), int(lengths.max())))
        if n_padded * 4 >= self._embedder.limits.max_tokens:
            found = n_tokens / max(seconds, 1e-9)
            self._tokens_per_second = (self._tokens_per_second + found) / 2 if self._tokens_per_second else found
        if self._probe is None:
            tokens, rows = joined(parts)
            self._probe = chosen(tokens, rows[[np.argmin(lengths)]])
        self._observer.batch(
            n_cells=len(lengths),
            n_tokens=n_tokens,
            n_padded=n_padded,
            seconds=seconds,
            waited=waited,
            tags=[part.caller.tag for part in parts if part.caller.tag is not None],
        )
        return values, seconds

    async def lost(self) -> bool:
        """Whether the model fails on a cell that it answered before."""
        if self._probe is None:
            return False
        caller = Caller(self._probe, self._embedder.width, "", self._embedder.limits)
        try:
            await self._forward([Part(caller, np.arange(1))])
        except PerturbScopeError:
            return True
        return False

    def stall(self) -> InferenceError:
        """What callers are told while a forward pass hangs."""
        return InferenceError(
            f"The model has not come back from a forward pass for {self._max_seconds:g} s; it answers nobody until it "
            "does. Try another server."
        )

    def stop(self) -> None:
        """End the thread; one that hangs is left behind."""
        self._worker.stop(wait=not self.stalled.is_set())
        if not self.stalled.is_set():
            # Nobody is left to be told, and without this ring the model is freed at once.
            self._on_stall = _nobody

    async def _forward(self, parts: list[Part]) -> _Vectors:
        """One that hangs is waited for after all were told, as nothing else can run."""
        running = self._worker.submit(lambda: self._infer(parts))
        done, _ = await asyncio.wait([running], timeout=self._max_seconds)
        try:
            if not done:
                raise await self._returned(running)
            vectors = running.result()
        except PerturbScopeError as error:
            self.last_failed = True
            self._observer.failed(error)
            raise
        self.last_failed = False
        return vectors

    async def _returned(self, running: asyncio.Future[_Vectors]) -> InferenceError:
        """Wait for a forward pass that hangs."""
        error = self.stall()
        self.stalled.set()
        self.last_failed = True
        self._on_stall(error)
        try:
            await asyncio.wait([running])
            running.exception()  # nobody waits for it
        finally:
            if running.done():
                self.stalled.clear()
        return error

    def _infer(self, parts: list[Part]) -> _Vectors:
        """In the worker thread."""
        started = time.perf_counter()
        try:
            values = self._embedder.run(*joined(parts))
        except PerturbScopeError:
            raise
        except BaseException as error:
            n_cells = sum(len(part.rows) for part in parts)
            raise InferenceError(
                f"The forward pass of {n_cells} cells failed: {type(error).__name__}: {error}"
            ) from error
        return values, time.perf_counter() - started


def _nobody(error: PerturbScopeError) -> None:
    """Takes what nobody waits for any more."""
