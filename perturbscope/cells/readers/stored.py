"""Arrays of a file, fast: chunks of an HDF5 dataset unpacked outside libhdf5.

Nearly all the time of reading counts goes into unpacking deflate, which libhdf5 does with zlib and under its lock. A
chunk's bytes are therefore taken as they are stored and unpacked here, with zlib-ng (twice the speed of zlib). Only
what nearly every file is is read so: one dimension, plain numbers, shuffled or not, deflate. Anything else, and any
chunk that is not as it should be, goes through libhdf5, whose word on it counts.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

_DEFLATE, _SHUFFLE = 1, 2
"""HDF5's numbers of these filters."""
_CHUNK_VALUES = range(4096, 2**22 + 1)
"""Sizes of chunks worth it: smaller ones cost more to fetch one by one than to unpack, larger ones too much memory."""
# zlib-ng's types say that its error is an instance.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, TypeError, zlib_ng.error)  # type: ignore[assignment]
_PACKED_MORE = 1024
"""Bytes by which deflate can make a chunk larger, and more."""


class StoredArray:
    """An array of a file, read by slices of rows.

    Parameters
    ----------
    array
        A dataset of h5py, or an array of zarr (which lacks ``len()``).
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
        """The chunk that begins with row `at`, or None if libhdf5 had better read it."""
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
    """Values of a chunk, if the array is stored in the one way that is read here; otherwise 0."""
    if not hasattr(array, "id") or len(array.shape) != 1 or not array.chunks or array.dtype.kind not in "iuf":
        return 0
    if array.chunks[0] not in _CHUNK_VALUES or array.dtype.str[0] == ">" or sys.byteorder != "little":
        return 0
    plist = array.id.get_create_plist()
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    return int(array.chunks[0]) if filters in ([_DEFLATE], [_SHUFFLE, _DEFLATE]) else 0


def _unshuffled(data: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Numbers of which all first bytes come first, then all second bytes, and so on."""
    size = dtype.itemsize
    planes = np.frombuffer(data, np.uint8).reshape(size, -1)
    values = planes[0].astype(f"u{size}")
    for place in range(1, size):
        # Counts and columns are small: their upper bytes are nearly all zero.
        if planes[place].any():
            values |= planes[place].astype(values.dtype) << values.dtype.type(8 * place)
    numbers: NDArray[Any] = values.view(dtype)
    return numbers
