"""The parts of HDF5 and zarr that annotated matrices are made of: strings, columns, frames.

Both libraries give groups and arrays with the same manners, so one code reads both. Nothing here unpickles: columns are
strings, categories or numbers, and anything else is refused. A file cannot point outside itself: external links,
external storage and virtual datasets are refused too, since a server reads files that strangers send.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import PerturbScopeError, UnreadableFileError

if TYPE_CHECKING:
    import pandas as pd

_BROKEN_FILE = (
    *(OSError, EOFError, MemoryError, RuntimeError, ArithmeticError),
    *(LookupError, ValueError, TypeError, AttributeError),
    *(zlib.error, csv.Error),
)
"""What h5py, zarr, scipy and numpy raise when a file is not what it claims to be."""


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into :class:`UnreadableFileError`."""
    try:
        yield
    except PerturbScopeError:
        raise
    except _BROKEN_FILE as error:
        reason = " ".join(str(error).strip("'\"").split()) or type(error).__name__
        raise UnreadableFileError(
            f"{path} cannot be read: {reason[:300].rstrip('.')}. The file may be truncated or damaged; "
            "fetch or write it again.",
            field="file",
        ) from error


def is_group(node: Any) -> bool:
    """Whether a node of a file is a group."""
    return hasattr(node, "keys")


def child(group: Any, name: str) -> Any:
    """A node of a group.

    Raises
    ------
    UnreadableFileError
        It does not exist, points outside the file, or would have to be unpickled.
    """
    if not has(group, name):
        raise UnreadableFileError(
            f"The file has no {_name(group)}/{name}; it is not complete, or of another layout.", field="file"
        )
    node = group[name]
    if hasattr(node, "id"):
        if not is_group(node) and (node.is_virtual or node.external):
            raise _outside(group, name)
        return node
    if not is_group(node):
        described = node.metadata.to_dict()
        coding = json.dumps([described.get(key) for key in ("filters", "compressor", "codecs")], default=str)
        if "pickle" in coding:
            raise UnreadableFileError(
                f"{_name(group)}/{name} is stored as pickled objects, which are never loaded. "
                "Write the file again with a current anndata.",
                field="file",
            )
    return node


def has(group: Any, name: str) -> bool:
    """Whether a group has a node of that name; a link to elsewhere is refused without being followed."""
    if not hasattr(group, "id"):
        return name in group
    import h5py

    links = group.id.links
    if not links.exists(name.encode()):
        return False
    if links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise _outside(group, name)
    return True


def children(group: Any) -> list[str]:
    """Names of a group's nodes; none where there is no group."""
    return list(group.keys()) if is_group(group) else []


def optional(group: Any, name: str) -> Any | None:
    """A node of a group, or None."""
    return child(group, name) if has(group, name) else None


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute, text as str."""
    value = node.attrs.get(name, default)
    return value.decode() if isinstance(value, bytes) else value


def values(array: Any) -> NDArray[Any]:
    """All values of an array; text as str objects.

    Raises
    ------
    UnreadableFileError
        The values are neither numbers nor text.
    """
    dtype = array.dtype
    kind = getattr(dtype, "kind", "O")
    if kind in "iufb" and not getattr(dtype, "names", None):
        return np.asarray(array[...])
    if kind == "S" and hasattr(array, "asstr"):
        return np.asarray(array.asstr()[...], dtype=object)
    if hasattr(array, "asstr"):
        import h5py

        if h5py.check_string_dtype(dtype) is None:
            raise UnreadableFileError(f"{_name(array)} holds neither numbers nor text ({dtype}).", field="file")
        return np.asarray(array.asstr()[...], dtype=object)
    found = np.asarray(array[...])
    if found.dtype.kind == "S":
        return np.char.decode(found, "utf-8").astype(object)
    found = found.astype(object)
    if not all(isinstance(item, str) or item is None for item in found.ravel()):
        raise UnreadableFileError(f"{_name(array)} holds neither numbers nor text ({dtype}).", field="file")
    return found


class Frame:
    """obs or var of a file, read one column at a time.

    Parameters
    ----------
    node
        The group, or the compound dataset that anndata < 0.7 wrote.
    uns
        The file's uns, where anndata < 0.7 kept the categories of its columns.
    """

    def __init__(self, node: Any, uns: Any = None) -> None:
        self._node = node
        self._uns = uns
        self._compound = not is_group(node)
        names = list(node.dtype.names or ()) if self._compound else children(node)
        wanted = None if self._compound else attribute(node, "_index")
        self._index = wanted or next((name for name in ("_index", "index") if name in names), None)
        if self._index not in names:
            raise UnreadableFileError(f"{_name(node)} has no index; the file is not an AnnData file.", field="file")
        inside = [name for name in names if name not in {self._index, "__categories"}]
        order = [] if self._compound else [str(name) for name in attribute(node, "column-order", ())]
        self._columns = [name for name in order if name in inside] + [name for name in inside if name not in order]

    def __len__(self) -> int:
        node = self._node if self._compound else child(self._node, str(self._index))
        # A nullable string array is a group; zarr's arrays have no len().
        return int((child(node, "values") if is_group(node) else node).shape[0])

    def index(self) -> NDArray[np.str_]:
        """The names of the rows."""
        return self._read(str(self._index)).astype(str).to_numpy().astype(np.str_)

    def columns(self) -> list[str]:
        """Columns that hold text, categories or numbers."""
        return [name for name in self._columns if self._is_readable(name)]

    def column(self, name: str) -> pd.Series[Any]:
        """One column."""
        column = self._read(name)
        if len(column) != len(self):
            raise UnreadableFileError(
                f"{_name(self._node)}/{name} has {len(column)} entries for {len(self)} rows.", field="file"
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


def _name(node: Any) -> str:
    return str(node.name or "").rstrip("/")


def _outside(group: Any, name: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{_name(group)}/{name} points outside the file, which is not allowed. Copy the data into the file.",
        field="file",
    )
