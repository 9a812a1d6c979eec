"""One queue between many callers and the one model.

Concurrent callers hand in tokenized cells; the dispatcher runs them together, in batches of similar length, on a
single worker thread. There is no timer: an idle worker starts at once, and batches grow only because work piled up
while the last window ran. (The shape follows text-embeddings-inference: budget in tokens, callers that went away are
dropped before they cost compute; the window that is sorted, cut and finished before the next follows infinity.)

All methods run on one event loop; only the forward pass leaves it. So there are no locks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from perturbscope.embedder import Embedder
from perturbscope.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidParameterError,
    OverloadedError,
    PerturbScopeError,
)
from perturbscope.families import TokenizedCells, concatenate

WINDOW_BATCHES = 4
"""Default window, in full batches: wide enough to sort by length, narrow enough that a newcomer waits little."""
MAX_QUEUED_TOKENS = 4_194_304
"""Default queue budget: 2,048 cells of 2,048 tokens."""
MIN_RETRY, MAX_RETRY = 0.1, 60.0
"""Bounds of the retry hint, seconds."""


class DispatchObserver(Protocol):
    """Is told what a :class:`Dispatcher` does, on its event loop; for metrics. Must be quick and not raise."""

    def accepted(self, *, n_cells: int, n_tokens: int) -> None:
        """A caller was taken into the queue."""
        ...

    def batch(
        self,
        *,
        n_cells: int,
        n_tokens: int,
        n_padded: int,
        seconds: float,
        waited: Sequence[float],
        tags: Sequence[object],
    ) -> None:
        """A forward pass succeeded.

        Parameters
        ----------
        n_cells, n_tokens
            Of the batch.
        n_padded
            Slots of the padded batch, cells x longest length: the padding share is ``1 - n_tokens / n_padded``.
        seconds
            That it took.
        waited
            For each caller that had its first cells in this batch, the seconds since it was accepted.
        tags
            Those of the callers that had cells in it; see :meth:`Dispatcher.submit`.
        """
        ...

    def failed(self, error: PerturbScopeError) -> None:
        """A forward pass failed."""
        ...

    def dropped(self, *, n_cells: int, reason: Literal["cancelled", "deadline", "overloaded"]) -> None:
        """Cells were refused (``overloaded``), or will not be run any more because nobody waits for them."""
        ...


class _NoObserver:
    """Listens to nothing."""

    def accepted(self, *, n_cells: int, n_tokens: int) -> None: ...

    def batch(
        self,
        *,
        n_cells: int,
        n_tokens: int,
        n_padded: int,
        seconds: float,
        waited: Sequence[float],
        tags: Sequence[object],
    ) -> None: ...

    def failed(self, error: PerturbScopeError) -> None: ...

    def dropped(self, *, n_cells: int, reason: Literal["cancelled", "deadline", "overloaded"]) -> None: ...


@dataclass(eq=False)
class _Caller:
    """One call of :meth:`Dispatcher.submit` that has not been answered yet."""

    tokens: TokenizedCells
    values: NDArray[np.float32]
    done: asyncio.Future[None]
    taken: int = 0
    """Cells that are in the running window or behind it."""
    answered: int = 0
    """Cells whose vectors are in `values`."""
    inference: float = 0.0
    """Seconds of the batches that held a cell of this caller."""
    flow: str = ""
    deadline: float | None = None
    tag: object = None
    started: float = field(default_factory=time.perf_counter)
    served: bool = False
    """Whether a batch with a cell of this caller was begun."""

    def fits(self, allowance: int) -> int:
        """Where the next cells stop that hold at most `allowance` tokens together; one cell at least."""
        offsets = self.tokens.offsets
        stop = int(np.searchsorted(offsets, int(offsets[self.taken]) + allowance, side="right")) - 1
        return min(max(stop, self.taken + 1), len(self.tokens))

    def cost(self, start: int, stop: int) -> int:
        """Tokens of the cells from `start` to `stop`."""
        return int(self.tokens.offsets[stop] - self.tokens.offsets[start])


@dataclass
class _Window:
    """Cells of several callers, joined."""

    callers: list[_Caller]
    tokens: TokenizedCells
    owner: NDArray[np.intp]
    """Index into `callers` of each cell."""
    row: NDArray[np.intp]
    """Which cell of its caller each cell is."""
    tokens_run: int = field(default=0)


class Dispatcher:
    """Runs the cells of concurrent callers in shared batches.

    Each window takes cells from every waiting caller in order of arrival: first an equal share of the window each,
    then as much as still fits. A small request so never waits for the whole of a large one, and the oldest caller
    is always served, so nobody starves.

    Parameters
    ----------
    embedder
        The model.
    max_queued_tokens
        Tokens of all callers that may be accepted and not yet answered. A caller that comes to an idle
        dispatcher is always accepted: it could never be served otherwise.
    window_tokens
        Tokens of one window; default: four full batches of the embedder.
    observer
        Is told what happens; for metrics.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        max_queued_tokens: int = MAX_QUEUED_TOKENS,
        window_tokens: int | None = None,
        observer: DispatchObserver | None = None,
    ) -> None:
        window_tokens = WINDOW_BATCHES * embedder.limits.max_tokens if window_tokens is None else window_tokens
        for name, value in (("max_queued_tokens", max_queued_tokens), ("window_tokens", window_tokens)):
            if value < 1:
                raise InvalidParameterError(f"{name} is {value}; it must be at least 1.", field=name)
        self.embedder = embedder
        self.max_queued_tokens = max_queued_tokens
        self.window_tokens = window_tokens
        self.last_batch_failed = False
        """Whether the most recent forward pass failed: a reason to probe the model before calling it ready."""
        self._observer: DispatchObserver = observer or _NoObserver()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="perturbscope-inference")
        self._open: set[_Caller] = set()
        self._waiting: deque[_Caller] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._pending = 0
        self._tokens_per_second = 0.0

    @property
    def pending_tokens(self) -> int:
        """Tokens that were accepted and are not answered yet."""
        return self._pending

    @property
    def pending_callers(self) -> int:
        """Callers that were accepted and are not answered yet."""
        return len(self._open)

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
            A forward pass with cells of this caller failed.
        """
        cost = int(tokens.offsets[-1] - tokens.offsets[0])
        try:
            self.check_room(cost)
        except OverloadedError:
            self._observer.dropped(n_cells=len(tokens), reason="overloaded")
            raise
        if deadline is not None:
            try:
                self._check_time(cost, deadline)
            except DeadlineExceededError:
                self._observer.dropped(n_cells=len(tokens), reason="deadline")
                raise
        values = np.empty((len(tokens), self.embedder.width), dtype=np.float32)
        if not len(tokens):
            return values, {"queue": 0.0, "inference": 0.0}
        loop = asyncio.get_running_loop()
        caller = _Caller(tokens, values, loop.create_future(), flow=flow, deadline=deadline, tag=tag)
        self._observer.accepted(n_cells=len(tokens), n_tokens=cost)
        self._pending += cost
        self._open.add(caller)
        self._waiting.append(caller)
        if self._task is None:
            self._task = loop.create_task(self._drain(), name="perturbscope-dispatcher")
        try:
            # Cancelling the caller's task cancels this future; the worker sees that and drops its cells.
            await caller.done
        except asyncio.CancelledError:
            late = deadline is not None and time.monotonic() >= deadline
            self._observer.dropped(n_cells=len(tokens) - caller.answered, reason="deadline" if late else "cancelled")
            raise
        finally:
            self._open.discard(caller)
            self._pending -= cost
        queue = time.perf_counter() - caller.started - caller.inference
        return values, {"queue": max(queue, 0.0), "inference": caller.inference}

    def check_room(self, cost: int) -> None:
        """Raise what :meth:`submit` would raise now for `cost` tokens; spares the work of making them.

        Raises
        ------
        OverloadedError
            The queue is full, or the dispatcher is closing.
        """
        if self._closed:
            raise OverloadedError("The server is shutting down. Try again, or use another server.", retry_after=5.0)
        if self._pending and self._pending + cost > self.max_queued_tokens:
            raise OverloadedError(
                f"The queue holds {self._pending:,} tokens, and this request would add {cost:,}; the limit is "
                f"{self.max_queued_tokens:,}. Try again after the stated time, or send fewer cells.",
                retry_after=self._retry_after(cost),
            )

    def _check_time(self, cost: int, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        needed = cost / self._tokens_per_second if self._tokens_per_second else 0.0
        if remaining <= needed:
            raise DeadlineExceededError(
                f"The {cost:,} tokens of this request need {needed:.1f} s, and its caller waits "
                f"{max(remaining, 0.0):.1f} s more. Allow more time, or send fewer cells at a time."
            )

    async def close(self) -> None:
        """Refuse new callers, finish the accepted ones, and stop the worker. May be called twice."""
        self._closed = True
        while self._task is not None:
            await asyncio.wait([self._task])
        self._worker.shutdown()

    def _retry_after(self, cost: int) -> float:
        """Seconds until there should be room for `cost` tokens, at the speed of the last windows."""
        excess = min(self._pending, self._pending + cost - self.max_queued_tokens)
        seconds = excess / self._tokens_per_second if self._tokens_per_second else 1.0
        return float(np.clip(seconds, MIN_RETRY, MAX_RETRY))

    async def _drain(self) -> None:
        """Window after window until nobody waits."""
        try:
            while self._waiting:
                window = self._take_window()
                if window is not None:
                    await self._run_window(window)
        finally:
            self._task = None
            # Nobody is left here unless this task was cancelled or has a bug: even then every caller must hear of it.
            for caller in self._open:
                _fail(caller, InferenceError("The inference worker was stopped."))

    def _take_window(self) -> _Window | None:
        """Cells of the waiting callers, in order of arrival; None if all of them went away."""
        self._waiting = deque(caller for caller in self._waiting if not caller.done.done())
        if not self._waiting:
            return None
        budget = self.window_tokens
        start = {caller: caller.taken for caller in self._waiting}
        share = budget // len(self._waiting)
        for allowance in (share, budget):
            for caller in self._waiting:
                if budget <= 0 or caller.taken == len(caller.tokens):
                    continue
                stop = caller.fits(min(allowance, budget))
                budget -= caller.cost(caller.taken, stop)
                caller.taken = stop
        served = [caller for caller in self._waiting if caller.taken > start[caller]]
        self._waiting = deque(caller for caller in self._waiting if caller.taken < len(caller.tokens))
        rows = [np.arange(start[caller], caller.taken) for caller in served]
        return _Window(
            callers=served,
            tokens=concatenate([_cells(caller.tokens, start[caller], caller.taken) for caller in served]),
            owner=np.repeat(np.arange(len(served)), [len(part) for part in rows]),
            row=np.concatenate(rows),
        )

    async def _run_window(self, window: _Window) -> None:
        started = time.perf_counter()
        for batch in self.embedder.plan(window.tokens):
            await self._run_batch(window, batch)
        if window.tokens_run:
            speed = window.tokens_run / max(time.perf_counter() - started, 1e-9)
            self._tokens_per_second = (self._tokens_per_second + speed) / 2 if self._tokens_per_second else speed

    async def _run_batch(self, window: _Window, batch: NDArray[np.intp]) -> None:
        """Run one batch and answer its callers.

        A batch of several callers that fails is run again caller by caller: the one whose cells the model cannot
        take (say, an overflow in half precision) fails alone, and its batch-mates do not notice.
        """
        gone = np.array([caller.done.done() for caller in window.callers])
        batch = batch[~gone[window.owner[batch]]]
        if not len(batch):
            return
        owners = window.owner[batch]
        served = [caller for caller in (window.callers[owner] for owner in np.unique(owners)) if not caller.served]
        now = time.perf_counter()
        waited = [now - caller.started for caller in served]
        for caller in served:
            caller.served = True
        loop = asyncio.get_running_loop()
        try:
            values, seconds = await loop.run_in_executor(self._worker, self._infer, window.tokens, batch)
        except PerturbScopeError as error:
            self.last_batch_failed = True
            self._observer.failed(error)
            several = np.unique(owners)
            if len(several) == 1:
                _fail(window.callers[several[0]], error)
                return
            for owner in several:
                await self._run_batch(window, batch[owners == owner])
            return
        self.last_batch_failed = False
        lengths = window.tokens.lengths[batch]
        window.tokens_run += int(lengths.sum())
        self._observer.batch(
            n_cells=len(batch),
            n_tokens=int(lengths.sum()),
            n_padded=len(batch) * int(lengths.max()),
            seconds=seconds,
            waited=waited,
            tags=[tag for owner in np.unique(owners) if (tag := window.callers[owner].tag) is not None],
        )
        for owner in np.unique(owners):
            caller, mine = window.callers[owner], owners == owner
            caller.values[window.row[batch[mine]]] = values[mine]
            caller.answered += int(mine.sum())
            caller.inference += seconds
            if caller.answered == len(caller.tokens) and not caller.done.done():
                caller.done.set_result(None)

    def _infer(self, tokens: TokenizedCells, batch: NDArray[np.intp]) -> tuple[NDArray[np.float32], float]:
        """The forward pass, and its seconds; in the worker thread."""
        started = time.perf_counter()
        try:
            values = self.embedder.run(tokens, batch)
        except PerturbScopeError:
            raise
        except Exception as error:
            raise InferenceError(
                f"The forward pass of {len(batch)} cells failed: {type(error).__name__}: {error}"
            ) from error
        return values, time.perf_counter() - started


def _cells(tokens: TokenizedCells, start: int, stop: int) -> TokenizedCells:
    """A run of cells, without copying their tokens."""
    first, last = int(tokens.offsets[start]), int(tokens.offsets[stop])
    return TokenizedCells(
        arrays={name: array[first:last] for name, array in tokens.arrays.items()},
        offsets=tokens.offsets[start : stop + 1] - first,
        known_share=tokens.known_share[start:stop],
        n_detected=tokens.n_detected[start:stop],
        coverage=tokens.coverage,
    )


def _fail(caller: _Caller, error: PerturbScopeError) -> None:
    if not caller.done.done():
        caller.done.set_exception(error)
