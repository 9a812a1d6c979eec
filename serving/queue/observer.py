"""The interface of whoever wants to know what a dispatcher does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from perturbscope.errors import PerturbScopeError

Reason = Literal["cancelled", "deadline", "overloaded"]
"""Reasons for which cells are not run."""


class DispatchObserver(Protocol):
    """Is told what a :class:`~serving.queue.Dispatcher` does, on its event loop; for metrics.

    Its methods must be quick, and must not raise.
    """

    def batch(
        self,
        *,
        n_cells: int,
        n_tokens: int,
        n_padded: int,
        seconds: float,
        waited: Sequence[float],
        tags: Sequence[object],
    ) -> None:
        """Hear of a forward pass that succeeded.

        Parameters
        ----------
        n_cells, n_tokens
            Cells and tokens of the batch.
        n_padded
            Slots of the padded batch, cells x longest length: the padding share is ``1 - n_tokens / n_padded``.
        seconds
            Seconds that it took.
        waited
            Seconds since it was accepted, for each caller that had its first cells in this batch.
        tags
            Tags of the callers that had cells in it; see :meth:`Dispatcher.submit`.
        """
        ...

    def failed(self, error: PerturbScopeError) -> None:
        """Hear of a forward pass that failed, or has not come back in time."""
        ...

    def dropped(self, *, n_cells: int, reason: Reason) -> None:
        """Hear of cells that were refused, or that will not be run because nobody waits for them any more."""
        ...
