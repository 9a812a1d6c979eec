"""The nodes of HDF5 and zarr files: groups, attributes and arrays.

The groups and arrays of h5py and zarr look alike, so one code reads both. Nothing here unpickles: arrays hold text or
numbers, and anything else is refused. A file cannot point outside itself: external links, external storage and virtual
datasets are refused too, since a server reads files that strangers send.

Nearly all the time of reading counts goes into unpacking deflate, which libhdf5 does with zlib and under its lock.
:class:`StoredArray` therefore takes a chunk's bytes as they are stored and unpacks them with zlib-ng (twice the speed
of zlib), for the layout that nearly every file has: one dimension, plain numbers, deflate, shuffled or not. libhdf5
reads anything else, and decides about any chunk that does not unpack as it should.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from perturbscope.errors import PerturbScopeError, UnreadableFileError

_DEFLATE, _SHUFFLE = 1, 2
"""Numbers of these filters in HDF5."""
_CHUNK_VALUES = range(4096, 2**22 + 1)
"""Values of chunks that are unpacked here: smaller ones take longer to fetch than to unpack, larger ones take much
memory."""
# zlib-ng's types say that its error is an instance.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, TypeError, zlib_ng.error)  # type: ignore[assignment]
_PACKED_MORE = 1024
"""Bytes by which deflate can make a chunk larger, and more."""
_BROKEN_FILE = (
    *(OSError, EOFError, MemoryError, RuntimeError, ArithmeticError),
    *(LookupError, ValueError, TypeError, AttributeError),
    *(zlib.error, csv.Error),
)
"""Errors that h5py, zarr, scipy and numpy raise for a file that is not what it claims to be."""


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


def open_zarr(path: Path) -> Any:
    """Open the root group of a zarr store for reading."""
    try:
        import zarr
    except ImportError as error:
        raise UnreadableFileError(
            f"{path} is a zarr store; reading it needs the zarr package (pip install zarr).", field="file"
        ) from error
    with reading(path):
        return zarr.open_group(path, mode="r")


def is_zarr(path: Path) -> bool:
    """Return whether a directory is a zarr group of version 2 or 3."""
    try:
        if (path / "zarr.json").is_file():
            return bool(json.loads((path / "zarr.json").read_text(encoding="utf-8"))["node_type"] == "group")
        return (path / ".zgroup").is_file()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def is_group(node: Any) -> bool:
    """Return whether a node of a file is a group."""
    return hasattr(node, "keys")


def child(group: Any, name: str) -> Any:
    """Return a node of a group.

    Raises
    ------
    UnreadableFileError
        The node does not exist, points outside the file, or would have to be unpickled.
    """
    if not has(group, name):
        raise UnreadableFileError(
            f"The file has no {name_of(group)}/{name}; it is not complete, or of another layout.", field="file"
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
                f"{name_of(group)}/{name} is stored as pickled objects, which are never loaded. "
                "Write the file again with a current anndata.",
                field="file",
            )
    return node


def has(group: Any, name: str) -> bool:
    """Return whether a group has a node of that name; a link out of the file is refused without being followed."""
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
    """Return the names of a group's nodes; an empty list if `group` is not a group."""
    return list(group.keys()) if is_group(group) else []


def optional(group: Any, name: str) -> Any | None:
    """Return a node of a group, or None if it does not exist."""
    return child(group, name) if has(group, name) else None


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """Return an attribute of a node; bytes are decoded."""
    value = node.attrs.get(name, default)
    return value.decode() if isinstance(value, bytes) else value


