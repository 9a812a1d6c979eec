"""What can go wrong in training alone; everything else is in :mod:`perturbscope.errors`."""

from __future__ import annotations

from typing import ClassVar

from perturbscope.errors import PerturbScopeError


class NonFiniteLossError(PerturbScopeError):
    """The loss became NaN or infinite; the run stops before the weights are lost."""

    code: ClassVar[str] = "non_finite_loss"


class DownloadError(PerturbScopeError):
    """A file could not be fetched, or is not the one that was asked for."""

    code = "download_failed"
