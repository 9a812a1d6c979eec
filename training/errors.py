"""Errors of training alone, in the tree of :mod:`perturbscope.errors`, which has all others."""

from __future__ import annotations

import signal
from typing import ClassVar

from perturbscope.errors import PerturbScopeError


class NonFiniteLossError(PerturbScopeError):
    """The loss, the gradient or a weight became NaN or infinite; the run stopped before that was saved."""

    code: ClassVar[str] = "non_finite_loss"


class NotWrittenError(PerturbScopeError):
    """A result could not be written; what was there before is unchanged."""

    code: ClassVar[str] = "not_written"


class StoppedError(PerturbScopeError):
    """A signal ended the run after a step, whose state was saved.

    Parameters
    ----------
    message
        What was saved.
    field
        See :class:`PerturbScopeError`.
    number
        Number of the signal.
    """

    code: ClassVar[str] = "stopped"

    def __init__(self, message: str, *, field: str | None = None, number: int = signal.SIGTERM) -> None:
        super().__init__(message, field=field)
        self.number = number


class DownloadError(PerturbScopeError):
    """A file could not be fetched, or is not the one that was asked for."""

    code = "download_failed"
