"""Cells of a configuration's sources: which of them are kept, their labels, and their counts, chunk by chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.analysis.rank_test import log_normalized
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
    """Return the name of a data set: the configured one, or the file's name without its ending."""
    return source.name or Path(source.path).stem


def open_source(source: SourceConfig, *, chunk_cells: int = 4096) -> CellSource:
    """Open the cells of one source. Raises as :func:`perturbscope.open_cells` and :class:`SomaSource`."""
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
    """Return a digest of a source: SHA-256 of the file, or :func:`soma_identity` of a store.

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


def stamp(source: SourceConfig) -> dict[str, int] | None:
    """Return size and time of change of a file, in bytes and nanoseconds; None for a store, or if it is not there."""
    try:
        found = None if source.soma is not None else Path(source.path).stat()
    except OSError:
        return None
    return None if found is None else {"bytes": found.st_size, "changed": found.st_mtime_ns}


def source_digests(sources: Sequence[SourceConfig], known: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the digest of each source; of a file whose size and time of change are known, without reading it.

    Parameters
    ----------
    sources
        Files and stores.
    known
        Entries of a corpus' manifest. A file that is no longer there is taken to be the one that the corpus has read:
        a corpus is trained from without its sources.

    Raises
    ------
    UnreadableFileError
        A source cannot be read, and the corpus has not read it.
    """
    read = {entry["path"]: entry for entry in known}
    found = []
    for source in sources:
        entry = read.get(source.path)
        now = stamp(source)
        if source.soma is None and entry is not None and now in (None, entry.get("file", {})):
            found.append(str(entry["sha256"]))
        else:
            found.append(identity(source))
    return found


def chunks(cells: CellSource, keep: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], CountMatrix]]:
    """Yield rows and counts of the cells to keep, chunk by chunk, without the cells that have no counts.

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
            wanted = np.flatnonzero(keep[rows])
            if len(wanted):
                yield rows[wanted], counts[wanted]


def expression_of(cells: CellSource, rows: NDArray[np.int64]) -> sparse.csr_matrix:
    """Return the log-normalised expression of some rows, which all have counts, in their order, [n, n_genes]."""
    keep = np.zeros(cells.n_cells, dtype=bool)
    keep[rows] = True
    parts = [(found, log_normalized(counts)) for found, counts in chunks(cells, keep)]
    order = np.searchsorted(np.concatenate([found for found, _ in parts]), rows)
    values = sparse.csr_matrix(sparse.vstack([part for _, part in parts], format="csr"))
    return values if np.array_equal(order, np.arange(values.shape[0])) else values[order]


def _rows(cells: CellSource, start: int, stop: int) -> Iterator[tuple[NDArray[np.int64], CountMatrix]]:
    """Yield rows `start` to `stop` with their counts; a row without counts is found by halving, and left out."""
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
    """Return how many of rows `start` to `stop` were read and left out because their counts are not raw.

    Only a SOMA store leaves cells out; in a file, such counts are an error.
    """
    return cells.n_not_raw(start, stop) if isinstance(cells, SomaSource) else 0


def keep_cells(
    cells: CellSource, config: CorpusConfig, number: int, dropped: Counter[str] | None = None
) -> NDArray[np.bool_]:
    """Return which cells of source `number` pass the filters that need no counts; `dropped` counts the others."""
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
    """Return which cells have a label that passes a test, [n_cells]; each distinct label is tested once."""
    names, codes = coded(column)
    return np.array([*(test(name) for name in names), False], dtype=bool)[codes]


def coded(column: pd.Series[Any]) -> tuple[list[str], NDArray[np.int32]]:
    """Return the distinct labels of a column, and the number of each cell's label, -1 where it has none.

    The numbers are the only array of the size of the cells, so a column of tens of millions of labels stays small.
    """
    import pandas as pd

    categories = column.astype("category") if not isinstance(column.dtype, pd.CategoricalDtype) else column
    names = [str(name) for name in categories.cat.categories]
    return names, categories.cat.codes.to_numpy().astype(np.int32)


def label_codes(cells: CellSource, known: Mapping[str, dict[str, int]]) -> dict[str, NDArray[np.int32]]:
    """Return each label of each cell as a code, -1 where it has none; new names get the next code in `known`."""
    codes: dict[str, NDArray[np.int32]] = {}
    for column, names in known.items():
        if column not in cells.columns:
            codes[column] = np.full(cells.n_cells, -1, dtype=np.int32)
            continue
        column_names, numbers = coded(cells.column(column))
        present = np.unique(numbers[numbers >= 0]).tolist()
        for name in sorted(column_names[number] for number in present):
            names.setdefault(name, len(names))
        of_name = np.array([*(names.get(name, -1) for name in column_names), -1], dtype=np.int32)
        codes[column] = of_name[numbers]
    return codes
