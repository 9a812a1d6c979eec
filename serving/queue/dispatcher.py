"""The queue: who is let in, what is run when, and what callers hear of it."""

from __future__ import annotations

import asyncio
import time

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidParameterError,
    OverloadedError,
    PerturbScopeError,
)
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.embedder import Embedder
from serving.queue.batches import Caller, Part, next_batch
from serving.queue.fairness import FairShare, Room
from serving.queue.observer import DispatchObserver, NoObserver
from serving.queue.runner import MAX_BATCH_SECONDS, Runner

MAX_QUEUED_TOKENS = 4_194_304
"""Default queue budget: 2,048 cells of 2,048 tokens."""
LARGEST_SHARE = 4
"""A caller counts for at most this part of the queue's budget."""
MIN_RETRY, MAX_RETRY = 0.1, 60.0
"""Bounds of the retry hint, seconds."""


class Dispatcher:
    """Runs the cells of concurrent callers in shared batches.

    All methods run on one event loop; only the forward pass leaves it. So there are no locks. Order and bound of the
    wait stand at the head of :mod:`serving.queue`.

    Parameters
    ----------
    embedder
        The model.
    max_queued_tokens
        Tokens of all callers that may be accepted and not yet answered. A caller counts for at most a quarter of it,
        however large it is: fair sharing keeps others from waiting for the rest. The larger a caller, the more room it
        must leave (:class:`serving.queue.fairness.Room`), so that a bulk caller does not get small ones refused.
    max_batch_seconds
        A forward pass that takes longer is taken to hang: all callers are told so, and new ones refused at once, until
        it returns.
    observer
        Is told what happens; for metrics.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        max_queued_tokens: int = MAX_QUEUED_TOKENS,
        max_batch_seconds: float = MAX_BATCH_SECONDS,
        observer: DispatchObserver | None = None,
    ) -> None:
        for name, value in (("max_queued_tokens", max_queued_tokens), ("max_batch_seconds", max_batch_seconds)):
            if not value > 0:
                raise InvalidParameterError(f"{name} is {value}; it must be above 0.", field=name)
        self.embedder = embedder
        self.max_queued_tokens = max_queued_tokens
        self._observer: DispatchObserver = observer or NoObserver()
        self._runner = Runner(embedder, max_batch_seconds, self._observer, self._fail_all)
        self._open: set[Caller] = set()
        self._share: FairShare[Caller] = FairShare(embedder.limits.max_tokens)
        self._room = Room(max_queued_tokens)
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def pending_tokens(self) -> int:
        """Tokens that were accepted and are not answered yet."""
        return sum(caller.unanswered_tokens for caller in self._open)

    @property
    def pending_callers(self) -> int:
        """Callers that were accepted and are not answered yet."""
        return len(self._open)

    @property
    def stalled(self) -> bool:
        """Whether a forward pass has not returned for `max_batch_seconds`."""
        return self._runner.stalled.is_set()

    @property
    def last_batch_failed(self) -> bool:
        """Whether the most recent forward pass failed: a reason to probe the model before calling it ready."""
        return self._runner.last_failed

    async def submit(
        self, tokens: TokenizedCells, *, flow: str = "", deadline: float | None = None, tag: object = None
    ) -> tuple[NDArray[np.float32], dict[str, float]]:
        """Embed cells together with those of other callers.

        Parameters
        ----------
        tokens
            What :meth:`Embedder.tokenize` made of the caller's cells.
        flow
            On whose behalf (the name of an API key): callers of one flow share that flow's part of the model.
        deadline
            When nobody waits for the answer any more, in the time of ``time.monotonic``.
        tag
            What the observer knows this caller by, in every batch that holds cells of it; None: it need not know.

        Returns
        -------
        The vectors, float32 [n_cells, width], in the order of `tokens`, and the timings in seconds: ``inference``,
        the batches that held a cell of this caller, and ``queue``, all the rest of the time.

        Raises
        ------
        OverloadedError
            The queue is full, or the dispatcher is closing; says when to try again.
        DeadlineExceededError
            The deadline has passed, or would have when the answer is there at the present speed.
        InferenceError
            A forward pass with cells of this caller failed, or one does not come back.
        """
        cost = int(tokens.offsets[-1] - tokens.offsets[0])
        self.require_room(len(tokens), cost, flow, deadline)
        caller = Caller(tokens, self.embedder.width, flow, self.embedder.limits, tag)
        if not len(tokens):
            return caller.values, {"queue": 0.0, "inference": 0.0}
        loop = asyncio.get_running_loop()
        counted = self._counted(cost)
        self._observer.accepted(n_cells=len(tokens), n_tokens=cost)
        self._room.take(counted, flow)
        self._open.add(caller)
        self._share.join(caller, flow)
        if self._task is None:
            self._task = loop.create_task(self._drain(), name="perturbscope-dispatcher")
        timer = None if deadline is None else loop.call_later(deadline - time.monotonic(), caller.fail, _too_late())
        try:
            # Cancelling the caller's task cancels this future.
            await caller.done
        except (asyncio.CancelledError, DeadlineExceededError):
            late = deadline is not None and time.monotonic() >= deadline
            self._observer.dropped(n_cells=len(tokens) - caller.answered, reason="deadline" if late else "cancelled")
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._share.leave(caller)  # its cells are in no later batch
            self._open.discard(caller)
            self._room.give(counted, flow)
        queue = time.perf_counter() - caller.started - caller.inference
        return caller.values, {"queue": max(queue, 0.0), "inference": caller.inference}

    def require_room(self, n_cells: int, cost: int, flow: str = "", deadline: float | None = None) -> None:
        """Raise what :meth:`submit` would raise now for `cost` tokens, and count the cells as refused.

        Called before cells are tokenized, it spares the work of that.

        Raises
        ------
        OverloadedError, DeadlineExceededError, InferenceError
            As :meth:`submit`.
        """
        try:
            self.check_room(cost, flow)
            self._check_time(cost, flow, deadline)
        except (OverloadedError, DeadlineExceededError) as error:
            overloaded = isinstance(error, OverloadedError)
            self._observer.dropped(n_cells=n_cells, reason="overloaded" if overloaded else "deadline")
            raise

    def check_room(self, cost: int, flow: str = "") -> None:
        """Whether there is room for `cost` tokens now.

        Raises
        ------
        OverloadedError
            The queue is full, or the dispatcher is closing.
        InferenceError
            The model does not answer.
        """
        if self._closed:
            raise OverloadedError("The server is shutting down. Try again, or use another server.", retry_after=5.0)
        if self.stalled:
            raise self._runner.stall()
        missing = self._room.missing(self._counted(cost), flow)
        if missing:
            raise OverloadedError(
                f"The queue holds {self.pending_tokens:,} tokens, and this request would add {cost:,}; the limit is "
                f"{self.max_queued_tokens:,}, of which a request leaves room to others. Try again after the stated "
                "time, or send fewer cells.",
                retry_after=self._retry_after(missing),
            )

    async def close(self) -> None:
        """Refuse new callers, finish the accepted ones, and stop the worker. May be called twice.

        A forward pass that hangs is not waited for.
        """
        self._closed = True
        while self._task is not None and not self.stalled:
            stalled = asyncio.ensure_future(self._runner.stalled.wait())
            await asyncio.wait([self._task, stalled], return_when=asyncio.FIRST_COMPLETED)
            stalled.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._runner.stop()

    def _counted(self, cost: int) -> int:
        return max(1, min(cost, self.max_queued_tokens // LARGEST_SHARE))

    def _retry_after(self, missing: int) -> float:
        """Seconds until `missing` of what callers count for should be free, at the speed of the last batches."""
        whole = missing / max(self._room.used, 1) * self.pending_tokens
        return float(np.clip(self._runner.seconds(whole) or 1.0, MIN_RETRY, MAX_RETRY))

    def _check_time(self, cost: int, flow: str, deadline: float | None) -> None:
        """Raise DeadlineExceededError where a fair share of the model is too little, or the deadline has passed."""
        if deadline is None:
            return
        remaining = deadline - time.monotonic()
        alone = self.pending_tokens + cost
        needed = self._runner.seconds(min(alone, cost * self._share.rivals(flow))) or 0.0
        if remaining <= needed:
            raise DeadlineExceededError(
                f"The {cost:,} tokens of this request need {needed:.1f} s beside the others that wait, and its caller "
                f"waits {max(remaining, 0.0):.1f} s more. Allow more time, or send fewer cells at a time."
            )

    async def _drain(self) -> None:
        """Batch after batch until nobody waits."""
        try:
            while len(self._share):
                parts = next_batch(self._share, self.embedder.limits)
                try:
                    await self._run(parts)
                finally:
                    self._share.settle()
        finally:
            self._task = None
            # Nobody is left here unless this task was cancelled or has a bug: even then every caller must hear of it.
            self._fail_all(
                self._runner.stall() if self.stalled else InferenceError("The inference worker was stopped.")
            )

    async def _run(self, parts: list[Part]) -> None:
        """Run one batch and answer its callers.

        A batch of several callers that fails is run again caller by caller: the one whose cells the model cannot
        take (say, an overflow in half precision) fails alone, and its batch-mates do not notice. But where the model
        fails on a cell that it answered before, all callers are told at once.
        """
        parts = [part for part in parts if not part.caller.done.done()]
        if not parts:
            return
        try:
            await self._answer(parts)
        except PerturbScopeError as error:
            if len(parts) == 1:
                parts[0].caller.fail(error)
            if not self._open_beside(parts[0].caller if len(parts) == 1 else None):
                return
            if await self._runner.lost():
                self._fail_all(error)
            elif len(parts) > 1:
                for part in parts:
                    await self._run([part])

    def _open_beside(self, caller: Caller | None) -> bool:
        return any(other is not caller and not other.done.done() for other in self._open)

    async def _answer(self, parts: list[Part]) -> None:
        """The forward pass of a batch, and what its callers get of it. Raises what the forward pass raised."""
        values, seconds = await self._runner.run(parts)
        start = 0
        for part in parts:
            caller, stop = part.caller, start + len(part.rows)
            caller.values[part.rows] = values[start:stop]
            caller.answered += len(part.rows)
            caller.unanswered_tokens -= int(caller.tokens.lengths[part.rows].sum())
            caller.inference += seconds
            if caller.answered == len(caller.tokens) and not caller.done.done():
                caller.done.set_result(None)
            start = stop

    def _fail_all(self, error: PerturbScopeError) -> None:
        for caller in self._open:
            self._share.leave(caller)
            caller.fail(error)


def _too_late() -> DeadlineExceededError:
    return DeadlineExceededError("The time that the caller allowed is over. Allow more, or send fewer cells at a time.")
