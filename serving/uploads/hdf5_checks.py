"""Checks of an uploaded HDF5 file before any of its data is read.

HDF5 is a file system in a file. It may point to other files, claim 2^60 numbers in a kilobyte, pack gigabytes of zeros
into one chunk, let a million entries of a column share one long string, and name filters for which a library would be
loaded. All of that shows in the file's metadata, which is read here; of the data itself, chunks that could be bombs are
unpacked piece by piece and thrown away. Damage that sends libhdf5 astray cannot be found here: files are therefore read
in a process of their own, see :mod:`serving.uploads.readers`.

The largest ratio of DEFLATE (1032 : 1) follows from RFC 1951; the sizes of LZF and of a stored string are from the HDF5
file format specification, version 3.0.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import LimitExceededError, UnreadableFileError
from serving.settings import Settings

# HDF5 reads this when it is first loaded; "::" means none: no library is ever loaded to unpack a file.
os.environ["HDF5_PLUGIN_PRELOAD"] = "::"

MAX_OBJECTS = 20_000
"""Links in a file. An AnnData file has a few for each column."""
MAX_DEPTH = 32
MAX_ATTRIBUTES = 1000
"""Attributes of one group or dataset."""
MAX_ATTRIBUTE_BYTES = 2**20
MAX_CHUNK_BYTES = 64 * 2**20
"""Bytes of one unpacked chunk: libhdf5 holds a few of them."""
MAX_CHUNKS = 1_000_000
"""Chunks of all datasets together."""
_DEFLATE, _SHUFFLE, _FLETCHER, _LZF = 1, 2, 3, 32000
_FILTERS = {_DEFLATE: "gzip", _SHUFFLE: "shuffle", _FLETCHER: "fletcher32", _LZF: "lzf"}
_MAX_LZF_CHUNK = 4 * 2**20
_HARMLESS_BYTES = 256 * 2**20
"""Bytes to which one chunk may grow at most without being unpacked here."""
_BEST_DEFLATE = 1032
_SMALL = 64 * 2**20
_TEXT_MORE = 8
"""Bytes of a stored string's entry (4 for its length, 8 + 4 for its place) beyond those of a pointer in memory."""
_TEXT = 64
"""Bytes of a string of Python beside its characters, and of its place in an array."""
_TABLES = ("/obs", "/var", "/obsm", "/varm", "/raw/var")
"""Groups whose rows are read whole, of the file or of a MuData's modality; matrices are read in pieces."""
_MODALITY = re.compile(r"^/mod/[^/]+")


