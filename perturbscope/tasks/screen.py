"""A screen: cells with perturbation labels, from their source to a table of scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import CellSource, open_cells
from perturbscope.cells.readers.memory import AnnDataSource
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embedder import Embeddings, gather
from perturbscope.tasks.backends import Backend, LocalBackend, Scorer, StageProgress, cells_of
from perturbscope.tasks.trained_on import KEY, seen_by

if TYPE_CHECKING:
    from perturbscope.scoring.calibration import Calibration
    from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

    Result = TypeVar("Result", ScoreResult, CompareResult)


@contextmanager
def opened(
    cells: Any, *, layer: str | None = None, gene_key: str | None = None, total_counts_key: str | None = None
) -> Iterator[CellSource]:
    """A source of cells: opened and closed here, or the caller's own."""
    if isinstance(cells, CellSource):
        if (layer, gene_key, total_counts_key) != (None, None, None):
            raise InvalidParameterError(
                "layer, gene_key and total_counts_key were chosen when the source was opened; leave them out.",
                field="layer",
            )
        yield cells
        return
    if isinstance(cells, CountMatrix):
        raise InvalidParameterError(
            "A CountMatrix carries no labels; give AnnData, a path or an open CellSource.", field="cells"
        )
    open_ = open_cells if isinstance(cells, str | Path) else AnnDataSource
    with open_(cells, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key) as source:
        yield source


def check_cells(source: CellSource, backend: Backend, *, progress: StageProgress | None = None) -> None:
    """Read all cells once, so that a bad one is found before an hour was spent on the good ones before it.

    Raises
    ------
    InvalidInputError
        As reading raises; and, where the model is in this process, as :meth:`Embedder.tokenize` raises.
    """
    advance = cells_of("check", source.n_cells, progress)
    for cells in source:
        if isinstance(backend, LocalBackend):
            backend.embedder.tokenize(cells)
        if advance:
            advance(len(cells))


def embed_source(source: CellSource, backend: Backend, *, progress: StageProgress | None = None) -> Embeddings:
    """Embed all cells of a source, chunk by chunk, after :func:`check_cells`.

    Of the counts a few chunks are in memory, of the vectors all, once.
    """
    check_cells(source, backend, progress=progress)
    advance = cells_of("embed", source.n_cells, progress)
    return gather(backend.embed_stream(source, progress=advance), source.n_cells)


