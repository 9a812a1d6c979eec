"""Screens: cells with perturbation labels, from their source to a table of scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import CellSource, open_cells
from perturbscope.cells.readers.memory import AnnDataSource
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embeddings import Embeddings, gather
from perturbscope.tasks.backends import Backend, LocalBackend, Server, StageProgress, count_stage
from perturbscope.tasks.trained_on import KEY, seen_by

if TYPE_CHECKING:
    from perturbscope.scoring.calibration import Calibration
    from perturbscope.scoring.cleaning import Cleaned
    from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

    Result = TypeVar("Result", ScoreResult, CompareResult)


@contextmanager
def opened(
    cells: Any,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    total_counts_key: str | None = None,
    round_counts: bool = False,
) -> Iterator[CellSource]:
    """Open a source of cells and close it again; a source that the caller has opened stays open."""
    if isinstance(cells, CellSource):
        if (layer, gene_key, total_counts_key, round_counts) != (None, None, None, False):
            raise InvalidParameterError(
                "layer, gene_key, total_counts_key and round_counts were chosen when the source was opened; leave them "
                "out.",
                field="layer",
            )
        yield cells
        return
    if isinstance(cells, CountMatrix):
        raise InvalidParameterError(
            "A CountMatrix carries no labels; give AnnData, a path or an open CellSource.", field="cells"
        )
    open_ = open_cells if isinstance(cells, str | Path) else AnnDataSource
    options: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "total_counts_key": total_counts_key}
    with open_(cells, **options, round_counts=round_counts) as source:
        yield source


def embed_source(source: CellSource, backend: Backend, *, progress: StageProgress | None = None) -> Embeddings:
    """Embed all cells of a source as they are read: memory holds a few chunks of the counts, and each vector once.

    Raises
    ------
    InvalidInputError
        A cell cannot be read or embedded; the message names its row in the source.
    """
    advance = count_stage("embed", source.n_cells, progress)
    return gather(backend.embed_stream(source, progress=advance), source.n_cells).from_source(source)


@dataclass(frozen=True)
class Screen:
    """Vectors and labels of the cells that carry a label (and a batch, where batches are asked for).

    Attributes
    ----------
    values
        float32 [n, width].
    rows
        Rows of these cells in the source.
    cleaned
        Perturbation of each cell, and the label of control cells.
    batches
        Batch of each cell, or None.
    options
        Options of scoring.
    provenance, warnings
        Source of the cells and of their vectors, and what a reader of the scores should be careful about.
    units
        Unit of each cell, or None.
    server
        The server that scores; None: this process does.
    """

    values: NDArray[np.float32]
    rows: NDArray[np.intp]
    cleaned: Cleaned
    batches: list[str] | None
    options: ScoreOptions
    provenance: dict[str, Any]
    warnings: list[str]
    server: Server | None
    units: list[str] | None = None

    @classmethod
    def of(
        cls,
        source: CellSource,
        backend: Backend | None,
        *,
        perturbation_key: str,
        options: ScoreOptions,
        control: str | Sequence[str] | None = None,
        use_rep: str | None = None,
        batch_key: str | None = None,
        unit_key: str | None = None,
        progress: StageProgress | None = None,
    ) -> Screen:
        """Read labels, check them, and embed the cells; without a backend, `use_rep` is needed.

        Of several labels of control cells one is made.

        Raises
        ------
        InvalidInputError
            The labels do not allow a score, which is found before any cell is embedded; or a cell cannot be embedded.
        """
        from perturbscope.scoring.cleaning import cleaned_for

        labels = source.labels(perturbation_key, field="perturbation_key")
        batches = None if batch_key is None else source.labels(batch_key, field="batch_key")
        units = None if unit_key is None else source.labels(unit_key, field="unit_key")
        is_labelled = _is_labelled(labels)
        for column in (batches, units):
            is_labelled = is_labelled if column is None else is_labelled & _is_labelled(column)
        labelled = rows = np.flatnonzero(is_labelled)
        keys = " and ".join(f"obs[{key!r}]" for key in (perturbation_key, batch_key, unit_key) if key)
        if not len(rows):
            raise InvalidParameterError(f"No cell has a value in {keys}.", field="perturbation_key")
        row_batches = None if batches is None else batches[rows].tolist()
        cleaned = cleaned_for(options, labels[rows].tolist(), control, row_batches)
        rows, row_batches = cleaned.kept(rows), cleaned.kept(row_batches)
        row_units = None if units is None else units[rows].tolist()
        server = None if isinstance(backend, LocalBackend) else cast("Server | None", backend)
        if server and row_units is not None:
            raise InvalidParameterError(
                "A server does not exchange whole units; leave unit_key out, or score in this process.",
                field="unit_key",
            )
        _check_labels(cleaned, row_batches, options)
        vectors, provenance, warnings = _vectors(source, backend, use_rep, progress)
        values = vectors[rows]
        _check_vectors(values, rows, options)
        n_left_out = len(labels) - len(labelled)
        if n_left_out:
            warnings.append(f"{n_left_out} of {len(labels)} cells have no value in {keys} and were left out.")
        provenance |= {
            "perturbation_key": perturbation_key,
            "batch_key": batch_key,
            **({} if unit_key is None else {"unit_key": unit_key}),
            "n_cells_read": len(labels),
            "n_cells_left_out": n_left_out,
            **cleaned.facts,
        }
        if source.round_counts:
            provenance["round_counts"] = True
        return cls(values, rows, cleaned, row_batches, options, provenance, warnings, server, row_units)

    @property
    def labels(self) -> Sequence[str]:
        """Perturbation of each cell."""
        return self.cleaned.labels

    @property
    def control(self) -> str | None:
        """The one label of control cells, if there are any."""
        return self.cleaned.control

    def score(self, progress: StageProgress | None = None) -> ScoreResult:
        """Score each perturbation against the control, on the server that embedded or in this process.

        Raises
        ------
        InvalidParameterError
            The screen has no control.
        """
        from perturbscope.scoring.control import score_perturbations

        if self.control is None:
            raise InvalidParameterError("Scores need the label of control cells.", field="control")
        local = partial(score_perturbations, progress=progress, units=self.units)
        score = self.server.score if self.server else local
        return self._complete(
            score(self.values, self.labels, control=self.control, batches=self.batches, options=self.options)
        )

    def compare(
        self, pairs: Sequence[tuple[str, str]] | None = None, progress: StageProgress | None = None
    ) -> CompareResult:
        """Compare perturbations, all pairs or `pairs`, on the server that embedded or in this process."""
        from perturbscope.scoring.pairs import compare_perturbations

        compare = self.server.compare if self.server else partial(compare_perturbations, progress=progress)
        return self._complete(
            compare(
                self.values,
                self.labels,
                pairs=self.cleaned.pairs(pairs),
                control=self.control,
                batches=self.batches,
                options=self.options,
            )
        )

    def calibrate(self, progress: StageProgress | None = None) -> Calibration | None:
        """Score controls against controls, in this process; None if the only metric is Wasserstein."""
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
            warnings=list(dict.fromkeys([*self.warnings, *self.cleaned.warnings, *result.warnings])),
        )


def _vectors(
    source: CellSource, backend: Backend | None, use_rep: str | None, progress: StageProgress | None
) -> tuple[NDArray[np.float32], dict[str, Any], list[str]]:
    """Vectors of all cells from obsm or the model, with their provenance and warnings."""
    if use_rep is not None:
        return source.representation(use_rep), {"use_rep": use_rep}, []
    if backend is None:
        raise InvalidParameterError(
            "There is no model to embed the cells with. Give one, or name a matrix of obsm (use_rep).", field="use_rep"
        )
    seen = seen_by(backend, source)
    embeddings = embed_source(source, backend, progress=progress)
    origin: dict[str, Any] = {
        "model_id": embeddings.model_id,
        "vocabulary_hash": embeddings.vocabulary_hash,
        "coverage": embeddings.coverage.to_dict(),
    }
    if seen is None:
        return embeddings.values, origin, embeddings.warnings()
    return embeddings.values, {**origin, KEY: seen.to_dict()}, [seen.warning(), *embeddings.warnings()]


def _check_labels(cleaned: Cleaned, batches: list[str] | None, options: ScoreOptions) -> None:
    """Check labels as scoring does, on vectors of ones, so that no cell is embedded in vain."""
    from perturbscope.scoring.labels import Groups

    labels, control = cleaned.labels, cleaned.control
    groups = Groups.of(np.ones((len(labels), 1)), labels, batches, options, control=control)
    groups.scorable([name for name in groups.sizes if name != control], options)


def _check_vectors(values: NDArray[np.float32], rows: NDArray[np.intp], options: ScoreOptions) -> None:
    """Check vectors as scoring does; messages name the rows of the file."""
    from perturbscope.scoring.distances import check_rows, unit_rows

    check_rows(values, numbers=rows)
    if options.normalize or "cosine_e_distance" in options.metrics:
        unit_rows(values, numbers=rows)


def _is_labelled(labels: NDArray[np.object_]) -> NDArray[np.bool_]:
    return np.array([label is not None and label.strip() != "" for label in labels], dtype=bool)
