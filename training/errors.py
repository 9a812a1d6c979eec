"""Errors of training alone, in the tree of :mod:`perturbscope.errors`, which has all others."""

from __future__ import annotations

from typing import ClassVar

from perturbscope.errors import PerturbScopeError


class NonFiniteLossError(PerturbScopeError):
    """The loss became NaN or infinite; the run stopped before the weights were lost."""

    code: ClassVar[str] = "non_finite_loss"


class DownloadError(PerturbScopeError):
    """A file could not be fetched, or is not the one that was asked for."""

    code = "download_failed"
