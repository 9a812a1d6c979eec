"""AnnData objects in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.readers.matrices import from_scipy
from perturbscope.cells.readers.source import CHUNK_CELLS, CellSource, check_totals, missing_column, name_genes
from perturbscope.errors import MalformedMatrixError

if TYPE_CHECKING:
    import pandas as pd


class AnnDataSource(CellSource):
    """The cells of an AnnData object, which is not changed.

    Parameters
    ----------
    adata
        The AnnData object; a backed one is read through its file.
    layer, gene_key, total_counts_key, chunk_cells
        See :func:`perturbscope.open_cells`.
    """

    def __init__(
        self,
        adata: Any,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        chunk_cells: int = CHUNK_CELLS,
    ) -> None:
        if not all(hasattr(adata, name) for name in ("obs", "var", "layers", "obs_names")):
            raise MalformedMatrixError(
                f"An AnnData object is needed, not {type(adata).__name__}. Read files with perturbscope.open_cells.",
                field="adata",
            )
        self._adata = adata
        matrix, var = _matrix(adata, layer)
        if gene_key is not None and gene_key not in var.columns:
            raise missing_column("column of var", gene_key, list(map(str, var.columns)), field="gene_key")
        genes = np.asarray(var.index if gene_key is None else var[gene_key], dtype=object)
        totals = None
        if total_counts_key is not None:
            if total_counts_key not in adata.obs.columns:
                raise missing_column(
                    "column of obs", total_counts_key, list(map(str, adata.obs.columns)), field="total_counts_key"
                )
            totals = check_totals(np.asarray(adata.obs[total_counts_key]), total_counts_key, adata.n_obs)
        # A view of a backed object holds some of the file's cells; only the whole is that file.
        backed = getattr(adata, "isbacked", False) and not getattr(adata, "is_view", False)
        path = Path(adata.filename) if backed else None
        super().__init__(from_scipy(matrix), name_genes(genes), path=path, totals=totals, chunk_cells=chunk_cells)

    @property
    def cell_ids(self) -> NDArray[np.str_]:
        """Name of each cell."""
        return np.asarray(self._adata.obs_names.astype(str), dtype=np.str_)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of obs."""
        return list(map(str, self._adata.obs.columns))

    def _column(self, name: str) -> pd.Series[Any]:
        column: pd.Series[Any] = self._adata.obs[name]
        return column

    @property
    def representations(self) -> list[str]:
        """Names of the matrices in obsm."""
        return list(self._adata.obsm.keys())

    def _representation(self, name: str) -> NDArray[Any]:
        values = self._adata.obsm[name]
        return np.asarray(values.toarray() if hasattr(values, "toarray") else values)


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
        matrix = matrix.to_memory()
    elif not hasattr(matrix, "tocsr") and not isinstance(matrix, np.ndarray):
        matrix = matrix[...]
    return matrix, var
