"""The queue in front of one model: which callers are let in, and what they are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np

from perturbscope.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidParameterError,
    OverloadedError,
    PerturbScopeError,
)
from perturbscope.families.outputs import Outputs, selected
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.embedder import Embedder
from serving.queue.batches import BatchPart, BatchRunner, Submission, next_batch
from serving.queue.fairness import FairShare, Room
from serving.queue.observer import DispatchObserver, Reason

MAX_BATCH_SECONDS = 120.0
"""Default of the seconds after which a forward pass counts as hung."""
MAX_QUEUED_TOKENS = 4_194_304
"""Default queue budget: 2,048 cells of 2,048 tokens."""
LARGEST_SHARE = 4
"""A caller counts for at most the budget of the queue divided by this."""
MIN_RETRY, MAX_RETRY = 0.1, 60.0
"""Bounds of the retry hint, seconds."""


class Dispatcher:
    """Runs the cells of concurrent callers in shared batches.

    All methods run on one event loop; only the forward pass leaves it. So there are no locks. :mod:`serving.queue`
    describes the order of batches and the bound of the wait.

    Parameters
    ----------
    embedder
        Embedder whose model runs.
    max_queued_tokens
        Tokens of all callers that may be accepted and not yet answered. A caller counts for at most a quarter of it,
        however large it is: fair sharing keeps others from waiting for the rest. The larger a caller, the more room it
        must leave (:class:`serving.queue.fairness.Room`), so that a bulk caller does not get small ones refused.
    max_batch_seconds
        Seconds after which a forward pass counts as hung: all callers get an error, and new ones are refused at once,
        until it returns.
    observer
        Observer that is told of batches, failures and dropped cells; for metrics; None: nobody is.

    Raises
    ------
    InvalidParameterError
        A limit is not above 0.
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
        self._observer = observer
        self._runner = BatchRunner(embedder, max_batch_seconds, observer, self._fail_all)
        self._open: set[Submission] = set()
        self._share: FairShare[Submission] = FairShare(embedder.limits.max_tokens)
        self._room = Room(max_queued_tokens)
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def pending_tokens(self) -> int:
        """Tokens that were accepted and are not answered yet."""
        return sum(submission.unanswered_tokens for submission in self._open)

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
        self,
        tokens: TokenizedCells,
        *,
        outputs: Sequence[str] | None = None,
        flow: str = "",
        deadline: float | None = None,
        tag: object = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Outputs, dict[str, float]]:
        """Compute outputs of cells, together with those of other callers.

        Parameters
        ----------
        tokens
            Cells of the caller, from :meth:`Embedder.tokenize`.
        outputs
            Names of outputs; the cell embedding is always computed, and alone by default.
        flow
            Flow that the caller belongs to (the name of an API key); callers of one flow share its part of the model.
        deadline
            Time of ``time.monotonic`` after which nobody waits for the answer; None: never.
        tag
            Object that the observer is told with each batch that holds cells of this caller; None: nothing.
        progress
            Called on the event loop with the number of cells that are done, after each batch.

        Returns
        -------
        The outputs, in the order of `tokens`, and the timings in seconds: ``inference`` of the batches that held a cell
        of this caller, and ``queue`` for the rest of the time.

        Raises
        ------
        InvalidParameterError
            The model has no such output.
        OverloadedError
            The queue is full, or the dispatcher is closing; ``retry_after`` says when to try again.
        DeadlineExceededError
            The deadline has passed, or would pass before the answer at the present speed.
        InferenceError
            A forward pass with cells of this caller failed, or one hangs.
        """
        specs = selected(self.embedder.outputs, outputs)
        cost = int(self.embedder.limits.costs_of(tokens.lengths).sum())
        self.require_room(len(tokens), cost, flow, deadline)
        submission = Submission(tokens, specs, flow, self.embedder.limits, tag)
        submission.progress = progress
        if not len(tokens):
            return submission.values, {"queue": 0.0, "inference": 0.0}
        loop = asyncio.get_running_loop()
        counted = self._counted(cost)
        self._room.take(counted, flow)
        self._open.add(submission)
        self._share.join(submission, flow)
        if self._task is None:
            self._task = loop.create_task(self._drain(), name="perturbscope-dispatcher")
        timer = None if deadline is None else loop.call_later(deadline - time.monotonic(), submission.fail, _too_late())
        try:
            # Cancelling the caller's task cancels this future.
            await submission.done
        except (asyncio.CancelledError, DeadlineExceededError):
            late = deadline is not None and time.monotonic() >= deadline
            self._dropped(len(tokens) - submission.answered, "deadline" if late else "cancelled")
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._share.leave(submission)  # its cells are in no later batch
            self._open.discard(submission)
            self._room.give(counted, flow)
        queue = time.perf_counter() - submission.started - submission.inference
        return submission.values, {"queue": max(queue, 0.0), "inference": submission.inference}

    def require_room(self, n_cells: int, cost: int, flow: str = "", deadline: float | None = None) -> None:
        """Raise what :meth:`submit` would raise now for `cost` tokens, and count the cells as refused.

        A call before cells are tokenized spares that work.

        Raises
        ------
        OverloadedError, DeadlineExceededError, InferenceError
            See :meth:`submit`.
        """
        try:
            self.check_room(cost, flow)
            self._check_time(cost, flow, deadline)
        except (OverloadedError, DeadlineExceededError) as error:
            overloaded = isinstance(error, OverloadedError)
            self._dropped(n_cells, "overloaded" if overloaded else "deadline")
            raise

    def check_room(self, cost: int, flow: str = "") -> None:
        """Raise unless there is room for `cost` tokens now.

        Raises
        ------
        OverloadedError
            The queue is full, or the dispatcher is closing.
        InferenceError
            A forward pass hangs.
        """
        if self._closed:
            raise OverloadedError("The server is shutting down. Try again, or use another server.", retry_after=5.0)
        if self.stalled:
            raise self._runner.stall_error()
        missing = self._room.missing(self._counted(cost), flow)
        if missing:
            raise OverloadedError(
                f"The queue holds {self.pending_tokens:,} tokens, and this request would add {cost:,}; the limit is "
                f"{self.max_queued_tokens:,}, of which a request leaves room to others. Try again after the stated "
                "time, or send fewer cells.",
                retry_after=self._retry_after(missing),
            )

    async def close(self) -> None:
        """Refuse new callers, finish the accepted ones, and stop the thread. May be called twice.

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
        self.stop()

    def stop(self) -> None:
        """Refuse new callers and stop the thread, where there is nobody to be answered."""
        self._closed = True
        self._runner.stop()

    def _dropped(self, n_cells: int, reason: Reason) -> None:
        if self._observer is not None:
            self._observer.dropped(n_cells=n_cells, reason=reason)

    def _counted(self, cost: int) -> int:
        return max(1, min(cost, self.max_queued_tokens // LARGEST_SHARE))

    def _retry_after(self, missing: int) -> float:
        """Seconds until `missing` counted tokens should be free, at the speed of the last batches."""
        n_tokens = missing / max(self._room.used, 1) * self.pending_tokens
        return float(np.clip(self._runner.seconds(n_tokens) or 1.0, MIN_RETRY, MAX_RETRY))

    def _check_time(self, cost: int, flow: str, deadline: float | None) -> None:
        """Raise DeadlineExceededError if the deadline has passed, or cannot be kept with a fair share of the model."""
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
        """Run batch after batch until nobody waits."""
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
            if any(not submission.done.done() for submission in self._open):
                self._fail_all(
                    self._runner.stall_error() if self.stalled else InferenceError("The inference worker was stopped.")
                )

    async def _run(self, parts: list[BatchPart]) -> None:
        """Run one batch and answer its callers.

        A batch of several callers that fails is run again caller by caller: the one whose cells the model cannot
        take (say, an overflow in half precision) fails alone, and the others in the batch do not notice. But if the
        model fails on a cell that it answered before, all callers are told at once.
        """
        parts = [part for part in parts if not part.submission.done.done()]
        if not parts:
            return
        try:
            await self._answer(parts)
        except PerturbScopeError as error:
            if len(parts) == 1:
                parts[0].submission.fail(error)
            if not self._others_wait(parts[0].submission if len(parts) == 1 else None):
                return
            if await self._runner.fails_on_known_cell():
                self._fail_all(error)
            elif len(parts) > 1:
                for part in parts:
                    await self._run([part])

    def _others_wait(self, submission: Submission | None) -> bool:
        return any(other is not submission and not other.done.done() for other in self._open)

    async def _answer(self, parts: list[BatchPart]) -> None:
        """Run the forward pass of a batch, and answer its callers. Raises as :meth:`BatchRunner.run`."""
        values, seconds = await self._runner.run(parts)
        start = 0
        for part in parts:
            submission, stop = part.submission, start + len(part.rows)
            submission.values.put(part.rows, values, start)
            submission.answered += len(part.rows)
            if submission.progress is not None:
                submission.progress(submission.answered)
            lengths = submission.tokens.lengths[part.rows]
            submission.unanswered_tokens -= int(self.embedder.limits.costs_of(lengths).sum())
            submission.inference += seconds
            if submission.answered == len(submission.tokens) and not submission.done.done():
                submission.done.set_result(None)
            start = stop

    def _fail_all(self, error: PerturbScopeError) -> None:
        for submission in self._open:
            self._share.leave(submission)
            submission.fail(error)


def _too_late() -> DeadlineExceededError:
    return DeadlineExceededError("The time that the caller allowed is over. Allow more, or send fewer cells at a time.")
