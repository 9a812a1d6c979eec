"""AnnData on disk: .h5ad and zarr, streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.readers.matrices import CsrRows, DenseRows, Rows, csc_rows
from perturbscope.cells.readers.source import CHUNK_CELLS, CellSource, check_totals, missing_column, name_genes
from perturbscope.cells.readers.store import Frame, attribute, child, children, is_group, optional, reading, values
from perturbscope.cells.readers.stored import StoredArray
from perturbscope.errors import LimitExceededError, MalformedMatrixError, UnreadableFileError

if TYPE_CHECKING:
    import pandas as pd


class AnnotatedSource(CellSource):
    """An AnnData file, open; the matrix stays on disk.

    Parameters
    ----------
    root
        The open HDF5 file or zarr group; closed with the source.
    path
        Where it lies.
    layer, gene_key, total_counts_key, chunk_cells, max_cells
        See :func:`perturbscope.open_cells`.
    """

    def __init__(
        self,
        root: Any,
        path: Path,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        chunk_cells: int = CHUNK_CELLS,
        max_cells: int | None = None,
    ) -> None:
        uns = optional(root, "uns")
        self._obs = Frame(child(root, "obs"), uns)
        node, var = find_matrix(root, layer)
        n_cells, n_genes = shape_of(node)
        check_limit(n_cells, max_cells, path)
        if len(self._obs) != n_cells or len(Frame(var)) != n_genes:
            raise MalformedMatrixError(
                f"{path}: the matrix is {n_cells} x {n_genes}, but obs has {len(self._obs)} rows and var "
                f"{len(Frame(var))}. The file is damaged, or was not written by anndata.",
                field="counts",
            )
        totals = None
        if total_counts_key is not None:
            if total_counts_key not in self._obs.columns():
                raise missing_column("column of obs", total_counts_key, self._obs.columns(), field="total_counts_key")
            totals = check_totals(self._obs.column(total_counts_key).to_numpy(), total_counts_key, n_cells)
        super().__init__(
            open_matrix(node),
            read_genes(Frame(var, uns), gene_key),
            path=path,
            totals=totals,
            chunk_cells=chunk_cells,
            root=root,
        )

    @property
    def cell_ids(self) -> NDArray[np.str_]:
        """Name of each cell, [n_cells]."""
        with reading(str(self.path)):
            return self._obs.index()

    @property
    def columns(self) -> list[str]:
        """Names of the columns of obs that can be read."""
        with reading(str(self.path)):
            return self._obs.columns()

    def _column(self, name: str) -> pd.Series[Any]:
        with reading(str(self.path)):
            return self._obs.column(name)

    @property
    def representations(self) -> list[str]:
        """Names of the matrices in obsm."""
        with reading(str(self.path)):
            return children(optional(self._root, "obsm"))

    def _representation(self, name: str) -> NDArray[Any]:
        with reading(str(self.path)):
            node = child(child(self._root, "obsm"), name)
            if not is_group(node):
                return values(node)
            if attribute(node, "encoding-type") == "dataframe":
                frame = Frame(node)
                return np.column_stack([frame.column(column).to_numpy() for column in frame.columns()])
            matrix = open_matrix(node)
            if matrix.shape[0] != self.n_cells:
                # Before it is made dense: what a damaged file says of a shape can be anything.
                raise MalformedMatrixError(
                    f"obsm[{name!r}] is of shape {matrix.shape} for {self.n_cells} cells; one row a cell is needed.",
                    field="use_rep",
                )
            data, indices, indptr = matrix.rows(0, matrix.shape[0])
            dense = np.zeros(matrix.shape, dtype=data.dtype)
            dense[np.repeat(np.arange(len(dense)), np.diff(indptr)), indices] = data
            return dense

    def rows(self, start: int, stop: int) -> Any:
        """See :meth:`CellSource.rows`."""
        with reading(str(self.path)):
            return super().rows(start, stop)


def find_matrix(root: Any, layer: str | None) -> tuple[Any, Any]:
    """The node that holds the counts, and the var that goes with it.

    ``None`` and ``"X"`` mean X; any other name a layer; ``"raw"`` means raw.X where no layer is called so.
    """
    var = child(root, "var")
    if layer in (None, "X"):
        if optional(root, "X") is None:
            raise UnreadableFileError(
                "The file has no X. Name the layer that holds the raw counts (layer), "
                f"one of: {', '.join(_layers(root)) or 'none'}.",
                field="layer",
            )
        return child(root, "X"), var
    layers = children(optional(root, "layers"))
    if layer in layers:
        return child(child(root, "layers"), str(layer)), var
    if layer == "raw" and optional(root, "raw") is not None:
        return child(child(root, "raw"), "X"), child(child(root, "raw"), "var")
    if layer == "raw" and optional(root, "raw.X") is not None:
        return child(root, "raw.X"), child(root, "raw.var")
    raise missing_column("layer", str(layer), ["X", *_layers(root)], field="layer")


def _layers(root: Any) -> list[str]:
    has_raw = optional(root, "raw") is not None or optional(root, "raw.X") is not None
    return [*children(optional(root, "layers")), *(["raw"] if has_raw else [])]


def shape_of(node: Any) -> tuple[int, int]:
    """Cells and genes of a stored matrix."""
    shape = attribute(node, "shape", attribute(node, "h5sparse_shape")) if is_group(node) else node.shape
    if shape is None or len(shape) != 2:
        raise UnreadableFileError(f"{node.name} is not a matrix of cells x genes.", field="counts")
    return int(shape[0]), int(shape[1])


def open_matrix(node: Any) -> Rows:
    """Rows of a stored matrix: dense, CSR or CSC, as anndata has written them since 0.6."""
    if not is_group(node):
        return DenseRows(_array(node))
    old = attribute(node, "h5sparse_format")
    encoding = attribute(node, "encoding-type", f"{old}_matrix" if old else None)
    if encoding not in ("csr_matrix", "csc_matrix"):
        raise UnreadableFileError(
            f"{node.name} is stored as {encoding or 'an unknown encoding'}; dense, csr_matrix or csc_matrix is needed.",
            field="counts",
        )
    data, indices, indptr = (_array(child(node, name)) for name in ("data", "indices", "indptr"))
    build = CsrRows if encoding == "csr_matrix" else csc_rows
    return build(data, indices, indptr, shape_of(node))


def _array(node: Any) -> Any:
    if is_group(node) or getattr(node, "shape", None) is None:
        raise UnreadableFileError(f"{node.name} is not an array; the file is damaged.", field="counts")
    return StoredArray(node)


def read_genes(var: Frame, gene_key: str | None) -> NDArray[np.str_]:
    """Gene identifiers: the index of var, or one of its columns."""
    if gene_key is None:
        return name_genes(var.index())
    if gene_key not in var.columns():
        raise missing_column("column of var", gene_key, var.columns(), field="gene_key")
    return name_genes(var.column(gene_key).to_numpy())


def check_limit(n_cells: int, max_cells: int | None, path: Path) -> None:
    """Raise :class:`LimitExceededError` before anything of the size of the cells is read."""
    if max_cells is not None and n_cells > max_cells:
        raise LimitExceededError(
            f"{path.name} has {n_cells} cells; at most {max_cells} are allowed. Send it in parts.", field="cells"
        )


def open_zarr(path: Path) -> Any:
    """The root group of a zarr store."""
    try:
        import zarr
    except ImportError as error:
        raise UnreadableFileError(
            f"{path} is a zarr store; reading it needs the zarr package (pip install zarr).", field="file"
        ) from error
    with reading(path):
        return zarr.open_group(path, mode="r")


def is_zarr(path: Path) -> bool:
    """Whether a directory is a zarr group of version 2 or 3."""
    try:
        if (path / "zarr.json").is_file():
            return bool(json.loads((path / "zarr.json").read_text(encoding="utf-8"))["node_type"] == "group")
        return (path / ".zgroup").is_file()
    except (OSError, ValueError, LookupError, TypeError):
        return False