def values(array: Any, rows: Any = ...) -> NDArray[Any]:
    """Read all values of an array, or a slice of its rows; text as an object array of str.

    Raises
    ------
    UnreadableFileError
        The values are neither numbers nor text.
    """
    dtype = array.dtype
    kind = getattr(dtype, "kind", "O")
    if kind in "iufb" and not getattr(dtype, "names", None):
        return np.asarray(array[rows])
    if kind == "S" and hasattr(array, "asstr"):
        return np.asarray(array.asstr()[rows], dtype=object)
    if hasattr(array, "asstr"):
        import h5py

        if h5py.check_string_dtype(dtype) is None:
            raise UnreadableFileError(f"{name_of(array)} holds neither numbers nor text ({dtype}).", field="file")
        return np.asarray(array.asstr()[rows], dtype=object)
    found = np.asarray(array[rows])
    if found.dtype.kind == "S":
        return np.char.decode(found, "utf-8").astype(object)
    found = found.astype(object)
    if not all(isinstance(item, str) or item is None for item in found.ravel()):
        raise UnreadableFileError(f"{name_of(array)} holds neither numbers nor text ({dtype}).", field="file")
    return found


def name_of(node: Any) -> str:
    """Return the path of a node inside its file, for messages."""
    return str(node.name or "").rstrip("/")


def _outside(group: Any, name: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{name_of(group)}/{name} points outside the file, which is not allowed. Copy the data into the file.",
        field="file",
    )


class StoredArray:
    """An array of a file, read in slices of rows.

    Parameters
    ----------
    array
        Dataset of h5py, or array of zarr (which lacks ``len()``).
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype = array.dtype
        self._unpacked: tuple[int, NDArray[Any]] = (-1, np.zeros(0, self.dtype))
        self._chunk = _chunk_values(array)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        start, stop, step = rows.indices(len(self))
        if not self._chunk or step != 1 or stop <= start:
            return np.asarray(self._array[rows])
        values = np.empty(stop - start, dtype=self.dtype)
        for number in range(start // self._chunk, math.ceil(stop / self._chunk)):
            at = number * self._chunk
            unpacked = self._read_chunk(at)
            if unpacked is None:
                return np.asarray(self._array[rows])
            first, last = max(at, start), min(at + self._chunk, stop)
            values[first - start : last - start] = unpacked[first - at : last - at]
            if last == stop:
                # The next slice usually begins in the chunk where this one ends.
                self._unpacked = (at, unpacked)
        return values

    def _read_chunk(self, at: int) -> NDArray[Any] | None:
        """Unpack the chunk that begins with row `at`; None if libhdf5 must read it."""
        kept, unpacked = self._unpacked
        if kept == at:
            return unpacked
        size = self._chunk * self.dtype.itemsize
        try:
            stored = self._array.id.get_chunk_info_by_coord((at,))
            if stored.byte_offset is None or stored.filter_mask or stored.size > size + size // 8 + _PACKED_MORE:
                return None
            unpacker = zlib_ng.decompressobj()
            data = unpacker.decompress(self._array.id.read_direct_chunk((at,))[1], size + 1)
        except _UNREADABLE:
            return None
        if len(data) != size or not unpacker.eof:
            return None
        return _unshuffled(data, self.dtype) if self._array.shuffle else np.frombuffer(data, self.dtype)


def _chunk_values(array: Any) -> int:
    """Return the number of values of a chunk if the array has the layout that is unpacked here; otherwise 0."""
    if not hasattr(array, "id") or len(array.shape) != 1 or not array.chunks or array.dtype.kind not in "iuf":
        return 0
    if array.chunks[0] not in _CHUNK_VALUES or array.dtype.str[0] == ">" or sys.byteorder != "little":
        return 0
    plist = array.id.get_create_plist()
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    return int(array.chunks[0]) if filters in ([_DEFLATE], [_SHUFFLE, _DEFLATE]) else 0


def _unshuffled(data: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Undo HDF5's shuffle filter, which stores the first bytes of all numbers, then all second bytes, and so on."""
    size = dtype.itemsize
    planes = np.frombuffer(data, np.uint8).reshape(size, -1)
    values = planes[0].astype(f"u{size}")
    for place in range(1, size):
        # Counts and columns are small: their upper bytes are nearly all zero.
        if planes[place].any():
            values |= planes[place].astype(values.dtype) << values.dtype.type(8 * place)
    numbers: NDArray[Any] = values.view(dtype)
    return numbers
