"""Limits: the memory and number of requests in progress, and the size of one request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from perturbscope.errors import LimitExceededError, OverloadedError
from perturbscope.protocol import ARROW, JSON
from perturbscope.protocol.arrow_ipc import claims
from perturbscope.scoring.cost import Cost, duration
from perturbscope.scoring.results import ScoreOptions
from serving.call import GROWTH
from serving.queue.fairness import Room
from serving.settings import PREFIX, Settings

FEWER = "Send the cells in several requests, or as Arrow in place of JSON, which grows tenfold."
"""Remedy for a request that needs more memory than there is."""
LAST_WORDS = 5.0
"""Seconds at shutdown within which callers are told that their request was ended."""


class Held:
    """The memory that one request holds; called with the number of bytes of its body as they arrive.

    Calling it raises :class:`OverloadedError` if all requests together hold too much, and :class:`LimitExceededError`
    if this one alone does.
    """

    def __init__(self, admission: Admission, flow: str) -> None:
        self._admission = admission
        self._flow = flow
        self.n_bytes = 0
        """Bytes of the body that are held now."""
        self.n_reserved = 0
        """Bytes that are held now for its decoded form, tokens, vectors and answer."""
        self.n_received = 0
        """Bytes of the body that have arrived."""

    @property
    def limit(self) -> int:
        """Bytes that all requests together may hold, and so the most that this one can."""
        return self._admission.settings.max_held_bytes

    def __call__(self, n_bytes: int) -> None:
        """Hold `n_bytes` more of the body."""
        limit = self._admission.settings.max_body_bytes
        if self.n_bytes + n_bytes > limit:
            raise too_many_bytes(limit)
        self._admission.hold(n_bytes, self._flow, mine=self.n_bytes + self.n_reserved)
        self.n_bytes += n_bytes
        self.n_received += n_bytes

    def release(self, n_bytes: int | None = None) -> None:
        """Give back `n_bytes` of the body (default: all); a stream does so message by message."""
        n_bytes = self.n_bytes if n_bytes is None else min(n_bytes, self.n_bytes)
        self._admission.release(n_bytes, self._flow)
        self.n_bytes -= n_bytes

    def reserve(self, n_bytes: int, remedy: str | None = None) -> None:
        """Hold memory that the request will need, before it is used: for a decoded body, or an answer.

        Parameters
        ----------
        n_bytes
            Bytes to hold.
        remedy
            Advice for a caller whose request needs more than there is; default: :data:`FEWER`.

        Raises
        ------
        OverloadedError
            Too little memory is left now.
        LimitExceededError
            The request needs more than the server ever gives.
        """
        limit = self.limit
        if self.n_bytes + self.n_reserved + n_bytes > limit:
            raise LimitExceededError(
                f"The request would need about {self.n_bytes + self.n_reserved + n_bytes:,} bytes of memory; this "
                f"server gives {limit:,} to all ({PREFIX}MAX_HELD_BYTES). {remedy or FEWER}",
                field="body",
            )
        self._admission.hold(n_bytes, self._flow, mine=self.n_bytes + self.n_reserved)
        self.n_reserved += n_bytes

    def release_reserved(self, n_bytes: int | None = None) -> None:
        """Give back `n_bytes` of the reserved memory (default: all)."""
        n_bytes = self.n_reserved if n_bytes is None else min(n_bytes, self.n_reserved)
        self._admission.release(n_bytes, self._flow)
        self.n_reserved -= n_bytes


class Admission:
    """Counts the requests in progress, and the bytes that they hold.

    If callers have keys, the requests of one key leave room to others; see :class:`serving.queue.fairness.Room`.

    Parameters
    ----------
    settings
        Limits on requests and bytes.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.closed = False
        """Whether the server stops: nothing more is admitted."""
        self.leaving = False
        """Whether it will stop soon: it is not ready, and still admits."""
        self._requests = Room(settings.max_requests, by_size=False)
        self._bytes = Room(settings.max_held_bytes)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_progress(self) -> int:
        """Number of requests that were let in and are not answered yet."""
        return self._requests.used

    @property
    def held_bytes(self) -> int:
        """Bytes that they hold."""
        return self._bytes.used

    @contextlib.contextmanager
    def admit(self, flow: str = "") -> Iterator[Held]:
        """Count one request; entered before its body is read.

        Parameters
        ----------
        flow
            Name of the caller's key.

        Yields
        ------
        Held
            The memory of the request; to be called with the bytes of the body as they arrive.

        Raises
        ------
        OverloadedError
            Too many requests are in progress, of all or of this key, or the server is stopping.
        """
        if self.closed:
            raise OverloadedError("The server is shutting down. Try again, or use another server.", retry_after=5.0)
        if self._requests.missing(1, flow):
            raise OverloadedError(
                f"{self.in_progress} requests are in progress, which is the limit"
                f"{'' if self.in_progress >= self.settings.max_requests else ' for one API key'}. "
                "Try again after the stated time."
            )
        held = Held(self, flow)
        self._requests.take(1, flow)
        self._idle.clear()
        try:
            yield held
        finally:
            held.release()
            held.release_reserved()
            self._requests.give(1, flow)
            if not self.in_progress:
                self._idle.set()

    async def drained(self, seconds: float) -> bool:
        """Wait until no request is in progress, for `seconds` at most; return whether that is so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._idle.wait()
        return self._idle.is_set()

    def hold(self, n_bytes: int, flow: str, *, mine: int) -> None:
        """Count `n_bytes` for a request that holds `mine` already. Raises as :class:`Held`."""
        if self._bytes.missing(n_bytes, flow, mine=mine):
            raise OverloadedError(
                f"Requests of {self.held_bytes:,} bytes are in progress, and this one needs {n_bytes:,} more; the "
                f"limit is {self.settings.max_held_bytes:,}, of which a request leaves room to others. Try again after "
                "the stated time.",
            )
        self._bytes.take(n_bytes, flow)

    def release(self, n_bytes: int, flow: str) -> None:
        """Give back bytes of a flow."""
        self._bytes.give(n_bytes, flow)


_ROW = 2 * 72
"""Bytes of a row's labels as strings of Python, perturbation and batch, beside their own."""


