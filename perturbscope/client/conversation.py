"""Conversations with a server, without any network: the part that all clients share.

A conversation is a generator. It yields a request, and is sent the answer, or a :class:`Failure` is thrown into it. It
may also yield a :class:`Pause`, or other conversations to hold :class:`Together`. Retries and chunks are thus written
once, and a client only has to perform the steps, with or without ``await``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar, cast

import numpy as np

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import (
    InvalidParameterError,
    LimitExceededError,
    OverloadedError,
    PerturbScopeError,
    ServerError,
    ServerUnreachableError,
    from_code,
)
from perturbscope.inference.embeddings import Embeddings, Maker
from perturbscope.protocol.fields import Meta
from perturbscope.protocol.messages import Answer, Request
from perturbscope.protocol.operations import Operation

T = TypeVar("T")
LONGEST_HINT = 60.0
"""Longest wait, in seconds, that a server's ``retry-after`` can ask for."""


@dataclass(frozen=True)
class Pause:
    """Wait before the next step."""

    seconds: float


@dataclass(frozen=True)
class Together:
    """Hold several conversations, some at a time; the list of their results is sent back, in their order."""

    conversations: Sequence[Conversation[Any]]
    at_a_time: int
    each: Callable[[Any], None]
    """Function that is called with each result as it comes, one at a time, in the caller's thread."""


Step: TypeAlias = Any
"""A request, a :class:`Pause` or a :class:`Together`."""
Reply: TypeAlias = Any
"""The answer to a request, None, or a list of results."""
Conversation = Generator[Step, Reply, T]


