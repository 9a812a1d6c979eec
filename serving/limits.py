"""What one request, and all of them together, may cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from perturbscope.errors import LimitExceededError, OverloadedError
from perturbscope.results import ScoreOptions
from serving.settings import PREFIX, Settings


class Held:
    """The bytes that one request holds of what all may; called with the bytes of its body as they arrive.

    Calling it raises :class:`OverloadedError` where all requests together hold too much, and
    :class:`LimitExceededError` where this one alone does.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.n_bytes = 0
        """What is held now."""
        self.n_received = 0
        """What was ever held."""

    def __call__(self, n_bytes: int) -> None:
        """Hold `n_bytes` more."""
        self._admission.hold(n_bytes, mine=self.n_bytes)
        self.n_bytes += n_bytes
        self.n_received += n_bytes

    def release(self, n_bytes: int | None = None) -> None:
        """Give back `n_bytes` (all: None) that are no longer in memory; a stream does so message by message."""
        n_bytes = self.n_bytes if n_bytes is None else min(n_bytes, self.n_bytes)
        self._admission.release(n_bytes)
        self.n_bytes -= n_bytes


class Admission:
    """Counts the requests in progress, and the bytes of their bodies.

    Parameters
    ----------
    settings
        The limits.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.closed = False
        """Set when the server stops: nothing more is admitted."""
        self._in_progress = 0
        self._held_bytes = 0

    @property
    def in_progress(self) -> int:
        """Requests that were let in and are not answered yet."""
        return self._in_progress

    @property
    def held_bytes(self) -> int:
        """Bytes of them."""
        return self._held_bytes

    @contextlib.contextmanager
    def admit(self) -> Iterator[Held]:
        """Count one request; entered before its body is read.

        Yields
        ------
        To be told of the bytes of the body as they arrive.

        Raises
        ------
        OverloadedError
            Too many requests are in progress, or the server is stopping.
        """
        if self.closed or self._in_progress >= self.settings.max_requests:
            raise OverloadedError(
                "The server is shutting down. Try again, or use another server."
                if self.closed
                else f"{self._in_progress} requests are in progress, which is the limit. "
                "Try again after the stated time."
            )
        held = Held(self)
        self._in_progress += 1
        try:
            yield held
        finally:
            self._in_progress -= 1
            held.release()

    def hold(self, n_bytes: int, *, mine: int) -> None:
        """Count `n_bytes` of a request that holds `mine` already. Raises as :class:`Held` says."""
        settings = self.settings
        if mine + n_bytes > settings.max_body_bytes:
            raise too_many_bytes(settings.max_body_bytes)
        if self._held_bytes + n_bytes > settings.max_held_bytes:
            raise OverloadedError(
                f"Requests of {self._held_bytes:,} bytes are in progress; the limit is "
                f"{settings.max_held_bytes:,}. Try again after the stated time.",
            )
        self._held_bytes += n_bytes

    def release(self, n_bytes: int) -> None:
        """Give back what was held."""
        self._held_bytes -= n_bytes


def check_shape(settings: Settings, n_cells: int, n_genes: int, n_values: int) -> None:
    """Refuse a matrix that is too large; callable before it is read.

    Raises
    ------
    LimitExceededError
        Names what is too large, the limit and the remedy.
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
        if getattr(options, name) > limit:
            raise LimitExceededError(
                f"{name} is {getattr(options, name):,}; this server takes {limit:,}. "
                "Ask for less, or score with the library or a server of your own "
                f"({PREFIX}MAX_PERMUTATIONS, {PREFIX}MAX_GROUP_CELLS).",
                field=name,
            )


def too_many_bytes(limit: int) -> LimitExceededError:
    """The error of a body over the limit."""
    return LimitExceededError(
        f"The request is larger than the {limit:,} bytes that this server takes. Send the cells in several requests; "
        "the client and CLI do so.",
        field="body",
    )
