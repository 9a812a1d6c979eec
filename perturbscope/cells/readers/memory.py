"""AnnData objects in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.counts import native
from perturbscope.cells.readers.features import Features, choose_modality, features_of_frame
from perturbscope.cells.readers.matrices import from_scipy
from perturbscope.cells.readers.source import (
    CHUNK_CELLS,
    CellSource,
    check_totals,
    each_named,
    missing_column,
    name_genes,
)
from perturbscope.errors import InvalidParameterError, MalformedMatrixError

if TYPE_CHECKING:
    import pandas as pd


_SAMPLE = 64
"""Cells of a layer that are looked at to see whether it holds counts."""


class AnnDataSource(CellSource):
    """The cells of an AnnData object, or of a MuData object's modality of genes; the object is not changed.

    Parameters
    ----------
    adata
        The object; a backed one is read through its file. Of a MuData, columns of obs and matrices of obsm that the
        modality lacks are taken from the whole.
    layer, gene_key, total_counts_key, round_counts, chunk_cells
        See :func:`perturbscope.open_cells`.
    """

    def __init__(
        self,
        adata: Any,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        round_counts: bool = False,
        chunk_cells: int = CHUNK_CELLS,
    ) -> None:
        whole, name = adata, None
        if isinstance(getattr(adata, "mod", None), Mapping):
            name = choose_modality(
                list(map(str, adata.mod)),
                lambda key: _features(adata.mod[key].var, adata.mod[key].var_names, f"The modality {key!r}"),
                where="The MuData object",
            )
            adata = adata.mod[name]
        if not all(hasattr(adata, part) for part in ("obs", "var", "layers", "obs_names")):
            raise MalformedMatrixError(
                f"An AnnData object is needed, not {type(adata).__name__}. Read files with perturbscope.open_cells.",
                field="adata",
            )
        self._adata = adata
        self._whole = None if name is None else whole
        self._layer = layer or "X"
        matrix, var = _matrix(adata, layer)
        named = _texts(var.index if gene_key is None else _column_of(var, gene_key, "var", "gene_key"))
        genes = each_named(name_genes(named), ((str(name), var[name]) for name in var.columns))
        totals = None
        if total_counts_key is not None:
            column = _column_of(self._frame(total_counts_key), total_counts_key, "obs", "total_counts_key")
            totals = check_totals(column, total_counts_key, adata.n_obs)
        # A view of a backed object holds some of the file's cells; only the whole is that file.
        backed = getattr(adata, "isbacked", False) and not getattr(adata, "is_view", False) and name is None
        super().__init__(
            from_scipy(matrix),
            genes,
            path=Path(adata.filename) if backed else None,
            totals=totals,
            chunk_cells=chunk_cells,
            features=_features(var, genes, "The object"),
            round_counts=round_counts,
        )

    @property
    def cell_ids(self) -> NDArray[np.str_]:
        """Name of each cell."""
        return np.asarray(self._adata.obs_names.astype(str), dtype=np.str_)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of obs."""
        more = [] if self._whole is None else list(map(str, self._whole.obs.columns))
        return list(dict.fromkeys([*map(str, self._adata.obs.columns), *more]))

    def _column(self, name: str) -> pd.Series[Any]:
        return _column_of(self._frame(name), name, "obs", "obs")

    def _frame(self, name: str) -> pd.DataFrame:
        """Return the obs that has a column: the modality's, or that of the whole for the modality's cells."""
        own: pd.DataFrame = self._adata.obs
        if self._whole is None or name in map(str, own.columns) or name not in map(str, self._whole.obs.columns):
            return own
        shared: pd.DataFrame = self._whole.obs.iloc[self._rows_of_whole()]
        return shared

    def _rows_of_whole(self) -> NDArray[np.intp]:
        """Row in the whole MuData of each cell of the modality, [n_cells]."""
        rows = cast("Any", self._whole).obs_names.get_indexer(self._adata.obs_names)
        if (rows < 0).any():
            raise MalformedMatrixError(
                "The MuData object lacks cells that its modality has; call mdata.update().", field="cells"
            )
        return np.asarray(rows, dtype=np.intp)

    @property
    def layers(self) -> list[str]:
        """Names of the layers, and raw if the object has it."""
        return [*map(str, self._adata.layers), *(["raw"] if self._adata.raw is not None else [])]

    @property
    def gene_columns(self) -> list[str]:
        """Names of the columns of var that hold text."""
        var = self._adata.var
        return [str(name) for name in var.columns if var[name].dtype.kind not in "biufcmM"]

    @property
    def representations(self) -> list[str]:
        """Names of the matrices in obsm."""
        # In a MuData's own obsm, an entry with the name of a modality is a mask of cells.
        more = [] if self._whole is None else [key for key in self._whole.obsm if key not in self._whole.mod]
        return list(dict.fromkeys([*self._adata.obsm.keys(), *more]))

    def _representation(self, name: str) -> NDArray[Any]:
        if name in self._adata.obsm or self._whole is None:
            values, rows = self._adata.obsm[name], None
        else:
            values, rows = self._whole.obsm[name], self._rows_of_whole()
        found = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
        return found if rows is None else found[rows]

    def _other_matrices(self) -> dict[str, Callable[[], NDArray[Any]]]:
        places: dict[str, Callable[[], NDArray[Any]]] = {
            str(name): partial(_some_values, values) for name, values in self._adata.layers.items()
        }
        if getattr(self._adata, "raw", None) is not None:
            places.setdefault("raw", lambda: _some_values(self._adata.raw.X))
        if self._adata.X is not None:
            places.setdefault("X", lambda: _some_values(self._adata.X))
        return {name: sample for name, sample in places.items() if name != self._layer}


