"""AnnData files, .h5ad and zarr, streamed from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.readers.features import Features, choose_modality, features_of_frame
from perturbscope.cells.readers.matrices import CsrRows, DenseRows, Rows, csc_rows
from perturbscope.cells.readers.source import (
    CHUNK_CELLS,
    CellSource,
    check_limit,
    check_totals,
    each_named,
    missing_column,
    name_genes,
)
from perturbscope.cells.readers.store import (
    StoredArray,
    attribute,
    child,
    children,
    has,
    is_group,
    name_of,
    optional,
    reading,
    values,
)
from perturbscope.errors import MalformedMatrixError, UnreadableFileError

if TYPE_CHECKING:
    import pandas as pd


_ENDS = 32
"""Values at either end of a column that are read to see whether it may hold the types of features."""
_SAMPLE_VALUES = 2**16
"""Values of a layer that are looked at to see whether it holds counts."""


class AnnotatedSource(CellSource):
    """The cells of an open AnnData file; the matrix stays on disk.

    Parameters
    ----------
    root
        The open HDF5 file or zarr group; closed with the source.
    path
        Path of the file, for messages.
    layer, gene_key, total_counts_key, round_counts, chunk_cells, max_cells
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
        round_counts: bool = False,
        chunk_cells: int = CHUNK_CELLS,
        max_cells: int | None = None,
    ) -> None:
        file, self._whole = root, None
        if has(root, "mod") and not has(root, "X"):
            name = _modality(root, path)
            root, self._whole = child(child(root, "mod"), name), _Whole(root, name)
        self._part, self._layer = root, layer or "X"
        uns = optional(root, "uns")
        self._obs = Frame(child(root, "obs"), uns)
        node, var = find_matrix(root, layer)
        n_cells, n_genes = shape_of(node)
        check_limit(n_cells, max_cells, path)
        frame = Frame(var, uns)
        if len(self._obs) != n_cells or len(frame) != n_genes:
            raise MalformedMatrixError(
                f"{path}: the matrix is {n_cells} x {n_genes}, but obs has {len(self._obs)} rows and var "
                f"{len(frame)}. The file is damaged, or was not written by anndata.",
                field="counts",
            )
        totals = None
        if total_counts_key is not None:
            if total_counts_key not in self._names():
                raise missing_column("column of obs", total_counts_key, self._names(), field="total_counts_key")
            totals = check_totals(self._read(total_counts_key), total_counts_key, n_cells)
        genes = read_genes(frame, gene_key)
        self._var = frame
        super().__init__(
            open_matrix(node),
            genes,
            path=path,
            totals=totals,
            chunk_cells=chunk_cells,
            root=file,
            features=_features(frame, genes, path),
            round_counts=round_counts,
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
            return self._names()

    def _column(self, name: str) -> pd.Series[Any]:
        with reading(str(self.path)):
            return self._read(name)

    def _names(self) -> list[str]:
        more = [] if self._whole is None else self._whole.obs.columns()
        return list(dict.fromkeys([*self._obs.columns(), *more]))

    def _read(self, name: str) -> pd.Series[Any]:
        if self._whole is None or name in self._obs.columns():
            return self._obs.column(name)
        return self._whole.obs.column(name).iloc[self._whole.rows(self._obs)].reset_index(drop=True)

    @property
    def representations(self) -> list[str]:
        """Names of the matrices in obsm."""
        with reading(str(self.path)):
            more = [] if self._whole is None else self._whole.representations()
            return list(dict.fromkeys([*children(optional(self._part, "obsm")), *more]))

    @property
    def layers(self) -> list[str]:
        """Names of the layers, and raw if the file has it."""
        with reading(str(self.path)):
            return _layers(self._part)

    @property
    def gene_columns(self) -> list[str]:
        """Names of the columns of var that hold text."""
        with reading(str(self.path)):
            return [name for name in self._var.columns() if self._var.column(name).dtype.kind not in "biufcmM"]

    def _other_matrices(self) -> dict[str, Callable[[], NDArray[Any]]]:
        layers = optional(self._part, "layers")
        places = {name: partial(_some_values, layers, name) for name in children(layers)}
        raw = optional(self._part, "raw")
        for name, group, key in (("raw", raw, "X"), ("raw", self._part, "raw.X"), ("X", self._part, "X")):
            if group is not None and has(group, key):
                places.setdefault(name, partial(_some_values, group, key))
        return {name: sample for name, sample in places.items() if name != self._layer}

    def _representation(self, name: str) -> NDArray[Any]:
        with reading(str(self.path)):
            obsm = optional(self._part, "obsm")
            if self._whole is not None and (obsm is None or not has(obsm, name)):
                found = _read_matrix(child(child(self._root, "obsm"), name), name, len(self._whole.obs))
                return found[self._whole.rows(self._obs)]
            return _read_matrix(child(obsm, name), name, self.n_cells)

    def rows(self, start: int, stop: int) -> Any:
        """See :meth:`CellSource.rows`."""
        with reading(str(self.path)):
            return super().rows(start, stop)


class _Whole:
    """The part of a MuData file that all modalities share.

    Parameters
    ----------
    root
        The open file.
    name
        Name of the modality that is read.
    """

    def __init__(self, root: Any, name: str) -> None:
        if not has(root, "obs"):
            raise UnreadableFileError("The file is not a whole MuData file: it has no obs.", field="file")
        self.obs = Frame(child(root, "obs"))
        self._root, self._name = root, name

    def rows(self, obs: Frame) -> NDArray[np.intp]:
        """Row in the whole of each cell of the modality, whose obs is given, [n_cells].

        Raises
        ------
        UnreadableFileError
            The whole lacks a cell of the modality.
        """
        maps = optional(self._root, "obsmap")
        if maps is not None and has(maps, self._name):
            # For each cell of the whole its number in the modality, from 1; 0 if it is not there.
            places = values(child(maps, self._name)).ravel().astype(np.int64)
            rows = np.full(len(obs), -1, dtype=np.intp)
            inside = np.flatnonzero((places > 0) & (places <= len(obs)))
            rows[places[inside] - 1] = inside
            valid = len(places) == len(self.obs)
        else:
            import pandas as pd

            index = pd.Index(self.obs.index().astype(object))
            valid = index.is_unique
            rows = index.get_indexer(obs.index().astype(object)) if valid else np.zeros(0, dtype=np.intp)
        if not valid or (rows < 0).any():
            raise UnreadableFileError(
                f"The MuData file does not say which of its cells are those of its modality {self._name!r}. Write it "
                "again with a current mudata.",
                field="file",
            )
        return rows

    def representations(self) -> list[str]:
        """Names of the matrices in obsm; an entry with the name of a modality is a mask of cells."""
        modalities = children(child(self._root, "mod"))
        return [name for name in children(optional(self._root, "obsm")) if name not in modalities]


class Frame:
    """The obs or var of a file, read one column at a time.

    Parameters
    ----------
    node
        Group of the columns, or the compound dataset that anndata < 0.7 wrote.
    uns
        The file's uns, in which anndata < 0.7 kept the categories of columns.
    """

    def __init__(self, node: Any, uns: Any = None) -> None:
        self._node = node
        self._uns = uns
        self._compound = not is_group(node)
        names = list(node.dtype.names or ()) if self._compound else children(node)
        wanted = None if self._compound else attribute(node, "_index")
        self._index = wanted or next((name for name in ("_index", "index") if name in names), None)
        if self._index not in names:
            raise UnreadableFileError(f"{name_of(node)} has no index; the file is not an AnnData file.", field="file")
        inside = [name for name in names if name not in {self._index, "__categories"}]
        order = [] if self._compound else [str(name) for name in attribute(node, "column-order", ())]
        known = set(inside)
        self._columns = list(dict.fromkeys([*(name for name in order if name in known), *inside]))

        self._readable: list[str] | None = None

    def __len__(self) -> int:
        node = self._node if self._compound else child(self._node, str(self._index))
        # A nullable string array is a group; zarr's arrays have no len().
        return int((child(node, "values") if is_group(node) else node).shape[0])

    def index(self) -> NDArray[np.str_]:
        """Read the names of the rows."""
        return self.names().astype(np.str_)

    def names(self) -> NDArray[np.object_]:
        """Read the names of the rows, each as long as it is."""
        return self._read(str(self._index)).astype(str).to_numpy(dtype=object)

    def columns(self) -> list[str]:
        """Return the names of the columns that hold text, categories or numbers."""
        if self._readable is None:
            self._readable = [name for name in self._columns if self._is_readable(name)]
        return list(self._readable)

    def distinct(self, name: str, *, whole: bool) -> list[Any] | None:
        """Return the different values of a column of text, without reading more than is needed; None for others.

        `whole` tells whether to read all of a column that is stored as plain text, or only its ends.
        """
        if self._compound:
            return list(set(self._read_field(name))) if self._node.dtype[name].kind in "SO" and whole else None
        node = child(self._node, name)
        if not is_group(node):
            old = optional(self._node, "__categories")
            if old is not None and has(old, name):
                return list(values(child(old, name)))
            if getattr(node.dtype, "kind", "O") in "iufb":
                return None
            parts = [slice(None)] if whole or len(self) <= 2 * _ENDS else [slice(_ENDS), slice(len(self) - _ENDS, None)]
            return list({item for part in parts for item in values(node, part).tolist()})
        if "categories" in node:
            return list(values(child(node, "categories")))
        return self._read(name).dropna().unique().tolist() if child(node, "values").dtype.kind not in "iufb" else None

    def column(self, name: str) -> pd.Series[Any]:
        """Read one column. Raises UnreadableFileError if its length is not that of the index."""
        column = self._read(name)
        if len(column) != len(self):
            raise UnreadableFileError(
                f"{name_of(self._node)}/{name} has {len(column)} entries for {len(self)} rows.", field="file"
            )
        return column

    def _is_readable(self, name: str) -> bool:
        if self._compound:
            return self._node.dtype[name].kind in "iufbSO"
        node = child(self._node, name)
        if is_group(node):
            return {"codes", "categories"} <= set(node) or {"values", "mask"} <= set(node)
        return len(node.shape) == 1 and not getattr(node.dtype, "names", None)

    def _read(self, name: str) -> pd.Series[Any]:
        import pandas as pd

        if self._compound:
            return self._read_field(name)
        node = child(self._node, name)
        if not is_group(node):
            old = optional(self._node, "__categories")
            if old is not None and has(old, name):
                return _categorical(values(node), values(child(old, name)))
            return pd.Series(values(node))
        if "categories" in node:
            return _categorical(values(child(node, "codes")), values(child(node, "categories")))
        column = pd.Series(values(child(node, "values")))
        mask = values(child(node, "mask")).astype(bool)
        return column.astype(object).mask(mask, None) if mask.any() else column

    def _read_field(self, name: str) -> pd.Series[Any]:
        import pandas as pd

        field = self._node[name]
        if field.dtype.kind in "SO":
            return pd.Series([item.decode() if isinstance(item, bytes) else str(item) for item in field], dtype=object)
        categories = f"{name}_categories"
        if self._uns is not None and has(self._uns, categories):
            return _categorical(field, values(child(self._uns, categories)))
        return pd.Series(field)


def _categorical(codes: NDArray[Any], categories: NDArray[Any]) -> pd.Series[Any]:
    import pandas as pd

    return pd.Series(pd.Categorical.from_codes(codes.astype(np.int64), categories=pd.Index(categories)))


def _modality(root: Any, path: Path) -> str:
    """Return the name of a MuData file's modality of genes."""
    modalities = child(root, "mod")

    def features(name: str) -> Features:
        frame = Frame(child(child(modalities, name), "var"))
        return _features(frame, frame.index(), f"{path}: the modality {name!r}")

    return choose_modality(children(modalities), features, where=str(path))


def _features(var: Frame, identifiers: NDArray[np.str_], where: Path | str) -> Features:
    return features_of_frame(var.columns(), var.distinct, var.column, identifiers, where=str(where))


def _read_matrix(node: Any, name: str, n_cells: int) -> NDArray[Any]:
    """Read a matrix of obsm, which is called `name`, as a dense array."""
    if not is_group(node):
        return values(node)
    if attribute(node, "encoding-type") == "dataframe":
        frame = Frame(node)
        return np.column_stack([frame.column(column).to_numpy() for column in frame.columns()])
    matrix = open_matrix(node)
    if matrix.shape[0] != n_cells:
        # Before it is made dense: the shape that a damaged file declares can be anything.
        raise MalformedMatrixError(
            f"obsm[{name!r}] is of shape {matrix.shape} for {n_cells} cells; one row a cell is needed.",
            field="use_rep",
        )
    data, indices, indptr = matrix.rows(0, matrix.shape[0])
    dense = np.zeros(matrix.shape, dtype=data.dtype)
    dense[np.repeat(np.arange(len(dense)), np.diff(indptr)), indices] = data
    return dense


def _some_values(group: Any, name: str) -> NDArray[Any]:
    """Read the first values of a matrix, stored ones only of a sparse matrix."""
    node = child(group, name)
    if is_group(node):
        return np.asarray(child(node, "data")[:_SAMPLE_VALUES])
    return np.asarray(node[: max(1, _SAMPLE_VALUES // max(1, shape_of(node)[1]))]).ravel()


def find_matrix(root: Any, layer: str | None) -> tuple[Any, Any]:
    """Return the node that holds the counts, and the var that belongs to it.

    ``None`` and ``"X"`` mean X, and any other name a layer; ``"raw"`` means raw.X if no layer has that name.

    Raises
    ------
    UnreadableFileError
        X was asked for, and the file has none.
    MissingColumnError
        There is no such layer.
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
    # anndata writes an empty raw into the modalities of a MuData.
    has_raw = "X" in children(optional(root, "raw")) or optional(root, "raw.X") is not None
    return [*children(optional(root, "layers")), *(["raw"] if has_raw else [])]


def shape_of(node: Any) -> tuple[int, int]:
    """Return the numbers of cells and genes of a stored matrix."""
    shape = attribute(node, "shape", attribute(node, "h5sparse_shape")) if is_group(node) else node.shape
    if shape is None or len(shape) != 2:
        raise UnreadableFileError(f"{node.name} is not a matrix of cells x genes.", field="counts")
    return int(shape[0]), int(shape[1])


def open_matrix(node: Any) -> Rows:
    """Open a stored matrix: dense, CSR or CSC, as anndata has written them since 0.6."""
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
    """Read the gene identifiers: the index of var, or one of its columns."""
    if gene_key is None:
        return each_named(name_genes(var.names()), _columns(var))
    if gene_key not in var.columns():
        raise missing_column("column of var", gene_key, var.columns(), field="gene_key")
    return each_named(name_genes(var.column(gene_key).to_numpy()), _columns(var))


def _columns(var: Frame) -> Iterator[tuple[str, Any]]:
    return ((name, var.column(name)) for name in var.columns())
