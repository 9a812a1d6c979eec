"""What the clients say and understand, without any network: the part that all of them share.

A conversation is a generator. It yields a request, or a :class:`Pause`; it is sent the answer, or a :class:`Failure` is
thrown into it. So retries and chunks are written once, and a client only has to perform the steps, with or without
``await``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from perturbscope.counts import CountMatrix
from perturbscope.embedder import Embeddings, join
from perturbscope.errors import (
    InvalidParameterError,
    LimitExceededError,
    OverloadedError,
    PerturbScopeError,
    ServerError,
    ServerUnreachableError,
    from_code,
)
from perturbscope.wire.messages import Answer, EmbedRequest, Request

T = TypeVar("T")
LONGEST_HINT = 60.0
"""Most seconds that a server's retry hint is followed."""


@dataclass(frozen=True)
class Pause:
    """Wait before the next step."""

    seconds: float


Conversation = Generator[Request | Pause, Answer | None, T]


class Failure(Exception):  # noqa: N818  it carries an error, and never leaves a client
    """An attempt that failed.

    Attributes
    ----------
    error
        What the caller is told if there is no further attempt.
    retry
        Whether another attempt makes sense.
    """

    def __init__(self, error: PerturbScopeError, *, retry: bool | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry = isinstance(error, (OverloadedError, ServerUnreachableError)) if retry is None else retry


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
            assert answer is not None, "a request is always answered"  # noqa: S101  a client of ours
            return answer


@dataclass(frozen=True, kw_only=True)
class ChunkLimits:
    """How many cells one request carries. A server that allows less is met by halving."""

    cells: int = 256
    """Cells; bounds the time of one request, and is the step of progress."""
    values: int = 8_000_000
    """Stored counts, of 8 bytes each; bounds the bytes of one request."""

    def __post_init__(self) -> None:
        for name in ("cells", "values"):
            if getattr(self, name) < 1:
                raise InvalidParameterError(f"{name} is {getattr(self, name)}; it must be at least 1.", field=name)

    def stop(self, cells: CountMatrix, start: int, most: int) -> int:
        """End of the chunk that begins at `start` and has at most `most` cells, but at least one."""
        indptr = cells.counts.indptr
        fitting = int(np.searchsorted(indptr, indptr[start] + self.values, side="right")) - 1
        return min(len(cells), start + most, max(start + 1, fitting))


def embed_in_chunks(
    cells: CountMatrix,
    *,
    model: str | None,
    limits: ChunkLimits,
    policy: RetryPolicy,
    rng: np.random.Generator,
    progress: Callable[[int], None] | None,
) -> Conversation[Embeddings]:
    """Embed cells, chunk after chunk; `progress` is told the number of cells of each."""
    parts: list[Embeddings] = []
    start, most = 0, limits.cells
    while start < len(cells):
        stop = limits.stop(cells, start, most)
        try:
            answer = yield from ask(EmbedRequest(cells=cells[start:stop], model=model), policy, rng)
        except LimitExceededError:
            if stop - start == 1:
                raise
            most = (stop - start) // 2
            continue
        part = expect(answer, Embeddings)
        if len(part) != stop - start:
            raise ServerError(f"The server sent {len(part)} embeddings for {stop - start} cells.")
        if parts and part.model_id != parts[0].model_id:
            raise ServerError(
                f"The server went from the model {parts[0].model_id} to {part.model_id} between two chunks of the "
                "cells. Embed them again."
            )
        parts.append(part)
        if progress:
            progress(len(part))
        start = stop
    return join(parts)


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
