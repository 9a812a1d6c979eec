"""Cells of a SOMA store, such as a release of the CELLxGENE census, streamed.

A store is a tree of TileDB arrays, on disk or in an object store: ``obs`` and ``var`` are tables, the counts a sparse
array of (cell, gene) coordinates. Cells come in the order of their join ids, so a corpus is the same whenever it is
built. tiledbsoma is imported when a store is opened; it is in requirements/census.txt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import INTEGRAL_TOLERANCE, CountMatrix
from perturbscope.cells.readers import CellSource
from perturbscope.cells.readers.matrices import CsrArrays
from perturbscope.cells.readers.source import check_totals, missing_column, name_genes
from perturbscope.errors import (
    InvalidParameterError,
    MalformedMatrixError,
    PerturbScopeError,
    ServerUnreachableError,
    UnreadableFileError,
)
from training.config.stages import SomaConfig, SourceConfig

if TYPE_CHECKING:
    import pandas as pd

_ID = "soma_joinid"
_GENES = "feature_id"
_LAYER = "raw"
_BUFFER_BYTES = 2**27
"""Memory that TileDB uses for each column that it reads; its own default is a gigabyte."""


class SomaRows:
    """Rows of a sparse SOMA array; see :class:`perturbscope.cells.readers.matrices.Rows`.

    Parameters
    ----------
    array
        Open ``SparseNDArray`` of the counts.
    cells, genes
        Join ids of rows and columns, ascending.
    """

    def __init__(self, array: Any, cells: NDArray[np.int64], genes: NDArray[np.int64]) -> None:
        self._array = array
        self._cells = cells
        self._genes = genes
        self.shape: tuple[int, int] = (len(cells), len(genes))

    @property
    def n_values(self) -> int:
        """Number of stored values."""
        return int(self._array.nnz)

    def rows(self, start: int, stop: int) -> CsrArrays:
        """Return rows `start` to `stop`."""
        return self.some(np.arange(start, stop))

    def some(self, rows: NDArray[np.int64]) -> CsrArrays:
        """Return the given rows, which ascend."""
        ids = self._cells[rows]
        is_run = len(ids) > 0 and ids[-1] - ids[0] == len(ids) - 1
        wanted: Any = slice(int(ids[0]), int(ids[-1])) if is_run else ids
        parts = list(self._array.read((wanted,), result_order="row-major").tables()) if len(ids) else []
        cell, gene, data = (
            np.concatenate([part[name].to_numpy() for part in parts]) if parts else np.zeros(0, dtype=np.int64)
            for name in ("soma_dim_0", "soma_dim_1", "soma_data")
        )
        row, column = np.searchsorted(ids, cell), np.searchsorted(self._genes, gene)
        if len(gene) and (gene.max() > self._genes[-1] or (self._genes[column] != gene).any()):
            raise MalformedMatrixError("The counts name a gene that var does not have.", field="counts")
        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(row, minlength=len(ids)))])
        return data, column, indptr


class SomaSource(CellSource):
    """The cells of one experiment, in the order of their join ids.

    Parameters
    ----------
    source
        Configuration with ``soma``. `layer` defaults to ``raw``, `gene_key` to ``feature_id``.
    chunk_cells
        Cells in memory at a time.

    Raises
    ------
    InvalidParameterError
        tiledbsoma is not installed.
    UnreadableFileError
        The store, the experiment or the measurement does not exist.
    MissingColumnError
        There is no such layer or column.
    """

    def __init__(self, source: SourceConfig, *, chunk_cells: int = 4096) -> None:
        where = source.soma or SomaConfig()
        self._uri = source.path
        root, experiment = _open(source.path, where)
        self._obs: Any = experiment.obs
        measurement = _inside(experiment.ms, where.measurement, source.path)
        matrices = measurement.X
        layer = source.layer or _LAYER
        if layer not in matrices:
            raise missing_column("matrix", layer, sorted(matrices), field="layer")
        var = measurement.var
        gene_key = source.gene_key or _GENES
        if gene_key not in var.keys():  # noqa: SIM118, a SOMA table has no `in`
            raise missing_column("column of var", gene_key, list(var.keys()), field="gene_key")
        with _reading(self._uri):
            genes = var.read(column_names=[_ID, gene_key], result_order="row-major").concat()
            names = name_genes(genes[gene_key].to_numpy(zero_copy_only=False))
            self._ids = _numbers(self._obs, _ID)
        totals = None
        if source.total_counts_key is not None:
            if source.total_counts_key not in self._obs.keys():  # noqa: SIM118
                raise missing_column("column of obs", source.total_counts_key, self.columns, field="total_counts_key")
            with _reading(self._uri):
                numbers = _numbers(self._obs, source.total_counts_key)
            totals = check_totals(numbers, source.total_counts_key, len(self._ids))
        self._soma_rows = SomaRows(matrices[layer], self._ids, genes[_ID].to_numpy())
        self._not_raw: list[NDArray[np.int64]] = []
        super().__init__(self._soma_rows, names, totals=totals, chunk_cells=chunk_cells, root=root)

    @property
    def cell_ids(self) -> NDArray[np.str_]:
        """The join ids as names."""
        return self._ids.astype(np.str_)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of obs."""
        return [str(name) for name in self._obs.keys() if name != _ID]  # noqa: SIM118

    def _column(self, name: str) -> pd.Series[Any]:
        with _reading(self._uri):
            return _column(self._obs, name)

    @property
    def representations(self) -> list[str]:
        """Empty: embeddings of a store are not read."""
        return []

    def _representation(self, name: str) -> NDArray[Any]:
        raise AssertionError(name)

    def rows(self, start: int, stop: int) -> CountMatrix:
        """See :meth:`CellSource.rows`."""
        with _reading(self._uri):
            return super().rows(start, stop)

    def usable(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], CountMatrix]]:
        """Yield the given rows, which ascend, without those that have no counts or counts that are not raw.

        They come as one batch, or as none if no row is left. A store that collects thousands of data sets has both
        kinds of rows, and one of them must not end a build of days; see :meth:`n_not_raw`.
        """
        with _reading(self._uri):
            data, indices, indptr = self._soma_rows.some(rows)
        bad = ~np.isfinite(data) | (data < 0)
        bad |= np.abs(data - np.rint(data)) > INTEGRAL_TOLERANCE
        cell = np.repeat(np.arange(len(rows)), np.diff(indptr))
        is_bad = np.bincount(cell[bad], minlength=len(rows)) > 0
        has_counts = np.bincount(cell[data != 0], minlength=len(rows)) > 0
        if is_bad.any():
            self._not_raw.append(rows[is_bad])
        good = np.flatnonzero(~is_bad & has_counts)
        if not len(good):
            return
        is_kept = np.isin(cell, good)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.diff(indptr)[good])])
        totals = None if self._totals is None else self._totals[rows[good]]
        yield rows[good], CountMatrix.from_csr(data[is_kept], indices[is_kept], starts, self.gene_ids, totals=totals)

    def facts(self) -> dict[str, Any]:
        """Return the number of stored values, and the metadata of the store as text."""
        with _reading(self._uri):
            metadata = {str(key): str(value) for key, value in dict(self._root.metadata).items()}
            return {"values": int(self._soma_rows.n_values), "metadata": metadata}

    def n_not_raw(self, start: int, stop: int) -> int:
        """Return how many of rows `start` to `stop` :meth:`usable` left out because their counts are not raw."""
        return sum(int(((rows >= start) & (rows < stop)).sum()) for rows in self._not_raw)


