"""Batches: which cells of which callers run together next, and the forward pass that runs them."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InferenceError, PerturbScopeError
from perturbscope.families.outputs import Outputs, OutputSpec, selected
from perturbscope.families.tokens import TokenizedCells, concatenate
from perturbscope.inference.batching import BatchLimits
from perturbscope.inference.embedder import Embedder
from serving.queue.fairness import FairShare
from serving.queue.observer import DispatchObserver

SIMILAR = 2
"""Cells of several callers share a batch if their lengths differ by less than this factor from the first one's."""
SHORT = 64
"""Tokens up to which all lengths count as similar: for cells this short, padding costs next to nothing."""
_Answer = tuple[Outputs, float]


class Submission:
    """The cells of one call of `Dispatcher.submit`, until it is answered.

    Parameters
    ----------
    tokens
        Cells of the caller.
    outputs
        Outputs that the caller wants.
    flow
        Flow that the caller belongs to: the name of an API key.
    limits
        Limits of a batch.
    tag
        Object that the observer is told with each batch that holds cells of this submission; None: nothing.
    """

    def __init__(
        self,
        tokens: TokenizedCells,
        outputs: Sequence[OutputSpec],
        flow: str,
        limits: BatchLimits,
        tag: object = None,
    ) -> None:
        self.tokens = tokens
        self.flow = flow
        self.tag = tag
        self.values = Outputs.empty(outputs, tokens.offsets)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = time.perf_counter()
        self.inference = 0.0
        """Seconds of the batches that held a cell of this submission."""
        self.answered = 0
        self.progress: Callable[[int], None] | None = None
        """Called with the number of cells that are answered."""
        """Cells whose outputs are in `values`."""
        self.unanswered_tokens = int(limits.costs_of(tokens.lengths).sum())
        """Tokens of the cells that are not answered, as the budget of a batch counts them."""
        self.served = False
        """Whether a batch with a cell of this submission was begun."""
        self._limits = limits
        lengths = tokens.lengths
        self._rows: NDArray[np.intp] = np.argsort(lengths, kind="stable")
        self._lengths = lengths[self._rows]

    def __len__(self) -> int:
        """Cells that no batch has taken yet."""
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Length of the longest cell that no batch has taken yet."""
        return int(self._lengths[-1])

    def turn(self) -> float:
        """Slots (padded tokens) of the batch that the cells would fill on their own."""
        return self._limits.cost_of(self.longest) * min(self._limits.capacity(self.longest), len(self))

    def up_to(self, length: int) -> int:
        """Number of remaining cells that have at most this length."""
        return int(np.searchsorted(self._lengths, length, side="right"))

    def take(self, start: int, stop: int) -> NDArray[np.intp]:
        """Take the cells from `start` to `stop`, counted from the shortest that remains."""
        rows = self._rows[start:stop]
        self._rows = np.concatenate([self._rows[:start], self._rows[stop:]])
        self._lengths = np.concatenate([self._lengths[:start], self._lengths[stop:]])
        return rows

    def fail(self, error: PerturbScopeError) -> None:
        """Raise an error in the caller, unless it has got an answer or an error already."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(frozen=True, eq=False)
class BatchPart:
    """The cells of one submission in a batch."""

    submission: Submission
    rows: NDArray[np.intp]


