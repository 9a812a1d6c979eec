"""The source of cells that every reader returns: chunks of counts, and labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import RAW_REMEDY, CountMatrix
from perturbscope.cells.genes import require_even
from perturbscope.cells.readers.features import Features, doubtful_names, is_missing, left_out_sentence
from perturbscope.cells.readers.matrices import KeptColumns, Rows
from perturbscope.errors import (
    DuplicateGenesError,
    InvalidEmbeddingError,
    InvalidParameterError,
    LimitExceededError,
    MalformedMatrixError,
    MissingColumnError,
    NotRawCountsError,
    PerturbScopeError,
    near,
)

if TYPE_CHECKING:
    import pandas as pd

_MOST = 0.9
"""Share of Ensembl ids from which a column of var has ids; other rows are of added sequences."""
CHUNK_CELLS = 4096
"""Cells that are in memory at a time."""
_COUNT_LAYERS = ("counts", "raw_counts", "count", "umi", "umis", "raw_count")
"""Names that layers of raw counts usually have; these are looked into first."""
_PART_LAYERS = ("spliced", "ambiguous", "nascent", "mature", "matrix_")
"""Parts of the names of layers that hold some of the counts, so that they cannot stand for all."""
_SHOWN = 20


class CellSource(ABC):
    """The cells of one file or object, read chunk by chunk.

    Iterating yields :class:`CountMatrix` chunks of `chunk_cells` cells in the order of the file, as often as you like.
    Use it as a context manager, or :meth:`close` it.

    Attributes
    ----------
    path
        Path of the file; None for an object in memory.
    n_cells
        Number of cells.
    gene_ids
        Identifier of each gene, as selected by the caller's `gene_key`.
    chunk_cells
        Cells of one chunk.
    features
        Which features of the file are genes; the others are not read.
    round_counts
        Whether estimated counts are rounded to whole numbers.
    """

    def __init__(
        self,
        matrix: Rows,
        gene_ids: NDArray[np.str_],
        *,
        path: Path | None = None,
        totals: NDArray[Any] | None = None,
        chunk_cells: int = CHUNK_CELLS,
        root: Any = None,
        features: Features | None = None,
        round_counts: bool = False,
    ) -> None:
        if chunk_cells < 1:
            raise InvalidParameterError(f"chunk_cells is {chunk_cells}; it must be at least 1.", field="chunk_cells")
        n_cells, n_genes = matrix.shape
        where = str(path) if path else "The object"
        if n_genes != len(gene_ids):
            raise MalformedMatrixError(
                f"{where}: the matrix has {n_genes} columns, but there are {len(gene_ids)} gene identifiers.",
                field="gene_ids",
            )
        if n_cells == 0:
            raise MalformedMatrixError(f"{where} has no cells.", field="counts")
        if n_genes == 0:
            raise MalformedMatrixError(f"{where} has no genes; the matrix has no columns.", field="gene_ids")
        self.path = path
        self.n_cells = n_cells
        self.features = features or Features()
        keep = self.features.keep
        self.gene_ids = gene_ids if keep is None else gene_ids[keep]
        self.chunk_cells = chunk_cells
        self.round_counts = round_counts
        self._matrix = matrix if keep is None else KeptColumns(matrix, keep)
        self._totals = totals
        self._root = root

    @property
    @abstractmethod
    def cell_ids(self) -> NDArray[np.str_]:
        """Name of each cell, [n_cells]."""

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the columns of obs that can be read."""

    @abstractmethod
    def _column(self, name: str) -> pd.Series[Any]:
        """Read a column of obs that exists."""

    @property
    @abstractmethod
    def representations(self) -> list[str]:
        """Names of the matrices in obsm."""

    @property
    def layers(self) -> list[str]:
        """Names of the places of counts beside X, as `layer` takes them; none where the kind of file has none."""
        return []

    @property
    def gene_columns(self) -> list[str]:
        """Names of the columns of var that hold text, as `gene_key` takes them; none where the file has none."""
        return []

    @abstractmethod
    def _representation(self, name: str) -> NDArray[Any]:
        """Read a matrix of obsm that exists."""

    @cached_property
    def warnings(self) -> list[str]:
        """Sentences about features that were left out or look like no genes, and about counts that are rounded."""
        found = [left_out_sentence(self.features.left_out)] if self.features.left_out else []
        if not self.features.typed:
            found += doubtful_names(self.gene_ids)
        if self.round_counts:
            found.append("Counts that are no whole numbers were rounded to the nearest one, as asked (round_counts).")
        return found

    @cached_property
    def obs(self) -> pd.DataFrame:
        """All columns of obs that can be read, indexed by `cell_ids`."""
        import pandas as pd

        columns = {name: self._column(name).array for name in self.columns}
        return pd.DataFrame(columns, index=pd.Index(self.cell_ids.astype(object)))

    def column(self, name: str, *, field: str = "obs") -> pd.Series[Any]:
        """Read one column of obs, [n_cells]; errors name `field` as the caller's parameter.

        Raises
        ------
        MissingColumnError
            There is no such column; the message names the columns that exist and the closest.
        """
        if name not in self.columns:
            raise missing_column("column of obs", name, self.columns, field=field)
        return self._column(name)

    def labels(self, name: str, *, field: str = "obs") -> NDArray[np.object_]:
        """Read one column of obs as strings, None for a missing label. Raises as :meth:`column`."""
        import pandas as pd

        column = self.column(name, field=field)
        if isinstance(column.dtype, pd.CategoricalDtype):
            # One string a category, whatever the number of cells: 8 bytes a cell instead of about 80.
            each = pd.Series(pd.Categorical.from_codes(np.arange(len(column.cat.categories)), dtype=column.dtype))
            names = np.array([*each.astype(str), None], dtype=object)
            found: NDArray[np.object_] = names[column.cat.codes.to_numpy()]
            return found
        present = column.notna().to_numpy()
        labels = np.full(len(column), None, dtype=object)
        labels[present] = column[present].astype(str).to_numpy()
        return labels

    def representation(self, name: str) -> NDArray[np.float32]:
        """Read a matrix of obsm, float32 [n_cells, width].

        Raises
        ------
        MissingColumnError
            There is no such matrix.
        InvalidEmbeddingError
            It is not a numeric matrix with one row a cell.
        """
        if name not in self.representations:
            raise missing_column("matrix in obsm", name, self.representations, field="use_rep")
        values = np.asarray(self._representation(name))
        if values.ndim != 2 or len(values) != self.n_cells or values.dtype.kind not in "iufb":
            raise InvalidEmbeddingError(
                f"obsm[{name!r}] has shape {values.shape} and dtype {values.dtype}; numbers of shape "
                f"({self.n_cells}, width) are needed, one row a cell.",
                field="use_rep",
            )
        return values.astype(np.float32)

    def rows(self, start: int, stop: int) -> CountMatrix:
        """Read and validate the cells `start` to `stop`. Raises as :meth:`CountMatrix.from_csr`."""
        stop = min(stop, self.n_cells)
        data, indices, indptr = self._matrix.rows(start, stop)
        totals = None if self._totals is None else self._totals[start:stop]
        options: dict[str, Any] = {"totals": totals, "first_row": start, "round_counts": self.round_counts}
        try:
            cells = CountMatrix.from_csr(data, indices, indptr, self.gene_ids, **options)
        except NotRawCountsError as error:
            raise self._with_place_of_counts(error) from error
        # The checked list: the next chunk's is neither checked nor looked up again.
        self.gene_ids = cells.gene_ids
        return cells

    def _other_matrices(self) -> dict[str, Callable[[], NDArray[Any]]]:
        """Return, by the name of each layer and of raw, a function that reads some of its values."""
        return {}

    def _with_place_of_counts(self, error: NotRawCountsError) -> NotRawCountsError:
        """Return the error with the name of a layer that has the raw counts, if there is one."""
        for name, sample in sorted(self._other_matrices().items(), key=lambda item: item[0] not in _COUNT_LAYERS):
            if any(part in name.casefold() for part in _PART_LAYERS):
                continue
            try:
                is_found = _are_counts(sample())
            except (PerturbScopeError, OSError, RuntimeError, ValueError, TypeError):
                continue  # the fault of another layer than the one that was asked for
            if is_found:
                what = name if name in ("raw", "X") else f"The layer {name!r}"
                found = f"{what} holds whole numbers: give layer={name!r} (--layer {name})."
                return NotRawCountsError(f"{error.message.removesuffix(RAW_REMEDY)}{found}", field=error.field)
        return error

    def chunks(self, size: int) -> Iterator[CountMatrix]:
        """Read all cells in chunks of `size`, the last one perhaps smaller. Raises as :meth:`rows`."""
        for start in range(0, self.n_cells, size):
            yield self.rows(start, start + size)

    def __iter__(self) -> Iterator[CountMatrix]:
        return self.chunks(self.chunk_cells)

    def __len__(self) -> int:
        return self.n_cells

    def read(self) -> CountMatrix:
        """Read all cells at once."""
        return self.rows(0, self.n_cells)

    def close(self) -> None:
        """Close the file, if there is one. May be called twice."""
        close = getattr(self._root, "close", None)
        if close:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def missing_column(what: str, name: str, available: Sequence[str], *, field: str) -> MissingColumnError:
    """Return the error for a `name` that does not exist; it lists what does exist, and the closest name."""
    folded = {item.casefold(): item for item in available}
    close = near(name.casefold(), folded, n=1)
    shown = ", ".join(map(repr, available[:_SHOWN])) + (", ..." if len(available) > _SHOWN else "")
    hint = f" Did you mean {folded[close[0]]!r}?" if close else ""
    return MissingColumnError(f"There is no {what} {name!r}; there are: {shown or 'none'}.{hint}", field=field)