def soma_identity(source: SourceConfig) -> str:
    """Return a digest of a store.

    For a store on disk it covers the numbers of cells and values, the genes and the store's metadata. For a store on S3
    it covers the address alone: a release does not change, and training from a finished corpus should not need the
    network.

    Raises
    ------
    PerturbScopeError
        :class:`SomaSource` cannot open the store.
    """
    facts: list[Any] = [source.path.rstrip("/")]
    if "://" not in source.path:
        with SomaSource(source) as cells:
            facts = [cells.n_cells, cells.gene_ids.tolist(), cells.facts()]
    return hashlib.sha256(json.dumps(["soma", *facts], sort_keys=True).encode()).hexdigest()


def _open(uri: str, where: SomaConfig) -> tuple[Any, Any]:
    """Open a store. Returns the store, which the caller closes, and the experiment in it."""
    try:
        import tiledbsoma
    except ImportError as error:
        raise InvalidParameterError(
            f"{uri} is a SOMA store; reading it needs tiledbsoma (pip install -r requirements/census.txt).",
            field="soma",
        ) from error
    settings: dict[str, Any] = {"soma.init_buffer_bytes": _BUFFER_BYTES}
    if where.region:
        settings["vfs.s3.region"] = where.region
    if where.anonymous:
        settings["vfs.s3.no_sign_request"] = "true"
    try:
        root = tiledbsoma.open(uri, context=tiledbsoma.SOMATileDBContext(tiledb_config=settings))
    except (tiledbsoma.SOMAError, RuntimeError, OSError, ValueError) as error:
        raise UnreadableFileError(f"{uri} cannot be opened as a SOMA store: {_reason(error)}.", field="path") from error
    node: Any = root
    for name in where.experiment.split("/"):
        node = _inside(node, name, uri) if name else node
    if not isinstance(node, tiledbsoma.Experiment):
        raise UnreadableFileError(
            f"{where.experiment or 'The root'} of {uri} is a {type(node).__name__}, not an experiment. Name one with "
            "soma.experiment.",
            field="soma.experiment",
        )
    return root, node


