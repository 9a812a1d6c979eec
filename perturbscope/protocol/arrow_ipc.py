"""Reading and writing of Arrow IPC streams; input is not trusted."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from perturbscope.errors import UnreadableFileError
from perturbscope.protocol import checks as check

KEY = b"perturbscope"
"""Key of the schema's metadata for everything that is not a column."""
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The end-of-stream mark."""
FAILURES = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError, struct.error)
"""Errors that reading hostile bytes may raise."""
# Slots of the flatbuffer tables of the Arrow format (Message.fbs).
_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER, _MESSAGE_BODY_LENGTH = 1, 2, 3
_DICTIONARY_ID, _DICTIONARY_BATCH_DATA, _DICTIONARY_IS_DELTA = 0, 1, 2
_RECORD_BATCH_LENGTH, _RECORD_BATCH_COMPRESSION = 0, 3
SCHEMA, RECORD_BATCH = 1, 3
"""Kinds of messages."""
_DICTIONARY_BATCH = 2

MAX_MESSAGES = 10_000
"""Batches of one body; each takes some kilobytes, however few its rows are."""
_COPIES = 4
"""Bytes that the versions of growing dictionaries may take together, for each byte of the body."""


def write_stream(columns: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    """Write one batch of these columns, with `meta` as JSON in the schema's metadata."""
    table = pa.table(dict(columns)).replace_schema_metadata({KEY: check.dump_json(meta).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body: bytes = sink.getvalue().to_pybytes()
    return body


def read_stream(body: bytes) -> tuple[pa.Table, Any]:
    """Read the table and the parsed metadata of a stream.

    Raises
    ------
    UnreadableFileError
        The body is not an Arrow stream, is cut off, damaged or compressed, or has no metadata.
    """
    if not body.endswith(END):
        raise UnreadableFileError(
            "The body is not an Arrow IPC stream, or is cut off: it lacks the end-of-stream mark. Write it with an IPC "
            "stream writer (not as a file), and close the writer.",
            field="body",
        )
    try:
        _check_messages(body)
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        check_rows(table.num_rows, len(body))
        # Without the full check, offsets that point outside of their buffers would be followed.
        table.validate(full=True)
        table.column_names  # noqa: B018  (decodes the names, which are not checked to be UTF-8)
    except FAILURES as error:
        raise UnreadableFileError(f"The Arrow stream cannot be read: {str(error)[:200]}", field="body") from error
    metadata = table.schema.metadata or {}
    if KEY not in metadata:
        raise UnreadableFileError(
            "The Arrow schema's metadata has no key 'perturbscope' with the request as JSON.", field="metadata"
        )
    return table, check.parse_request(metadata[KEY], "metadata")


def check_rows(n_rows: int, n_bytes: int) -> None:
    """Refuse rows that take no bytes: a column of nulls, or of lists of nothing, can claim any number of them.

    Raises
    ------
    UnreadableFileError
        There are more rows than bytes.
    """
    if n_rows > n_bytes:
        raise UnreadableFileError(
            f"The Arrow stream claims {n_rows:,} rows in {n_bytes:,} bytes. Write one row a cell.", field="body"
        )


def _check_messages(body: bytes) -> None:
    """Refuse batches that take more than their bytes: compressed, in great number, or with a dictionary that grows."""
    growing = 0
    dictionaries: dict[int, int] = {}
    with pa.BufferReader(body) as source:
        for number, message in enumerate(pa.ipc.MessageReader.open_stream(source)):
            if number > MAX_MESSAGES:
                raise UnreadableFileError(
                    f"The Arrow stream has more than {MAX_MESSAGES:,} batches. Write more rows into each.", field="body"
                )
            data = message.metadata.to_pybytes()
            refuse_compressed(data)
            if message_kind(data) == _DICTIONARY_BATCH:
                identifier, is_delta = _dictionary(data)
                before = dictionaries.get(identifier, 0) if is_delta else 0
                dictionaries[identifier] = before + body_length(data)
                # Each version is a copy of all before it.
                growing += before
                if growing > _COPIES * len(body):
                    raise UnreadableFileError(
                        "The Arrow stream has a dictionary that grows too often. Write it whole, without deltas (the "
                        "default of pyarrow).",
                        field="body",
                    )


def claims(body: bytes) -> tuple[bytes, int]:
    """Return the metadata of the first message, its JSON in it, and the number of rows that all batches claim.

    It reads nothing else, so what a stream will take can be estimated before it is decoded. Of a stream that cannot be
    read, it returns what it found before.
    """
    head, n_rows = b"", 0
    with contextlib.suppress(*FAILURES), pa.BufferReader(body) as source:
        for message in pa.ipc.MessageReader.open_stream(source):
            data = message.metadata.to_pybytes()
            if message_kind(data) == SCHEMA:
                head = head or data
            elif message_kind(data) == RECORD_BATCH:
                batch = _follow(data, _reference(data, 0), _MESSAGE_HEADER)
                at = _slot(data, batch, _RECORD_BATCH_LENGTH)
                n_rows += max(0, int(struct.unpack_from("<q", data, at)[0])) if at else 0
    return head, n_rows


def _dictionary(data: bytes) -> tuple[int, bool]:
    """Return the number of a dictionary, and whether its entries are added to those before."""
    batch = _follow(data, _reference(data, 0), _MESSAGE_HEADER)
    number, delta = (_slot(data, batch, slot) for slot in (_DICTIONARY_ID, _DICTIONARY_IS_DELTA))
    return int(struct.unpack_from("<q", data, number)[0]) if number else 0, bool(delta and data[delta])


def message_kind(data: bytes) -> int:
    """Return the kind of the message with this metadata, for instance :data:`SCHEMA` or :data:`RECORD_BATCH`."""
    at = _slot(data, _reference(data, 0), _MESSAGE_HEADER_TYPE)
    return data[at] if at else 0


def body_length(data: bytes) -> int:
    """Return the number of bytes of a message's body that its metadata claims; it may be negative."""
    at = _slot(data, _reference(data, 0), _MESSAGE_BODY_LENGTH)
    return int(struct.unpack_from("<q", data, at)[0]) if at else 0


def refuse_compressed(data: bytes) -> None:
    """Raise UnreadableFileError if this is the metadata of a compressed batch."""
    kind = message_kind(data)
    batch = _follow(data, _reference(data, 0), _MESSAGE_HEADER)
    if kind == _DICTIONARY_BATCH:
        batch = _follow(data, batch, _DICTIONARY_BATCH_DATA)
    elif kind != RECORD_BATCH:
        return
    if batch and _slot(data, batch, _RECORD_BATCH_COMPRESSION):
        raise UnreadableFileError(
            "The Arrow stream is compressed. Write it without compression (the default of pyarrow).", field="body"
        )


def _reference(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def _slot(data: bytes, table: int, number: int) -> int:
    """Return the place of a field in a flatbuffer table; 0 if the field has its default."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    size = int(struct.unpack_from("<H", data, vtable)[0])
    at = 4 + 2 * number
    offset = int(struct.unpack_from("<H", data, vtable + at)[0]) if at + 2 <= size else 0
    return table + offset if offset else 0


def _follow(data: bytes, table: int, number: int) -> int:
    at = _slot(data, table, number) if table else 0
    return _reference(data, at) if at else 0
