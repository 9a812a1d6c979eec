"""Reading and writing Arrow IPC streams; what is read is not trusted."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from perturbscope.errors import UnreadableFileError
from perturbscope.wire import fields as check

KEY = b"perturbscope"
"""Where the schema's metadata holds what is not a column."""
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_FAILURES = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, struct.error)
# Slots of the flatbuffer tables of the Arrow format (Message.fbs).
_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER, _DICTIONARY_BATCH_DATA, _RECORD_BATCH_COMPRESSION = 1, 2, 1, 3
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


def write_stream(columns: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    """One batch with these columns, and `meta` as JSON in the schema's metadata."""
    table = pa.table(dict(columns)).replace_schema_metadata({KEY: check.dump_json(meta).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body: bytes = sink.getvalue().to_pybytes()
    return body


def read_stream(body: bytes) -> tuple[pa.Table, Any]:
    """The table and the parsed metadata of a stream.

    Raises
    ------
    UnreadableFileError
        Not an Arrow stream, cut off, damaged, or compressed.
    """
    if not body.endswith(_END):
        raise UnreadableFileError(
            "The body is not an Arrow IPC stream, or is cut off: it lacks the end-of-stream mark. Write it with an IPC "
            "stream writer (not as a file), and close the writer.",
            field="body",
        )
    try:
        _refuse_compression(body)
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        # Without the full check, offsets that point outside of their buffers would be followed.
        table.validate(full=True)
        table.column_names  # noqa: B018  (decodes the names, which are not checked to be UTF-8)
    except _FAILURES as error:
        raise UnreadableFileError(f"The Arrow stream cannot be read: {str(error)[:200]}", field="body") from error
    metadata = table.schema.metadata or {}
    if KEY not in metadata:
        raise UnreadableFileError(
            "The Arrow schema's metadata has no key 'perturbscope' with the request as JSON.", field="metadata"
        )
    return table, check.parse_json(metadata[KEY], "metadata")


def _refuse_compression(body: bytes) -> None:
    """Raise for compressed batches: a megabyte of them can claim any amount of memory."""
    with pa.BufferReader(body) as source:
        for message in pa.ipc.MessageReader.open_stream(source):
            data = message.metadata.to_pybytes()
            table = _reference(data, 0)
            at = _slot(data, table, _MESSAGE_HEADER_TYPE)
            kind = data[at] if at else 0
            batch = _follow(data, table, _MESSAGE_HEADER)
            if kind == _DICTIONARY_BATCH:
                batch = _follow(data, batch, _DICTIONARY_BATCH_DATA)
            elif kind != _RECORD_BATCH:
                continue
            if batch and _slot(data, batch, _RECORD_BATCH_COMPRESSION):
                raise UnreadableFileError(
                    "The Arrow stream is compressed. Write it without compression (the default of pyarrow).",
                    field="body",
                )


def _reference(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def _slot(data: bytes, table: int, number: int) -> int:
    """Place of a field of a flatbuffer table, 0 where it has its default."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    size = int(struct.unpack_from("<H", data, vtable)[0])
    at = 4 + 2 * number
    offset = int(struct.unpack_from("<H", data, vtable + at)[0]) if at + 2 <= size else 0
    return table + offset if offset else 0


def _follow(data: bytes, table: int, number: int) -> int:
    at = _slot(data, table, number) if table else 0
    return _reference(data, at) if at else 0