def _inside(node: Any, name: str, uri: str) -> Any:
    try:
        return node[name]
    except KeyError as error:
        names = ", ".join(sorted(node)) if hasattr(node, "keys") else "nothing"
        raise UnreadableFileError(f"{uri} has no {name!r} there; it has {names}.", field="soma") from error


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Turn errors of TileDB into ours. A remote store is taken to be out of reach, not wrong."""
    import tiledbsoma

    try:
        yield
    except PerturbScopeError:
        raise
    except (tiledbsoma.SOMAError, RuntimeError, OSError) as error:
        if "://" in uri:
            raise ServerUnreachableError(
                f"Reading {uri} failed: {_reason(error)}. Run the same command again; it goes on after its last "
                "finished shard.",
                field="path",
            ) from error
        raise UnreadableFileError(f"{uri} cannot be read: {_reason(error)}.", field="path") from error


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(".")


def _numbers(table: Any, name: str) -> NDArray[Any]:
    """Return a column of numbers, in the order of the join ids."""
    parts = table.read(column_names=[name], result_order="row-major")
    return np.concatenate([part[name].to_numpy() for part in parts])


def _column(table: Any, name: str) -> pd.Series[Any]:
    """Return a column in the order of the join ids; text as categories, so that it takes four bytes a cell."""
    import pandas as pd
    import pyarrow as pa

    kind = table.schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
        return pd.Series(_numbers(table, name))
    known: dict[str, int] = {}
    codes = [np.zeros(0, dtype=np.int32)]
    for part in table.read(column_names=[name], result_order="row-major"):
        for chunk in part[name].chunks:
            encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
            of_chunk = [known.setdefault(str(label), len(known)) for label in encoded.dictionary.to_pylist()]
            numbers = np.array([*of_chunk, -1], dtype=np.int32)
            codes.append(numbers[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)])
    return pd.Series(pd.Categorical.from_codes(np.concatenate(codes), categories=pd.Index(list(known))))