def next_batch(share: FairShare[Submission], limits: BatchLimits) -> list[BatchPart]:
    """Take the cells of the next batch, and charge their flows; submissions without cells left leave `share`.

    The submission whose turn it is comes first, with its longest cells. The others fill the room that is left, in the
    order of their turns, with cells of similar length: all that they have, or else those that are not longer than the
    batch is already.
    """
    parts: list[BatchPart] = []
    n_cells, length, first = 0, 0, 0
    for submission in share.order(Submission.turn):
        if not parts:
            length = first = submission.longest
            start, stop = max(0, len(submission) - limits.capacity(length)), len(submission)
        else:
            low, high = (first // SIMILAR, first * SIMILAR) if first > SHORT else (0, max(SHORT, first * SIMILAR))
            start, stop = submission.up_to(low), submission.up_to(high)
            longer = max(length, submission.longest)
            if stop - start == len(submission) and n_cells + len(submission) <= limits.capacity(longer):
                length = longer
            else:
                stop = submission.up_to(length)
                start = max(start, stop - (limits.capacity(length) - n_cells))
        if start < stop:
            parts.append(BatchPart(submission, submission.take(start, stop)))
            n_cells += stop - start
            share.charge(submission, (stop - start) * limits.cost_of(length))
        if n_cells >= limits.capacity(length):
            break
    for part in parts:
        if not len(part.submission):
            share.leave(part.submission)
    return parts


class BatchRunner:
    """Runs the batches of a dispatcher on a thread of its own, one after the other.

    Parameters
    ----------
    embedder
        Embedder whose model runs.
    max_seconds
        Seconds after which a forward pass counts as hung.
    observer
        Observer that is told of each success and failure; None: nobody is.
    on_stall
        Function that is called with the error when a forward pass hangs.
    """

    def __init__(
        self,
        embedder: Embedder,
        max_seconds: float,
        observer: DispatchObserver | None,
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
        self._thread = _Thread("perturbscope-inference")
        self._tokens_per_second = 0.0
        self._probe: TokenizedCells | None = None
        """A cell that the model has answered: if it fails on this one, it is not the cells' fault."""

    def seconds(self, n_tokens: float) -> float | None:
        """Seconds that so many tokens take at the present speed; None while it is not known.

        Batches that are less than a quarter full measure overhead only, and are not counted.
        """
        return n_tokens / self._tokens_per_second if self._tokens_per_second else None

    async def run(self, parts: list[BatchPart]) -> _Answer:
        """Return the outputs of a batch, in the order of its parts, and the seconds it took.

        Each output that a part wants is computed for all cells of the batch.

        Raises
        ------
        InferenceError
            The forward pass failed, or came back after it counted as hung.
        """
        now = time.perf_counter()
        waited = [now - part.submission.started for part in parts if not part.submission.served]
        for part in parts:
            part.submission.served = True
        values, seconds = await self._forward(parts)
        lengths = np.concatenate([part.submission.tokens.lengths[part.rows] for part in parts])
        limits = self._embedder.limits
        n_slots, longest = limits.shape(len(lengths), int(lengths.max()))
        n_tokens, n_padded = int(lengths.sum()), n_slots * longest
        if n_slots * limits.cost_of(longest) * 4 >= limits.max_tokens:
            speed = int(limits.costs_of(lengths).sum()) / max(seconds, 1e-9)
            self._tokens_per_second = (self._tokens_per_second + speed) / 2 if self._tokens_per_second else speed
        if self._probe is None:
            tokens, rows = _joined(parts)
            self._probe = tokens.take(rows[[np.argmin(lengths)]])
        if self._observer is not None:
            self._observer.batch(
                n_cells=len(lengths),
                n_tokens=n_tokens,
                n_padded=n_padded,
                seconds=seconds,
                waited=waited,
                tags=[part.submission.tag for part in parts if part.submission.tag is not None],
            )
        return values, seconds

    async def fails_on_known_cell(self) -> bool:
        """Run a cell that the model answered before; True if the model fails on it now."""
        if self._probe is None:
            return False
        submission = Submission(self._probe, selected(self._embedder.outputs, None), "", self._embedder.limits)
        try:
            await self._forward([BatchPart(submission, np.arange(1))])
        except PerturbScopeError:
            return True
        return False

    def stall_error(self) -> InferenceError:
        """The error that callers get while a forward pass hangs."""
        return InferenceError(
            f"The model has not come back from a forward pass for {self._max_seconds:g} s; it answers nobody until it "
            "does. Try another server."
        )

    def stop(self) -> None:
        """End the thread; one that hangs is left behind."""
        self._thread.stop(wait=not self.stalled.is_set())
        if not self.stalled.is_set():
            # Nobody is left to be told, and without this reference cycle the model is freed at once.
            self._on_stall = _ignore

    async def _forward(self, parts: list[BatchPart]) -> _Answer:
        """Run a batch on the thread. One that hangs is waited for after all callers were told: nothing else can run."""
        running = self._thread.submit(lambda: self._infer(parts))
        done, _ = await asyncio.wait([running], timeout=self._max_seconds)
        try:
            if not done:
                raise await self._hung(running)
            vectors = running.result()
        except PerturbScopeError as error:
            self.last_failed = True
            if self._observer is not None:
                self._observer.failed(error)
            raise
        self.last_failed = False
        return vectors

    async def _hung(self, running: asyncio.Future[_Answer]) -> InferenceError:
        """Wait for a forward pass that hangs; return the error that its callers were told."""
        error = self.stall_error()
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

    def _infer(self, parts: list[BatchPart]) -> _Answer:
        """Run a batch; called on the thread."""
        started = time.perf_counter()
        try:
            values = self._embedder.run(*_joined(parts), _wanted(parts, self._embedder.outputs))
        except PerturbScopeError:
            raise
        except BaseException as error:
            n_cells = sum(len(part.rows) for part in parts)
            raise InferenceError(
                f"The forward pass of {n_cells} cells failed: {type(error).__name__}: {error}"
            ) from error
        return values, time.perf_counter() - started


class _Thread:
    """Runs functions one after the other on a thread of its own.

    The thread is a daemon: a forward pass that never returns must not keep the process from ending, as the threads of
    an executor would.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[[], _Answer]) -> asyncio.Future[_Answer]:
        """Run `function`; the future is done when it has returned or raised, and must not be cancelled."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Answer] = loop.create_future()

        def job() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  whoever waits must hear of it
                tell(future.set_exception, error)
            else:
                tell(future.set_result, result)

        def tell(setter: Callable[..., None], value: object) -> None:
            # The loop may be closed when a forward pass returns that was given up.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(lambda: None if future.done() else setter(value))

        self._jobs.put(job)
        return future

    def stop(self, *, wait: bool) -> None:
        """End the thread after the functions that were submitted. May be called twice."""
        self._jobs.put(None)
        if wait and self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _joined(parts: list[BatchPart]) -> tuple[TokenizedCells, NDArray[np.intp]]:
    """Tokens that hold the cells of a batch, and the rows of the batch's cells in them."""
    if len(parts) == 1:
        return parts[0].submission.tokens, parts[0].rows
    tokens = concatenate([part.submission.tokens.take(part.rows) for part in parts])
    return tokens, np.arange(len(tokens))


def _wanted(parts: list[BatchPart], outputs: Sequence[OutputSpec]) -> tuple[OutputSpec, ...]:
    """Return the outputs of a model that at least one part wants."""
    wanted = {spec.name for part in parts for spec in part.submission.values.specs}
    return tuple(spec for spec in outputs if spec.name in wanted)


def _ignore(error: PerturbScopeError) -> None:
    """Do nothing with an error that nobody waits for."""