def _features(var: pd.DataFrame, identifiers: Any, where: str) -> Features:
    import pandas as pd

    def distinct(name: str, *, whole: bool) -> list[Any] | None:
        found: Any = var[name]
        if isinstance(found, pd.DataFrame):  # two columns of one name
            return None
        if isinstance(found.dtype, pd.CategoricalDtype):
            return list(found.cat.categories)
        is_text = pd.api.types.is_string_dtype(found.dtype) or found.dtype == object
        return list(found.unique()) if is_text else None

    names = [name for name in var.columns if isinstance(name, str)]
    return features_of_frame(names, distinct, var.__getitem__, np.asarray(identifiers, dtype=np.str_), where=where)


def _column_of(frame: pd.DataFrame, name: str, part: str, field: str) -> pd.Series[Any]:
    """Return the one column of that name.

    Raises
    ------
    MissingColumnError
        There is none.
    InvalidParameterError
        There are several.
    """
    places = [place for place, column in enumerate(frame.columns) if str(column) == name]
    if not places:
        raise missing_column(f"column of {part}", name, list(map(str, frame.columns)), field=field)
    if len(places) > 1:
        raise InvalidParameterError(
            f"{part} has {len(places)} columns called {name!r}, and it is not clear which is meant. Rename one.",
            field=field,
        )
    column: pd.Series[Any] = frame.iloc[:, places[0]]
    return column


def _texts(column: Any) -> NDArray[Any]:
    """Return an index or column of any of pandas' types as an array of objects."""
    return np.asarray(column, dtype=object)


def _some_values(matrix: Any) -> NDArray[Any]:
    """Return the values of a few cells, stored ones only of a sparse matrix."""
    some = matrix[:_SAMPLE] if getattr(matrix, "shape", (0,))[0] > _SAMPLE else matrix[...]
    return np.asarray(some.data if hasattr(some, "tocsr") else some).ravel()


def _from_file(backed: Any) -> Any:
    """Read a sparse matrix of a backed object, also of a dtype that scipy, and so anndata, does not take."""
    if native(np.zeros(0, dtype=backed.dtype)).dtype == backed.dtype:
        return backed.to_memory()
    data, indices, indptr = (np.asarray(backed.group[name][...]) for name in ("data", "indices", "indptr"))
    kind = sparse.csr_matrix if backed.format == "csr" else sparse.csc_matrix
    return kind((native(data), indices, indptr), shape=backed.shape)


def _matrix(adata: Any, layer: str | None) -> tuple[Any, Any]:
    if layer in (None, "X"):
        matrix, var = adata.X, adata.var
    elif layer in adata.layers:
        matrix, var = adata.layers[layer], adata.var
    elif layer == "raw" and adata.raw is not None:
        matrix, var = adata.raw.X, adata.raw.var
    else:
        known = ["X", *adata.layers.keys(), *(["raw"] if adata.raw is not None else [])]
        raise missing_column("layer", str(layer), known, field="layer")
    if matrix is None:
        raise MalformedMatrixError(
            f"The AnnData object has no X. Name the layer that holds the raw counts (layer), one of: "
            f"{', '.join(adata.layers.keys()) or 'none'}.",
            field="layer",
        )
    # Backed: a sparse dataset or an HDF5 dataset in place of the matrix.
    if hasattr(matrix, "to_memory"):
        matrix = _from_file(matrix)
    elif not hasattr(matrix, "tocsr") and not isinstance(matrix, np.ndarray):
        matrix = np.asarray(matrix[...])
    return matrix, var
