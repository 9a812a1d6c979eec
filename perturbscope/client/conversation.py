"""What the clients say and understand, without any network: the part that all of them share.

A conversation is a generator. It yields a request, and is sent the answer, or a :class:`Failure` is thrown into it. It
may also yield a :class:`Pause`, or other conversations to hold :class:`Together`. So retries and chunks are written
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
from perturbscope.inference.embedder import Embeddings, Maker, join
from perturbscope.protocol.messages import Answer, EmbedRequest, Request

T = TypeVar("T")
LONGEST_HINT = 60.0
"""Most seconds that a server's retry hint is followed."""


@dataclass(frozen=True)
class Pause:
    """Wait before the next step."""

    seconds: float


@dataclass(frozen=True)
class Together:
    """Hold several conversations, some at a time; what is sent back is the list of their results, in their order."""

    conversations: Sequence[Conversation[Embeddings]]
    at_a_time: int
    each: Callable[[Embeddings], None]
    """Called with each result as it comes, one at a time, where the client was called."""


Step = Request | Pause | Together
Reply = Answer | list[Embeddings] | None
Conversation = Generator[Step, Reply, T]


class Failure(Exception):  # noqa: N818  it carries an error, and never leaves a client
    """An attempt that failed.

    Attributes
    ----------
    error
        What the caller is told if there is no further attempt.
    retry
        Whether another attempt makes sense.
    unheard
        Whether the server may have said why, and grpc lost it.
    """

    def __init__(self, error: PerturbScopeError, *, retry: bool | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry = isinstance(error, (OverloadedError, ServerUnreachableError)) if retry is None else retry
        self.unheard = False


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When and how often to try again.

    Only overload and a server that cannot be reached are retried: a request changes nothing on the server, so to repeat
    it is safe, but bad input stays bad, and a server that is still computing must not be given the same work again.
    """

    attempts: int = 5
    """Tries in all; 1 means no retries."""
    first: float = 0.5
    """Seconds before the second try; doubled for each further one."""
    longest: float = 30.0
    """Most seconds between two tries, unless the server asks for more."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidParameterError(f"attempts is {self.attempts}; it must be at least 1.", field="attempts")
        for name in ("first", "longest"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidParameterError(f"{name} is {getattr(self, name)}; it must be from 0 on.", field=name)

    def pause(self, attempt: int, error: PerturbScopeError, rng: np.random.Generator) -> Pause:
        """How long to wait after try number `attempt`, from 1 on.

        Between half and all of the backed-off time, so that clients which failed together do not return together; not
        less than what the server asked for.
        """
        seconds = min(self.longest, self.first * 2.0 ** (attempt - 1)) * rng.uniform(0.5, 1.0)
        if isinstance(error, OverloadedError):
            seconds += min(error.retry_after, LONGEST_HINT)
        return Pause(float(seconds))


def ask(request: Request, policy: RetryPolicy, rng: np.random.Generator) -> Conversation[Answer]:
    """One request, repeated as `policy` says. Raises the error of the last attempt."""
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
    """How many cells one request carries. A server that allows less is met by halving."""

    cells: int = 256
    """Cells; bounds the time of one request, and is the step of progress."""
    values: int = 8_000_000
    """Stored counts, of 8 bytes each; bounds the bytes of one request."""
    at_a_time: int = 2
    """Requests in flight: while one is computed, the next is sent and tokenized."""

    def __post_init__(self) -> None:
        for name in ("cells", "values", "at_a_time"):
            if getattr(self, name) < 1:
                raise InvalidParameterError(f"{name} is {getattr(self, name)}; it must be at least 1.", field=name)

    def split(self, cells: CountMatrix) -> list[tuple[int, int]]:
        """First and last + 1 cell of each chunk; a chunk has at least one cell."""
        indptr = cells.counts.indptr
        chunks = []
        start = 0
        while start < len(cells):
            fitting = int(np.searchsorted(indptr, int(indptr[start]) + self.values, side="right")) - 1
            stop = min(len(cells), start + self.cells, max(start + 1, fitting))
            chunks.append((start, stop))
            start = stop
        return chunks


@dataclass
class InChunks:
    """Embedding cells in chunks; the chunks share what they learn of the server's limit."""

    cells: CountMatrix
    model: str | None
    policy: RetryPolicy
    rng: np.random.Generator
    most: int
    """Most cells of a request that the server has not refused yet."""

    def chunk(self, start: int, stop: int) -> Conversation[Embeddings]:
        """Embed one chunk, in parts if the server refuses it whole."""
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
    """Embed cells, several chunks at a time; `progress` is told the number of cells of each."""
    embedding = InChunks(cells, model, policy, rng, limits.cells)
    parts = yield Together(
        [embedding.chunk(start, stop) for start, stop in limits.split(cells)],
        limits.at_a_time,
        (lambda part: progress(len(part))) if progress else lambda _: None,
    )
    return _joined(cast("list[Embeddings]", parts))


def _joined(parts: list[Embeddings]) -> Embeddings:
    """The parts as one, if one model made them."""
    for part in parts:
        check_maker(parts[0].maker, part.maker)
    return join(parts)


def check_maker(was: Maker, now: Maker) -> None:
    """Raise :class:`ServerError` unless one model made both."""
    if was != now:
        before, after = (model_id + (f" ({variant})" if variant else "") for model_id, variant in (was, now))
        raise ServerError(
            f"The server went from the model {before} to {after} while the cells were embedded. Embed them again."
        )


def expect(answer: Answer, kind: type[T]) -> T:
    """The answer, which must be of a kind: transports decode by the kind of request."""
    assert isinstance(answer, kind), f"{type(answer).__name__} is no {kind.__name__}"  # noqa: S101  our own bug
    return answer


def failure_of(code: str, message: str, field: str | None, hint: object) -> Failure:
    """The error that a server named by its code."""
    error = from_code(code, message, field=field)
    if isinstance(error, OverloadedError):
        error.retry_after = seconds_of(hint, error.retry_after)
    return Failure(error)


def seconds_of(hint: object, otherwise: float) -> float:
    """A retry hint as seconds; `otherwise` for what is no positive number (a date, for instance)."""
    try:
        seconds = float(str(hint))
    except ValueError:
        return otherwise
    return seconds if 0 <= seconds < math.inf else otherwise
