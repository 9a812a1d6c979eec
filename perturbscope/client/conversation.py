"""Conversations with a server, without any network: the part that all clients share.

A conversation is a generator. It yields a request, and is sent the answer, or a :class:`Failure` is thrown into it. It
may also yield a :class:`Pause`, or other conversations to hold :class:`Together`. Retries and chunks are thus written
once, and a client only has to perform the steps, with or without ``await``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

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
from perturbscope.inference.embeddings import Embeddings, Maker, join
from perturbscope.protocol.messages import Answer, EmbedRequest, Request

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

    conversations: Sequence[Conversation[Embeddings]]
    at_a_time: int
    each: Callable[[Embeddings], None]
    """Function that is called with each result as it comes, one at a time, in the caller's thread."""


Step = Request | Pause | Together
Reply = Answer | list[Embeddings] | None
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
    """

    attempts: int = 5
    """Number of tries, the first included; 1 means no retries."""
    first: float = 0.5
    """Seconds before the second try; doubled for each further one."""
    longest: float = 30.0
    """Longest wait between two tries, in seconds, unless the server asks for more."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidParameterError(f"attempts is {self.attempts}; it must be at least 1.", field="attempts")
        for name in ("first", "longest"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidParameterError(
                    f"{name} is {getattr(self, name)}; it must be 0 seconds or more.", field=name
                )

    def pause(self, attempt: int, error: PerturbScopeError, rng: np.random.Generator) -> Pause:
        """Return the wait after try number `attempt`, counted from 1.

        It is between half and all of the backed-off time, so that clients that failed together do not return together,
        and never shorter than the server asked for.
        """
        seconds = min(self.longest, self.first * 2.0 ** (attempt - 1)) * rng.uniform(0.5, 1.0)
        if isinstance(error, OverloadedError):
            seconds += min(error.retry_after, LONGEST_HINT)
        return Pause(float(seconds))


def ask(request: Request, policy: RetryPolicy, rng: np.random.Generator) -> Conversation[Answer]:
    """Ask one request, and again as `policy` allows. Raises the error of the last attempt."""
    attempt = 1
    while True:
        try:
            answer = yield request
        except Failure as failure:
            if not failure.retry or attempt >= policy.attempts:
                raise failure.error from failure.__cause__
            yield policy.pause(attempt, failure.error, rng)
            attempt += 1
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
class InChunks:
    """The chunks of one matrix on their way to a server; all of them learn from a limit that one of them meets."""

    cells: CountMatrix
    model: str | None
    policy: RetryPolicy
    rng: np.random.Generator
    most: int
    """Most cells of a request, as far as the server has not refused as many."""

    def chunk(self, start: int, stop: int) -> Conversation[Embeddings]:
        """Embed one chunk, in parts if the server refuses the whole."""
        parts: list[Embeddings] = []
        while start < stop:
            end = min(stop, start + self.most)
            request = EmbedRequest(cells=self.cells[start:end], model=self.model)
            try:
                answer = yield from ask(request, self.policy, self.rng)
            except LimitExceededError:
                if end - start == 1:
                    raise
                self.most = min(self.most, (end - start) // 2)
                continue
            part = expect(answer, Embeddings)
            if len(part) != end - start:
                raise ServerError(f"The server sent {len(part)} embeddings for {end - start} cells.")
            parts.append(part)
            start = end
        return _joined(parts)


def embed_in_chunks(
    cells: CountMatrix,
    *,
    model: str | None,
    limits: ChunkLimits,
    policy: RetryPolicy,
    rng: np.random.Generator,
    progress: Callable[[int], None] | None,
) -> Conversation[Embeddings]:
    """Embed cells, several chunks at a time; `progress` is called with the number of cells of each."""
    embedding = InChunks(cells, model, policy, rng, limits.cells)
    parts = yield Together(
        [embedding.chunk(start, stop) for start, stop in limits.split(cells)],
        limits.at_a_time,
        (lambda part: progress(len(part))) if progress else lambda _: None,
    )
    return _joined(cast("list[Embeddings]", parts))


def _joined(parts: list[Embeddings]) -> Embeddings:
    """Join the parts, which one model must have made."""
    for part in parts:
        check_maker(parts[0].maker, part.maker)
    return join(parts)


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
