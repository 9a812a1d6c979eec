"""A screen: cells with perturbation labels, from their source to a table of scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from perturbscope.backends import Backend, LocalBackend, LocalScorer, StageProgress, cells_of
from perturbscope.counts import CountMatrix
from perturbscope.embedder import Embeddings, join
from perturbscope.errors import InvalidParameterError
from perturbscope.readers import CellSource, open_cells
from perturbscope.readers.memory import AnnDataSource

if TYPE_CHECKING:
    from perturbscope.results import CompareResult, ScoreOptions, ScoreResult

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


def score_source(
    source: CellSource,
    backend: Backend | None,
    *,
    perturbation_key: str,
    control: str,
    options: ScoreOptions,
    use_rep: str | None = None,
    batch_key: str | None = None,
    progress: StageProgress | None = None,
) -> ScoreResult:
    """Score the perturbations of a source; see :meth:`perturbscope.model.Model.score`.

    Without a backend, `use_rep` is needed, and the scores are made in this process.
    """
    labelled = _Labelled.of(source, perturbation_key, batch_key)
    labelled.check(options, control)
    values, origin = embed_or_take(source, backend, use_rep, progress)
    result = (backend or LocalScorer(progress)).score(
        values[labelled.rows], labelled.labels, control=control, batches=labelled.batches, options=options
    )
    return labelled.complete(result, origin)


def compare_source(
    source: CellSource,
    backend: Backend | None,
    *,
    perturbation_key: str,
    options: ScoreOptions,
    control: str | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    use_rep: str | None = None,
    batch_key: str | None = None,
    progress: StageProgress | None = None,
) -> CompareResult:
    """Compare the perturbations of a source; see :meth:`perturbscope.model.Model.compare` and :func:`score_source`."""
    labelled = _Labelled.of(source, perturbation_key, batch_key)
    labelled.check(options, control)
    values, origin = embed_or_take(source, backend, use_rep, progress)
    result = (backend or LocalScorer(progress)).compare(
        values[labelled.rows],
        labelled.labels,
        pairs=pairs,
        control=control,
        batches=labelled.batches,
        options=options,
    )
    return labelled.complete(result, origin)


def embed_source(source: CellSource, backend: Backend, *, progress: StageProgress | None = None) -> Embeddings:
    """Embed all cells of a source, chunk by chunk, after :func:`check_cells`."""
    check_cells(source, backend, progress=progress)
    advance = cells_of("embed", source.n_cells, progress)
    return join([backend.embed_cells(cells, progress=advance) for cells in source])


def embed_or_take(
    source: CellSource, backend: Backend | None, use_rep: str | None, progress: StageProgress | None
) -> tuple[NDArray[np.float32], _Origin]:
    """Vectors of all cells, from obsm or from the model, and where they come from."""
    if use_rep is not None:
        return source.representation(use_rep), _Origin({"use_rep": use_rep}, [])
    if backend is None:
        raise InvalidParameterError(
            "There is no model to embed the cells with. Give one, or name a matrix of obsm (use_rep).", field="use_rep"
        )
    found = embed_source(source, backend, progress=progress)
    model = {
        "model_id": found.model_id,
        "vocabulary_hash": found.vocabulary_hash,
        "coverage": found.coverage.to_dict(),
    }
    return found.values, _Origin(model, found.warnings())


@dataclass(frozen=True)
class _Origin:
    """Where vectors come from: entries for the provenance, and warnings."""

    provenance: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True)
class _Labelled:
    """The cells that carry a label (and a batch, where batches are asked for)."""

    rows: NDArray[np.intp]
    labels: list[str]
    batches: list[str] | None
    keys: dict[str, str | None]
    n_cells: int

    @classmethod
    def of(cls, source: CellSource, perturbation_key: str, batch_key: str | None) -> _Labelled:
        labels = source.labels(perturbation_key, field="perturbation_key")
        batches = None if batch_key is None else source.labels(batch_key, field="batch_key")
        there = _given(labels) if batches is None else _given(labels) & _given(batches)
        rows = np.flatnonzero(there)
        if not len(rows):
            raise InvalidParameterError(
                f"No cell has a value in obs[{perturbation_key!r}]"
                f"{'' if batch_key is None else f' and obs[{batch_key!r}]'}.",
                field="perturbation_key",
            )
        return cls(
            rows,
            labels[rows].tolist(),
            None if batches is None else batches[rows].tolist(),
            {"perturbation_key": perturbation_key, "batch_key": batch_key},
            len(labels),
        )

    def check(self, options: ScoreOptions, control: str | None) -> None:
        """The checks of labels that scoring makes, before any cell is embedded: on vectors of ones."""
        from perturbscope.groups import Groups

        groups = Groups.of(np.ones((len(self.rows), 1)), self.labels, self.batches, options, control=control)
        groups.scorable([name for name in groups.sizes if name != control], options)

    def complete(self, result: Result, origin: _Origin) -> Result:
        """The result with what is known of its cells."""
        n_left_out = self.n_cells - len(self.rows)
        warnings = [*origin.warnings, *result.warnings]
        if n_left_out:
            keys = " or ".join(f"obs[{key!r}]" for key in self.keys.values() if key)
            warnings.append(f"{n_left_out} of {self.n_cells} cells have no value in {keys} and were left out.")
        provenance = {
            **result.provenance,
            **self.keys,
            **origin.provenance,
            "n_cells_read": self.n_cells,
            "n_cells_left_out": n_left_out,
        }
        return replace(result, provenance=provenance, warnings=warnings)


def _given(labels: NDArray[np.object_]) -> NDArray[np.bool_]:
    return np.array([label is not None and label.strip() != "" for label in labels], dtype=bool)