def decoded_bytes(media_type: str, body: bytes, most_json: int = 2**63) -> int:
    """Estimate an upper bound of the bytes that decoding a body takes, beside the body itself.

    Arrow and protobuf hold their numbers as memory does: measured, decoding takes 1.7 and 2.6 times the body at its
    peak. JSON becomes one object a value, of a size that its punctuation tells: a number and its place in a list take
    up to 48 bytes, a short string 70, a list 67, an object with one name 205. The metadata of Arrow is JSON, and a
    label of a row becomes a string.

    Raises
    ------
    LimitExceededError
        The metadata of Arrow is larger than `most_json`.
    """
    if media_type == ARROW:
        head, n_rows = claims(body)
        if len(head) > most_json:
            raise LimitExceededError(
                f"The metadata of the Arrow stream has {len(head):,} bytes; this server takes {most_json:,} "
                f"({PREFIX}MAX_JSON_BYTES). Put into it what has no column, and no more genes than a transcriptome.",
                field="metadata",
            )
        return GROWTH * len(body) + _ROW * min(n_rows, len(body)) + _as_json(head)
    if media_type != JSON:
        return GROWTH * len(body)
    return _as_json(body)


def _as_json(body: bytes) -> int:
    # The text, and the strings that it holds; one wide character makes all of a string four bytes wide, and an escape
    # has it put together from parts.
    widths = 2 if body.isascii() and b"\\" not in body else 12
    return widths * len(body) + sum(
        body.count(mark) * cost for mark, cost in ((b",", 48), (b"[", 72), (b"{", 104), (b":", 132), (b'"', 16))
    )


def check_shape(settings: Settings, n_cells: int, n_genes: int, n_values: int) -> None:
    """Refuse a matrix that is too large; it may be called before the matrix is read.

    Raises
    ------
    LimitExceededError
        The message names what is too large, the limit and the remedy.
    """
    for field, found, limit, remedy in (
        ("cells", n_cells, settings.max_cells, "Send the cells in several requests; the client and CLI do so."),
        ("gene_ids", n_genes, settings.max_genes, "Send the genes of the transcriptome only."),
        ("data", n_values, settings.max_values, "Send the cells in several requests."),
    ):
        if found > limit:
            what = {"cells": "cells", "gene_ids": "genes", "data": "stored counts"}[field]
            raise LimitExceededError(
                f"The request has {found:,} {what}; this server takes {limit:,}. {remedy}", field=field
            )


def check_vectors(settings: Settings, n_vectors: int) -> None:
    """Refuse too many embeddings. Raises :class:`LimitExceededError`."""
    if n_vectors > settings.max_vectors:
        raise LimitExceededError(
            f"The request has {n_vectors:,} vectors; this server takes {settings.max_vectors:,}. "
            "Score a sample of the cells, or score with the library.",
            field="embeddings",
        )


def check_options(settings: Settings, options: ScoreOptions) -> None:
    """Refuse a score that would cost too much. Raises :class:`LimitExceededError`."""
    for name, limit in (
        ("permutations", settings.max_permutations),
        ("wasserstein_permutations", settings.max_permutations),
        ("null_draws", settings.max_permutations),
        ("max_cells", settings.max_group_cells),
    ):
        # Without a number the library chooses one, whose cost is estimated.
        if (getattr(options, name) or 0) > limit:
            raise LimitExceededError(
                f"{name} is {getattr(options, name):,}; this server takes {limit:,}. "
                "Ask for less, or score with the library or a server of your own "
                f"({PREFIX}MAX_PERMUTATIONS, {PREFIX}MAX_GROUP_CELLS).",
                field=name,
            )


def check_pairs(settings: Settings, n_pairs: int) -> None:
    """Refuse a comparison of too many pairs, before any of them is made. Raises :class:`LimitExceededError`."""
    if n_pairs > settings.max_pairs:
        raise LimitExceededError(
            f"The request compares {n_pairs:,} pairs of perturbations; this server takes {settings.max_pairs:,} "
            f"({PREFIX}MAX_PAIRS). Name the pairs that matter (pairs), or compare with the library.",
            field="pairs",
        )


def check_cost(settings: Settings, cost: Cost) -> None:
    """Refuse a score that would compute for too long. Raises :class:`LimitExceededError`."""
    if cost.seconds > settings.max_score_seconds:
        raise LimitExceededError(
            f"The score would take about {duration(cost.seconds)} of a processor core; this server takes "
            f"{duration(settings.max_score_seconds)} ({PREFIX}MAX_SCORE_SECONDS). Most of it stands for "
            f"{cost.options()}: ask for less of that, send fewer perturbations at a time, or score with the library.",
            field="options",
        )


def too_many_bytes(limit: int, media_type: str = "") -> LimitExceededError:
    """Return the error of a body over the limit."""
    remedy = "or as Arrow, which may have more" if media_type == JSON else "the client and CLI do so"
    return LimitExceededError(
        f"The request is larger than the {limit:,} bytes that this server takes. Send the cells in several requests; "
        f"{remedy}.",
        field="body",
    )