@dataclass(frozen=True)
class Screen:
    """Vectors and labels of the cells that carry a label (and a batch, where batches are asked for).

    Attributes
    ----------
    values
        float32 [n, width].
    labels
        Perturbation of each cell.
    batches
        Batch of each cell, or None.
    options
        How to score.
    control
        The label of control cells, if there is one.
    provenance, warnings
        Where cells and vectors come from, and what to be careful about.
    """

    values: NDArray[np.float32]
    labels: list[str]
    batches: list[str] | None
    options: ScoreOptions
    control: str | None
    provenance: dict[str, Any]
    warnings: list[str]

    @classmethod
    def of(
        cls,
        source: CellSource,
        backend: Backend | None,
        *,
        perturbation_key: str,
        options: ScoreOptions,
        control: str | None = None,
        use_rep: str | None = None,
        batch_key: str | None = None,
        progress: StageProgress | None = None,
    ) -> Screen:
        """Read labels, check them, and embed the cells; without a backend, `use_rep` is needed.

        Raises
        ------
        InvalidInputError
            Labels that do not allow a score are found before any cell is embedded.
        """
        labels = source.labels(perturbation_key, field="perturbation_key")
        batches = None if batch_key is None else source.labels(batch_key, field="batch_key")
        rows = np.flatnonzero(_given(labels) if batches is None else _given(labels) & _given(batches))
        keys = " and ".join(f"obs[{key!r}]" for key in (perturbation_key, batch_key) if key)
        if not len(rows):
            raise InvalidParameterError(f"No cell has a value in {keys}.", field="perturbation_key")
        there = labels[rows].tolist()
        there_batches = None if batches is None else batches[rows].tolist()
        _check_labels(there, there_batches, options, control)
        values, provenance, warnings = _vectors(source, backend, use_rep, progress)
        _check_vectors(values[rows], rows, options)
        n_left_out = len(labels) - len(rows)
        if n_left_out:
            warnings.append(f"{n_left_out} of {len(labels)} cells have no value in {keys} and were left out.")
        provenance |= {
            "perturbation_key": perturbation_key,
            "batch_key": batch_key,
            "n_cells_read": len(labels),
            "n_cells_left_out": n_left_out,
        }
        return cls(values[rows], there, there_batches, options, control, provenance, warnings)

    def score(self, scorer: Scorer) -> ScoreResult:
        """Scores against the control, which must have been named."""
        if self.control is None:
            raise InvalidParameterError("Scores need the label of control cells.", field="control")
        return self._complete(
            scorer.score(self.values, self.labels, control=self.control, batches=self.batches, options=self.options)
        )

    def compare(self, scorer: Scorer, pairs: Sequence[tuple[str, str]] | None = None) -> CompareResult:
        """Distances between perturbations: all pairs, or `pairs`."""
        return self._complete(
            scorer.compare(
                self.values,
                self.labels,
                pairs=pairs,
                control=self.control,
                batches=self.batches,
                options=self.options,
            )
        )

    def calibrate(self, progress: StageProgress | None = None) -> Calibration | None:
        """Controls against controls, in this process; None where only Wasserstein was asked for."""
        from perturbscope.scoring.calibration import calibrate

        if self.control is None or set(self.options.metrics) == {"wasserstein"}:
            return None
        return calibrate(
            self.values,
            self.labels,
            control=self.control,
            batches=self.batches,
            options=self.options,
            progress=progress,
        )

    def _complete(self, result: Result) -> Result:
        return replace(
            result,
            provenance={**result.provenance, **self.provenance},
            warnings=[*self.warnings, *result.warnings],
        )


def _vectors(
    source: CellSource, backend: Backend | None, use_rep: str | None, progress: StageProgress | None
) -> tuple[NDArray[np.float32], dict[str, Any], list[str]]:
    """Vectors of all cells, from obsm or from the model; where they come from; warnings."""
    if use_rep is not None:
        return source.representation(use_rep), {"use_rep": use_rep}, []
    if backend is None:
        raise InvalidParameterError(
            "There is no model to embed the cells with. Give one, or name a matrix of obsm (use_rep).", field="use_rep"
        )
    seen = seen_by(backend, source)
    found = embed_source(source, backend, progress=progress)
    origin: dict[str, Any] = {
        "model_id": found.model_id,
        "vocabulary_hash": found.vocabulary_hash,
        "coverage": found.coverage.to_dict(),
    }
    if seen is None:
        return found.values, origin, found.warnings()
    return found.values, {**origin, KEY: seen.to_dict()}, [seen.warning(), *found.warnings()]


def _check_labels(labels: list[str], batches: list[str] | None, options: ScoreOptions, control: str | None) -> None:
    """The checks of labels that scoring makes, on vectors of ones: before any cell is embedded."""
    from perturbscope.scoring.labels import Groups

    groups = Groups.of(np.ones((len(labels), 1)), labels, batches, options, control=control)
    groups.scorable([name for name in groups.sizes if name != control], options)


def _check_vectors(values: NDArray[np.float32], rows: NDArray[np.intp], options: ScoreOptions) -> None:
    """The checks of vectors that scoring makes, here with the rows' numbers in the file."""
    from perturbscope.scoring.distances import check_rows, unit_rows

    check_rows(values, numbers=rows)
    if options.normalize or "cosine_e_distance" in options.metrics:
        unit_rows(values, numbers=rows)


def _given(labels: NDArray[np.object_]) -> NDArray[np.bool_]:
    return np.array([label is not None and label.strip() != "" for label in labels], dtype=bool)