class Failure(Exception):  # noqa: N818  it carries an error, and never leaves a client
    """The failure of one attempt.

    Attributes
    ----------
    error
        Error that is raised if there is no further attempt.
    retry
        Whether another attempt makes sense.
    unheard
        Whether grpc lost the status with which the server may have said why.
    """

    def __init__(self, error: PerturbScopeError, *, retry: bool | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry = isinstance(error, (OverloadedError, ServerUnreachableError)) if retry is None else retry
        self.unheard = False


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When and how often to try again.

    Only overload and a server that cannot be reached are retried. A request changes nothing on the server, so that
    repeating it is safe; but bad input stays bad, and a server that is still computing must not get the work twice.
    By default the waits are 24 to 48 seconds in all, since a server takes about 18 to start again.
    """

    attempts: int = 10
    """Number of tries, the first included; 1 means no retries."""
    first: float = 0.5
    """Seconds before the second try; doubled for each further one."""
    longest: float = 8.0
    """Longest wait between two tries, in seconds, unless the server asks for more."""
    wait: float | None = None
    """Seconds to wait in all before giving up, in place of a number of tries; the time of the tries comes on top."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidParameterError(f"attempts is {self.attempts}; it must be at least 1.", field="attempts")
        for name in ("first", "longest", "wait"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise InvalidParameterError(
                    f"{name} is {getattr(self, name)}; it must be 0 seconds or more.", field=name
                )

    def pause(
        self, attempt: int, error: PerturbScopeError, rng: np.random.Generator, waited: float = 0.0
    ) -> Pause | None:
        """Return the wait after try number `attempt`, counted from 1, and `waited` seconds; None: give up.

        It is between half and all of the backed-off time, so that clients that failed together do not return together,
        and never shorter than the server asked for.
        """
        if attempt >= self.attempts if self.wait is None else waited >= self.wait:
            return None
        seconds = min(self.longest, self.first * 2.0 ** min(attempt - 1, 60)) * rng.uniform(0.5, 1.0)
        if isinstance(error, OverloadedError):
            seconds += min(error.retry_after, LONGEST_HINT)
        if self.wait is not None:  # the last try is at the very end
            seconds = min(seconds, self.wait - waited)
        return Pause(float(seconds))


def ask(request: Request, policy: RetryPolicy, rng: np.random.Generator) -> Conversation[Answer]:
    """Ask one request, and again as `policy` allows. Raises the error of the last attempt."""
    attempt, waited = 1, 0.0
    while True:
        try:
            answer = yield request
        except Failure as failure:
            pause = policy.pause(attempt, failure.error, rng, waited) if failure.retry else None
            if pause is None:
                raise failure.error from failure.__cause__
            yield pause
            attempt, waited = attempt + 1, waited + pause.seconds
        else:
            return cast("Answer", answer)


@dataclass(frozen=True, kw_only=True)
class ChunkLimits:
    """Size of one request. If the server allows less, requests are halved until they fit."""

    cells: int = 256
    """Most cells of a request; bounds its time, and is the step of progress."""
    values: int = 8_000_000
    """Most stored counts of a request, 8 bytes each; bounds its bytes."""
    at_a_time: int = 2
    """Most requests in flight: while one is computed, the next is sent and tokenized."""

    def __post_init__(self) -> None:
        for name in ("cells", "values", "at_a_time"):
            if getattr(self, name) < 1:
                raise InvalidParameterError(f"{name} is {getattr(self, name)}; it must be at least 1.", field=name)

    def split(self, cells: CountMatrix) -> list[tuple[int, int]]:
        """Return the first cell of each chunk and the one after its last; a chunk has at least one cell."""
        chunks = []
        start = 0
        while start < len(cells):
            stop = self.end(cells, start, self.cells)
            chunks.append((start, stop))
            start = stop
        return chunks

    def end(self, cells: CountMatrix, start: int, most: int) -> int:
        """Return the end of the chunk of at most `most` cells that begins with the cell `start`."""
        indptr = cells.counts.indptr
        fitting = int(np.searchsorted(indptr, int(indptr[start]) + self.values, side="right")) - 1
        return min(len(cells), start + most, max(start + 1, fitting))


@dataclass
class InChunks(Generic[T]):
    """The chunks of one request on their way to a server; all of them learn from a limit that one of them meets."""

    operation: Operation[Any, T]
    request: Any
    policy: RetryPolicy
    rng: np.random.Generator
    most: int
    """Most cells of a request, as far as the server has not refused as many."""

    def chunk(self, start: int, stop: int) -> Conversation[T]:
        """Ask for one chunk, in parts if the server refuses the whole."""
        parts: list[T] = []
        while start < stop:
            end = min(stop, start + self.most)
            try:
                answer = yield from ask(self.operation.part(self.request, start, end), self.policy, self.rng)
            except LimitExceededError:
                if end - start == 1:
                    raise
                self.most = min(self.most, (end - start) // 2)
                continue
            part = expect(answer, self.operation.answer)
            if (n := self.operation.rows(part)) != end - start:
                raise ServerError(f"The server sent {n} rows for {end - start} cells.")
            parts.append(part)
            start = end
        return joined(self.operation, parts)


def ask_in_chunks(
    operation: Operation[Any, T],
    request: Any,
    *,
    limits: ChunkLimits,
    policy: RetryPolicy,
    rng: np.random.Generator,
    progress: Callable[[int], None] | None = None,
) -> Conversation[T]:
    """Ask for the cells of a request, several chunks at a time; `progress` is called with the number of cells of each.

    A request without cells, and one whose answer does not follow cell by cell, is asked whole.
    """
    cells = [value for item in operation.takes.of("cells") if (value := getattr(request, item.name)) is not None]
    if not operation.per_cell or len(cells) != 1:
        answer = expect((yield from ask(request, policy, rng)), operation.answer)
        if progress:
            progress(operation.rows(request))
        return answer
    asking = InChunks(operation, request, policy, rng, limits.cells)
    parts = yield Together(
        [asking.chunk(start, stop) for start, stop in limits.split(cells[0])],
        limits.at_a_time,
        (lambda part: progress(operation.rows(part))) if progress else lambda _: None,
    )
    return joined(operation, cast("list[T]", parts))


def joined(operation: Operation[Any, T], parts: list[T]) -> T:
    """Join the parts, which one model must have made."""
    makers = [maker_of(part) for part in parts]
    for maker in makers:
        check_maker(makers[0], maker)
    return operation.joined(parts)


def maker_of(answer: Any) -> Maker:
    """Return the model and its variant that made an answer."""
    if isinstance(answer, Embeddings):
        return answer.maker
    meta = getattr(answer, "meta", None)
    return (meta.model_id or "", meta.variant) if isinstance(meta, Meta) else ("", None)


def check_maker(was: Maker, now: Maker) -> None:
    """Raise :class:`ServerError` unless the same model made both."""
    if was != now:
        before, after = (model_id + (f" ({variant})" if variant else "") for model_id, variant in (was, now))
        raise ServerError(
            f"The server went from the model {before} to {after} while the cells were embedded. Embed them again."
        )


def expect(answer: Answer, kind: type[T]) -> T:
    """Return the answer, whose kind the transport has decoded by the kind of request."""
    assert isinstance(answer, kind), f"{type(answer).__name__} is no {kind.__name__}"  # noqa: S101  our own bug
    return answer


def failure_of(code: str, message: str, field: str | None, hint: object) -> Failure:
    """Return the failure with the error that a server named by its code."""
    error = from_code(code, message, field=field)
    if isinstance(error, OverloadedError):
        error.retry_after = seconds_of(hint, error.retry_after)
    return Failure(error)


def seconds_of(hint: object, otherwise: float) -> float:
    """Return a retry hint in seconds; `otherwise` if it is not a number of seconds (but a date, for instance)."""
    try:
        seconds = float(str(hint))
    except ValueError:
        return otherwise
    return seconds if 0 <= seconds < math.inf else otherwise
