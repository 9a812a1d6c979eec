"""The cells of a configuration's sources, chunk by chunk: which are kept, their labels, their counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import CellSource, open_cells
from perturbscope.errors import EmptyCellError, UnreadableFileError
from perturbscope.inference.bundle import sha256
from training.config.stages import CorpusConfig, SourceConfig
from training.data.soma import SomaSource, soma_identity

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[str, int, int], None]
"""Called with the name of what is read, how much of it is done, and all of it (in cells, unless a function says)."""
_FALSE = ("false", "0")


def name_of(source: SourceConfig) -> str:
    """Name of a data set."""
    return source.name or Path(source.path).stem


def open_source(source: SourceConfig, *, chunk_cells: int = 4096) -> CellSource:
    """The cells of one source. Raises as :func:`perturbscope.open_cells` and :class:`SomaSource`."""
    if source.soma is not None:
        return SomaSource(source, chunk_cells=chunk_cells)
    return open_cells(
        source.path,
        layer=source.layer,
        gene_key=source.gene_key,
        total_counts_key=source.total_counts_key,
        chunk_cells=chunk_cells,
    )


def identity(source: SourceConfig) -> str:
    """A digest of a source: SHA-256 of the file; what a SOMA store says of itself.

    Raises
    ------
    UnreadableFileError
        The source cannot be read.
    """
    if source.soma is not None:
        return soma_identity(source)
    try:
        return sha256(Path(source.path))
    except OSError as error:
        raise UnreadableFileError(f"{source.path} cannot be read: {error}.", field="sources") from error


def chunks(cells: CellSource, keep: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], CountMatrix]]:
    """The cells to keep, chunk by chunk: their rows and their counts. Cells without any count are left out.

    Chunks without a cell to keep are not read.
    """
    for start in range(0, cells.n_cells, cells.chunk_cells):
        stop = min(start + cells.chunk_cells, cells.n_cells)
        if not keep[start:stop].any():
            continue
        if isinstance(cells, SomaSource):
            yield from cells.usable(start + np.flatnonzero(keep[start:stop]))
            continue
        for rows, counts in _rows(cells, start, stop):
            chosen = np.flatnonzero(keep[rows])
            if len(chosen):
                yield rows[chosen], counts[chosen]


def _rows(cells: CellSource, start: int, stop: int) -> Iterator[tuple[NDArray[np.int64], CountMatrix]]:
    """Rows `start` to `stop`; where a row has no counts it is searched for by halving, and left out."""
    try:
        counts = cells.rows(start, stop)
    except EmptyCellError:
        if stop - start == 1:
            return
        middle = (start + stop) // 2
        yield from _rows(cells, start, middle)
        yield from _rows(cells, middle, stop)
    else:
        yield np.arange(start, stop), counts


def not_raw(cells: CellSource, start: int, stop: int) -> int:
    """Cells among rows `start` to `stop` that were read and left out because their counts are not raw.

    Only a SOMA store leaves any out; in a file they are an error.
    """
    return cells.n_not_raw(start, stop) if isinstance(cells, SomaSource) else 0


def keep_cells(
    cells: CellSource, config: CorpusConfig, number: int, dropped: Counter[str] | None = None
) -> NDArray[np.bool_]:
    """Which cells of source `number` pass the filters that need no counts; the others are counted in `dropped`."""
    source = config.sources[number]
    dropped = Counter() if dropped is None else dropped
    keep = np.ones(cells.n_cells, dtype=bool)

    def drop(bad: NDArray[np.bool_], reason: str) -> None:
        dropped[reason] += int((keep & bad).sum())
        keep[bad] = False

    for column, wanted in source.select.items():
        selected = _where(cells.column(column, field="select"), frozenset(wanted).__contains__)
        drop(~selected, f"{column}_not_selected")
    if config.primary_key in cells.columns:
        drop(_where(cells.column(config.primary_key), lambda label: label.casefold() in _FALSE), "not_primary")
    if config.exclude_cancer and config.disease_key in cells.columns:
        terms = [term.casefold() for term in config.cancer_terms]
        is_cancer = _where(
            cells.column(config.disease_key), lambda label: any(term in label.casefold() for term in terms)
        )
        drop(is_cancer, "cancer")
    left = np.flatnonzero(keep)
    if source.max_cells is not None and len(left) > source.max_cells:
        chosen_cells = np.zeros(cells.n_cells, dtype=bool)
        rng = np.random.default_rng([config.seed, number])
        chosen_cells[rng.choice(left, source.max_cells, replace=False)] = True
        drop(~chosen_cells, "over_max_cells")
    return keep


def _where(column: pd.Series[Any], test: Callable[[str], bool]) -> NDArray[np.bool_]:
    """Which cells have a label that passes a test, [n_cells]; each distinct label is looked at once."""
    names, codes = coded(column)
    return np.array([*(test(name) for name in names), False], dtype=bool)[codes]


def coded(column: pd.Series[Any]) -> tuple[list[str], NDArray[np.int32]]:
    """Distinct labels of a column, and the number of each cell's label, -1 where it has none.

    A column of tens of millions of labels stays small: nothing of the size of the cells is made but the numbers.
    """
    import pandas as pd

    categories = column.astype("category") if not isinstance(column.dtype, pd.CategoricalDtype) else column
    names = [str(name) for name in categories.cat.categories]
    return names, categories.cat.codes.to_numpy().astype(np.int32)


def label_codes(cells: CellSource, known: Mapping[str, dict[str, int]]) -> dict[str, NDArray[np.int32]]:
    """Each label of each cell as a code, -1 where it has none; new names get the next code in `known`."""
    codes: dict[str, NDArray[np.int32]] = {}
    for column, names in known.items():
        if column not in cells.columns:
            codes[column] = np.full(cells.n_cells, -1, dtype=np.int32)
            continue
        found, numbers = coded(cells.column(column))
        present = np.unique(numbers[numbers >= 0]).tolist()
        for name in sorted(found[number] for number in present):
            names.setdefault(name, len(names))
        of_name = np.array([*(names.get(name, -1) for name in found), -1], dtype=np.int32)
        codes[column] = of_name[numbers]
    return codes