def check_totals(column: Any, name: str, n_cells: int) -> NDArray[np.float64]:
    """Return a column of total counts as float64 [n_cells]. Its values are checked later, against the counts.

    `column` is an array, or a Series of any of pandas' types of numbers; a missing number becomes NaN.
    """
    totals = np.asarray(column)
    if totals.dtype == object:
        # Nullable integers, whose missing values are no floats.
        import pandas as pd

        totals = pd.to_numeric(pd.Series(totals), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        if not np.isfinite(totals).any():
            totals = np.asarray(column)
    if totals.dtype.kind not in "iuf" or totals.shape != (n_cells,):
        raise MalformedMatrixError(
            f"The column {name!r} has dtype {totals.dtype}; total counts are numbers, one a cell.",
            field="total_counts",
        )
    return totals.astype(np.float64)


def name_genes(identifiers: NDArray[Any]) -> NDArray[np.str_]:
    """Return gene identifiers as strings; a column without one gets a name that is in no vocabulary."""
    if identifiers.dtype.kind == "U" and (identifiers != "").all():
        return identifiers
    names = identifiers.astype(object)
    for column, name in enumerate(names):
        if is_missing(name) or name == "":
            names[column] = f"unnamed-{column}"
    texts: list[str] = list(map(str, names))
    require_even(texts, "gene_ids")
    return np.array(texts, dtype=np.str_) if texts else np.zeros(0, dtype="U1")


def _are_counts(values: NDArray[Any]) -> bool:
    """Return whether these values are whole, not negative, and not all 0 and 1."""
    if values.dtype.kind not in "iuf" or not values.size:
        return False
    numbers = values.astype(np.float64)
    return bool(np.isfinite(numbers).all() and (numbers >= 0).all() and (numbers == np.rint(numbers)).all()) and (
        numbers.max() > 1
    )


def check_limit(n_cells: int, max_cells: int | None, path: Path) -> None:
    """Raise :class:`LimitExceededError` for too many cells, before any array with one entry a cell is read."""
    if max_cells is not None and n_cells > max_cells:
        raise LimitExceededError(
            f"{path.name} has {n_cells} cells; at most {max_cells} are allowed. Send it in parts.", field="cells"
        )


def each_named(genes: NDArray[np.str_], columns: Iterable[tuple[str, Any]]) -> NDArray[np.str_]:
    """Refuse identifiers of which one names several columns, if a column of var has an id for each.

    Raises
    ------
    DuplicateGenesError
        The message says which column to name. Where there is none, the check of the counts speaks.
    """
    names, n_columns = np.unique(genes, return_counts=True)
    if len(names) == len(genes):
        return genes
    for name, column in columns:
        ids = column.astype(str)
        if ids.is_unique and ids.str.startswith("ENS").mean() > _MOST:
            repeated = names[n_columns > 1]
            raise DuplicateGenesError(
                f"{len(repeated)} gene identifier(s) name more than one column (first: {str(repeated[0])!r}). "
                f"var[{name!r}] has an id for each: gene_key={name!r}, or --gene-key {name}.",
                field="gene_key",
            )
    return genes
