"""Where the work is done: the one interface behind which this process and servers look alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.inference.embedder import Embedder, Embeddings

if TYPE_CHECKING:
    from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

CellProgress = Callable[[int], None]
"""Told how many cells were finished since the last call."""
StageProgress = Callable[[str, int, int], None]
"""Told a stage (``check``, ``embed``, or one of scoring), and how much of it is done of how much."""


def cells_of(stage: str, total: int, progress: StageProgress | None) -> CellProgress | None:
    """What counts the cells of one stage and reports them to `progress`."""
    if progress is None:
        return None
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        progress(stage, done, total)

    progress(stage, 0, total)
    return advance


class Scorer(Protocol):
    """What scores embeddings; needs no model."""

    def score(
        self,
        embeddings: NDArray[np.float32],
        perturbations: Sequence[str],
        *,
        control: str,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> ScoreResult:
        """Distance of each perturbation to control; see :func:`perturbscope.score_perturbations`."""
        ...

    def compare(
        self,
        embeddings: NDArray[np.float32],
        perturbations: Sequence[str],
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        control: str | None = None,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> CompareResult:
        """Distances between perturbations; see :func:`perturbscope.compare_perturbations`."""
        ...


class Backend(Scorer, Protocol):
    """Where the work is done: in this process, or on a server over HTTP or gRPC. All give the same answers."""

    @property
    def model_id(self) -> str:
        """Name, version and hash of the model's weights."""
        ...

    def embed_cells(self, cells: CountMatrix, *, progress: CellProgress | None = None) -> Embeddings:
        """Embed cells, in their order."""
        ...

    def embed_stream(
        self, chunks: Iterable[CountMatrix], *, progress: CellProgress | None = None
    ) -> Iterator[Embeddings]:
        """Embed chunks of cells that all have the same genes, one result a chunk; only a few chunks are held."""
        ...

    def close(self) -> None:
        """Release what the backend holds."""
        ...


class LocalScorer:
    """Scores in this process.

    Parameters
    ----------
    progress
        Told how far a long computation is.
    """

    def __init__(self, progress: StageProgress | None = None) -> None:
        self.progress = progress

    def score(
        self,
        embeddings: NDArray[np.float32],
        perturbations: Sequence[str],
        *,
        control: str,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> ScoreResult:
        """See :meth:`Scorer.score`."""
        from perturbscope.scoring.control import score_perturbations

        return score_perturbations(
            embeddings, perturbations, control=control, batches=batches, options=options, progress=self.progress
        )

    def compare(
        self,
        embeddings: NDArray[np.float32],
        perturbations: Sequence[str],
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        control: str | None = None,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> CompareResult:
        """See :meth:`Scorer.compare`."""
        from perturbscope.scoring.pairs import compare_perturbations

        return compare_perturbations(
            embeddings,
            perturbations,
            pairs=pairs,
            control=control,
            batches=batches,
            options=options,
            progress=self.progress,
        )


class LocalBackend(LocalScorer):
    """Embeds and scores in this process.

    Parameters
    ----------
    embedder
        Tokenizer and encoder.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    @property
    def model_id(self) -> str:
        """See :attr:`Backend.model_id`."""
        return self.embedder.model_id

    def embed_cells(self, cells: CountMatrix, *, progress: CellProgress | None = None) -> Embeddings:
        """See :meth:`Backend.embed_cells`; raises as :meth:`Embedder.embed`."""
        return self.embedder.embed(cells, progress=progress)

    def embed_stream(
        self, chunks: Iterable[CountMatrix], *, progress: CellProgress | None = None
    ) -> Iterator[Embeddings]:
        """See :meth:`Backend.embed_stream`; raises as :meth:`Embedder.embed`."""
        return self.embedder.embed_stream(chunks, progress=progress)

    def close(self) -> None:
        """Nothing is held but memory."""


def scorer_of(backend: Backend | None, progress: StageProgress | None) -> Scorer:
    """What scores for a backend: its server, or this process, which can say how far it is."""
    return LocalScorer(progress) if backend is None or isinstance(backend, LocalBackend) else backend
