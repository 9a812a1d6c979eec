"""Who wants to know what a dispatcher does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from perturbscope.errors import PerturbScopeError

Reason = Literal["cancelled", "deadline", "overloaded"]


class DispatchObserver(Protocol):
    """Is told what a :class:`~serving.queue.Dispatcher` does, on its event loop; for metrics.

    Must be quick, and must not raise.
    """

    def accepted(self, *, n_cells: int, n_tokens: int) -> None:
        """A caller was taken into the queue."""
        ...

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
        """A forward pass succeeded.

        Parameters
        ----------
        n_cells, n_tokens
            Of the batch.
        n_padded
            Slots of the padded batch, cells x longest length: the padding share is ``1 - n_tokens / n_padded``.
        seconds
            That it took.
        waited
            For each caller that had its first cells in this batch, the seconds since it was accepted.
        tags
            Those of the callers that had cells in it; see :meth:`Dispatcher.submit`.
        """
        ...

    def failed(self, error: PerturbScopeError) -> None:
        """A forward pass failed, or has not come back in time."""
        ...

    def dropped(self, *, n_cells: int, reason: Reason) -> None:
        """Cells were refused (``overloaded``), or will not be run any more because nobody waits for them."""
        ...


class NoObserver:
    """Listens to nothing."""

    def accepted(self, *, n_cells: int, n_tokens: int) -> None:
        """Do nothing."""

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
        """Do nothing."""

    def failed(self, error: PerturbScopeError) -> None:
        """Do nothing."""

    def dropped(self, *, n_cells: int, reason: Reason) -> None:
        """Do nothing."""