def check_file(path: Path, settings: Settings) -> int:
    """Refuse a file that reaches outside of itself, or would grow beyond what the settings allow.

    Returns
    -------
    Bytes of all its datasets but those of ``uns``, unpacked, and of their texts: the least that reading them takes.

    Raises
    ------
    UnreadableFileError
        The file is not HDF5, points to other files, or uses a filter that is not built in.
    LimitExceededError
        The file has too many parts, a part that is too large, or a compression bomb.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file, path.open("rb") as raw:
            if not {"obs", "var"} <= set(file):
                raise UnreadableFileError(
                    "The file is not an .h5ad file: it has no obs and var. Write one with adata.write_h5ad().",
                    field="file",
                )
            if file.id.get_create_plist().get_sizes() != (8, 8):
                raise UnreadableFileError("The file has addresses of an unusual size; write it anew.", field="file")
            check = _Check(raw, settings, h5py)
            check.attributes("/", file.id)
            for name, item in check.items(file):
                check.attributes(name, item.id)
                if isinstance(item, h5py.Dataset):
                    check.dataset(name, item)
                else:
                    check.sparse(name, item)
            return check.n_bytes
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise UnreadableFileError(
            f"{path.name} is not a whole HDF5 file ({str(error).replace(str(path), path.name)[:300]}). "
            "It may be truncated or damaged; upload it again.",
            field="file",
        ) from error


class _Check:
    """The checks of one open file."""

    def __init__(self, raw: BinaryIO, settings: Settings, h5py: Any) -> None:
        self._raw, self._settings, self._h5py = raw, settings, h5py
        self._chunks = 0
        self.n_bytes = 0
        """Bytes of the datasets that were checked, and of their texts."""
        self._rows = max(settings.max_cells, settings.max_vectors, settings.max_genes)

    def items(self, root: Any) -> Iterator[tuple[str, Any]]:
        """Yield all groups and datasets, each once (hard links may form rings); soft links lead to no new one."""
        links = self._h5py.h5l
        pending, seen, n_objects = [("", root)], {self._h5py.h5o.get_info(root.id).addr}, 0
        while pending:
            path, group = pending.pop()
            n_objects += group.id.get_num_objs()
            if n_objects > MAX_OBJECTS or path.count("/") > MAX_DEPTH:
                raise LimitExceededError(
                    f"The file has more than {MAX_OBJECTS:,} parts, or groups nested more than {MAX_DEPTH} deep. Send "
                    "X, obs and var alone.",
                    field="file",
                )
            for name in group:
                if isinstance(name, bytes):  # h5py's answer to a name that it cannot decode
                    raise UnreadableFileError(
                        f"A part of {path or '/'} has the name {name[:40]!r}, which is not UTF-8. The file may be "
                        "damaged; write it anew with adata.write_h5ad().",
                        field="file",
                    )
                where = f"{path}/{name}"
                kind = group.id.links.get_info(name.encode("utf-8", "surrogateescape")).type
                if kind == links.TYPE_SOFT:
                    continue
                if kind != links.TYPE_HARD:
                    raise _outside(where, "an HDF5 external link")
                item = group[name]
                key = self._h5py.h5o.get_info(item.id).addr
                if key in seen:
                    continue
                seen.add(key)
                if isinstance(item, self._h5py.Group):
                    pending.append((where, item))
                if isinstance(item, (self._h5py.Group, self._h5py.Dataset)):
                    yield where, item

    def attributes(self, where: str, identifier: Any) -> None:
        """Refuse many or large attributes; anndata writes few and small ones."""
        h5a = self._h5py.h5a
        n = h5a.get_num_attrs(identifier)
        if n > MAX_ATTRIBUTES:
            raise _too_large(f"{where} has {n:,} attributes", f"{MAX_ATTRIBUTES:,}")
        for index in range(n):
            attribute = h5a.open(identifier, index=index)
            size = attribute.get_space().get_simple_extent_npoints() * attribute.get_type().get_size()
            if size > MAX_ATTRIBUTE_BYTES:
                raise _too_large(f"An attribute of {where} has {size:,} bytes", f"{MAX_ATTRIBUTE_BYTES:,}")

    def sparse(self, where: str, group: Any) -> None:
        """Refuse a sparse matrix of a table, which is made dense, if its shape is out of bounds."""
        if not _is_of_table(where) or "shape" not in group.attrs:
            return
        shape = np.asarray(group.attrs["shape"])
        if shape.dtype.kind in "iu" and float(np.prod(shape.astype(float))) > self._settings.max_values:
            raise _too_large(f"{where} is of shape {shape.tolist()}", f"{self._settings.max_values:,} values")

    def dataset(self, where: str, dataset: Any) -> None:
        """Check the place of a dataset, its size, filters, chunks and strings."""
        identifier = dataset.id
        plist = identifier.get_create_plist()
        if dataset.is_virtual or plist.get_external_count():
            raise _outside(where, "external storage or a virtual dataset")
        shape = identifier.shape
        if not shape:
            return
        stored_type = identifier.get_type()
        kind, item_bytes = stored_type.get_class(), stored_type.get_size()
        n_values = 1
        for length in shape:
            n_values *= int(length)
        self._size(where, shape, n_values, item_bytes, identifier.get_storage_size())
        # A count of one byte in a dense matrix takes eight as CSR.
        self.n_bytes += 0 if where.startswith("/uns/") else n_values * max(item_bytes, 8)
        texts = self._places_of_texts(where, stored_type)
        item_bytes += _TEXT_MORE * len(texts)
        if kind not in (self._h5py.h5t.INTEGER, self._h5py.h5t.FLOAT, self._h5py.h5t.ENUM):
            if n_values > self._rows:
                raise _too_large(f"{where} has {n_values:,} entries", f"{self._rows:,}")
            if n_values * item_bytes > self._settings.max_body_bytes:
                raise _too_large(f"{where} has {n_values * item_bytes:,} bytes", "that of a whole request")
        filters = self._filters(where, plist)
        layout = plist.get_layout()
        if layout == self._h5py.h5d.CHUNKED:
            self._check_chunks(where, identifier, plist, filters, item_bytes, texts)
        elif texts and layout != self._h5py.h5d.CONTIGUOUS:
            raise UnreadableFileError(f"{where} has texts in a compact dataset; write the file anew.", field="file")
        elif texts and identifier.get_offset() is not None:
            self._texts(where, [self._read(identifier.get_offset(), n_values * item_bytes)], texts, item_bytes)

    def _places_of_texts(self, where: str, stored_type: Any) -> list[int]:
        """Offsets of variable-length strings in an item: 0, or those of the fields of a table of anndata < 0.7."""
        h5t = self._h5py.h5t
        if stored_type.get_class() != h5t.COMPOUND:
            return [0] if stored_type.get_class() == h5t.STRING and stored_type.is_variable_str() else []
        members = [
            (stored_type.get_member_offset(i), stored_type.get_member_type(i))
            for i in range(stored_type.get_nmembers())
        ]
        if any(member.get_class() in (h5t.COMPOUND, h5t.ARRAY, h5t.VLEN) for _, member in members):
            raise UnreadableFileError(f"{where} is a table with tables inside; write the file anew.", field="file")
        offsets = sorted(at for at, member in members if member.get_class() == h5t.STRING and member.is_variable_str())
        return [at + _TEXT_MORE * number for number, at in enumerate(offsets)]

    def _size(self, where: str, shape: tuple[int, ...], n_values: int, item_bytes: int, stored: int) -> None:
        settings = self._settings
        if len(shape) == 1 and n_values > settings.max_values:
            raise LimitExceededError(
                f"{where} has {n_values:,} values; this server takes {settings.max_values:,}. "
                "Send the cells in several requests.",
                field="data",
            )
        if _is_of_table(where) and (shape[0] > self._rows or n_values > settings.max_values):
            raise _too_large(f"{where} is of shape {list(shape)}", f"{self._rows:,} rows")
        n_bytes = n_values * item_bytes
        if n_bytes > _SMALL and n_bytes > 2 * _BEST_DEFLATE * stored:
            raise _too_large(f"{where} claims {n_bytes:,} bytes and has {stored:,}", "what no compression exceeds")

    def _filters(self, where: str, plist: Any) -> dict[int, tuple[int, ...]]:
        """Return the ids of the filters, in the order of writing, with their parameters."""
        filters = [plist.get_filter(index) for index in range(plist.get_nfilters())]
        codes = [int(code) for code, *_ in filters]
        for code, _, values, name in filters:
            if code not in _FILTERS:
                shown = name.decode("ascii", "replace")[:40] or "without a name"
                raise UnreadableFileError(
                    f"{where} is compressed with filter {code} ({shown}), which this server does not load. Write the "
                    "file with adata.write_h5ad(compression='gzip').",
                    field="file",
                )
            if code == _LZF and len(values) > 2 and values[2] > _MAX_LZF_CHUNK:
                raise _too_large(f"A chunk of {where} has {values[2]:,} bytes", f"{_MAX_LZF_CHUNK:,} with lzf")
        if len(set(codes)) != len(codes) or {_DEFLATE, _LZF} <= set(codes):
            raise UnreadableFileError(f"{where} is compressed more than once; write it anew.", field="file")
        return {int(code): tuple(values) for code, _, values, _ in filters}

    def _check_chunks(
        self,
        where: str,
        identifier: Any,
        plist: Any,
        filters: dict[int, tuple[int, ...]],
        item_bytes: int,
        texts: list[int],
    ) -> None:
        whole = item_bytes
        for length in plist.get_chunk():
            whole *= int(length)
        limit = _MAX_LZF_CHUNK if _LZF in filters else MAX_CHUNK_BYTES
        if whole > limit:
            raise _too_large(f"A chunk of {where} has {whole:,} bytes", f"{limit:,}")
        self._chunks += identifier.get_num_chunks()
        if self._chunks > MAX_CHUNKS:
            raise _too_large("The file has too many chunks", f"{MAX_CHUNKS:,}")
        infos: list[Any] = []
        identifier.chunk_iter(infos.append)
        largest = whole + whole // 100 + 1024
        for info in infos:
            if info.size > largest:
                raise _too_large(f"A chunk of {where} is of {whole:,} bytes and takes {info.size:,}", "its own size")
        skipped = {code: 1 << index for index, code in enumerate(filters)}

        def unpacked(info: Any, *, keep: bool) -> bytes:
            applied = {code: values for code, values in filters.items() if not info.filter_mask & skipped[code]}
            return self._unpacked(where, info, applied, whole, keep=keep)

        if texts:
            self._texts(where, (unpacked(info, keep=True) for info in infos), texts, item_bytes)
        elif _DEFLATE in filters:
            for info in infos:
                if info.size * _BEST_DEFLATE > _HARMLESS_BYTES:
                    unpacked(info, keep=False)

    def _unpacked(self, where: str, info: Any, filters: dict[int, tuple[int, ...]], whole: int, *, keep: bool) -> bytes:
        """Unpack a chunk, which must not grow beyond `whole` bytes; the result may be empty unless `keep` is set."""
        data = self._read(info.byte_offset, info.size)
        for code in reversed(filters):
            if code == _FLETCHER:
                data = data[:-4]
            elif code == _DEFLATE:
                data = _inflated(data, whole + 4, keep=keep)
            elif code == _LZF:
                data = _from_lzf(data, whole + 4)
            elif keep and filters[code]:
                data = _unshuffled(data, filters[code][0])
            if len(data) > whole + 4:
                raise _too_large(f"A chunk of {where} unpacks to more than its {whole:,} bytes", "its own size")
        return data

    def _texts(self, where: str, parts: Iterable[bytes], places: list[int], item_bytes: int) -> None:
        """Refuse strings that, once read, together exceed a request body: entries may share one stored string.

        An item holds the length of a string in four bytes, and then its place.
        """
        total = 0
        for part in parts:
            items = np.frombuffer(part[: len(part) // item_bytes * item_bytes], dtype=np.uint8).reshape(-1, item_bytes)
            for place in places:
                lengths = np.ascontiguousarray(items[:, place : place + 4]).view("<u4")
                total += int(lengths.sum(dtype=np.int64))
            self.n_bytes += len(places) * _TEXT * len(items)
            if total > self._settings.max_body_bytes:
                raise _too_large(f"The texts of {where} have more than {total:,} bytes", "that of a whole request")
        self.n_bytes += total

    def _read(self, offset: int, size: int) -> bytes:
        self._raw.seek(offset)
        return self._raw.read(size)


def _is_of_table(where: str) -> bool:
    """Return whether a part of the file is of a table that is read whole."""
    return _MODALITY.sub("", where).startswith((*_TABLES, "/obsmap"))


def _inflated(data: bytes, limit: int, *, keep: bool) -> bytes:
    """Unpack DEFLATE in pieces; beyond `limit` bytes, stop and return `limit` + 1 zeros."""
    unpacker, parts, size = zlib.decompressobj(), [], 0
    pending = data
    with suppress(zlib.error):  # damage is for the reader to find, whose message for it is better
        while pending and size <= limit and not unpacker.eof:
            part = unpacker.decompress(pending, 2**20)
            size += len(part)
            pending = unpacker.unconsumed_tail
            if keep:
                parts.append(part)
    return bytes(limit + 1) if size > limit else b"".join(parts)


def _from_lzf(data: bytes, limit: int) -> bytes:
    """Unpack LZF: runs of bytes, and references to bytes before."""
    out, at = bytearray(), 0
    with suppress(IndexError):
        while at < len(data) and len(out) <= limit:
            control = data[at]
            at += 1
            if control < 32:
                out += data[at : at + control + 1]
                at += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += data[at]
                at += 1
            start = len(out) - ((control & 31) << 8) - data[at] - 1
            at += 1
            if start < 0:
                break
            for position in range(start, start + length + 2):
                out.append(out[position])
    return bytes(out)


def _unshuffled(data: bytes, item_bytes: int) -> bytes:
    """Undo HDF5's shuffle: first bytes of all items, then second bytes, and so on; a rest stays at the end."""
    n = len(data) // max(1, item_bytes)
    if n == 0:
        return data
    grouped: NDArray[np.uint8] = np.frombuffer(data[: n * item_bytes], dtype=np.uint8).reshape(item_bytes, n)
    return grouped.T.tobytes() + data[n * item_bytes :]


def _outside(where: str, how: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{where} lies outside of the file ({how}). Write the file anew with adata.write_h5ad().", field="file"
    )


def _too_large(what: str, limit: str) -> LimitExceededError:
    return LimitExceededError(f"{what}; the limit is {limit}. Write the file anew, or send less.", field="file")
