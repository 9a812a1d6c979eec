"""Mutations of valid messages: of their bytes, and of their structure, so that most still parse and reach our checks.

All take a :class:`random.Random`, so that a seed reproduces an input.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow as pa

from perturbscope.errors import UnreadableFileError
from perturbscope.protocol.arrow_ipc import KEY, check_rows

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    5e-324,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**400,
    "",
    " ",
    "control",
    "ENSG00000000003",
    "x" * 600,
    "\0",
    "\ud800",
    "\u202e",
    [],
    {},
    [[]],
    [None],
    [[[[[[1]]]]]],
    {"": ""},
    "NaN",
]
"""Values that are legal JSON, and rarely valid for a field."""
_UNFIT = (
    UnreadableFileError,
    pa.ArrowException,
    OSError,
    ValueError,
    TypeError,
    OverflowError,
    KeyError,
    IndexError,
    RecursionError,
)
"""Errors of a stream that is no longer a table, or a table that this change does not fit."""
_NUMBERS = [0, 1, 2, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Make one to four small changes anywhere."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 32, max(1, len(found) // 4)))
        match rng.randrange(8):
            case 0 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = found[at : at + length]
            case 3:
                found[at:at] = rng.randbytes(length)
            case 4:
                found[at : at + 4] = struct.pack("<I", rng.choice(_NUMBERS) & 0xFFFFFFFF)
            case 5:
                found[at : at + 8] = struct.pack("<Q", rng.choice(_NUMBERS))
            case 6:
                del found[at:]
            case _:
                other = rng.randrange(len(found) + 1)
                found[at : at + length] = found[other : other + length]
    return bytes(found)


def mutate_json(data: bytes, rng: Random) -> bytes:
    """Replace, remove, repeat or exchange one to three values, or sometimes change bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    try:
        value = json.loads(data)
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = mutate_value(value, rng)
        return json.dumps(value).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)


def mutate_value(value: Any, rng: Random) -> Any:
    """Change one place inside a JSON value."""
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return rng.choice(ODD)
    # Most places are numbers of long lists: choose a depth first, so that whole fields change as often.
    depth = rng.choice(sorted({len(path) for path in places}))
    path = rng.choice([item for item in places if len(item) == depth])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    match rng.randrange(7):
        case 0 | 1:
            parent[key] = rng.choice(ODD)
        case 2:
            del parent[key]
        case 3 if isinstance(parent, list):
            parent[key:key] = [parent[key]] * rng.choice((1, 2, 100))
        case 3:
            parent[f"{key}x"] = parent[key]
        case 4 if isinstance(parent[key], list):
            parent[key] = parent[key][: rng.randrange(len(parent[key]) + 1)] * rng.choice((0, 1, 2))
        case 4 if isinstance(parent[key], (int, float)) and abs(parent[key]) < 2**100:
            parent[key] = parent[key] * rng.choice((-1, 0.5, 2, 10**9, 10**18))
        case 5:
            other = rng.choice(places)
            source = value
            for step in other:
                source = source[step]
            parent[key] = json.loads(json.dumps(source))
        case _:
            parent[key] = [parent[key]]
    return value


def mutate_arrow(data: bytes, rng: Random) -> bytes:
    """Drop, rename, cast, cut or null a column, change metadata, or sometimes change bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    try:
        with pa.ipc.open_stream(data) as reader:
            table = reader.read_all()
        check_rows(table.num_rows, len(data))
        table.validate(full=True)  # pyarrow follows offsets that point nowhere
        sink = pa.BufferOutputStream()
        table = _other_table(table, rng)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=rng.choice((None, 1, 3)))
        return bytes(sink.getvalue().to_pybytes())
    except _UNFIT:
        return mutate_bytes(data, rng)


def _other_table(table: pa.Table, rng: Random) -> pa.Table:
    at = rng.randrange(table.num_columns)
    name, column = table.column_names[at], table.column(at)
    types = [pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.string(), pa.bool_(), pa.null()]
    match rng.randrange(8):
        case 0:
            return table.drop_columns([name])
        case 1:
            return table.rename_columns(
                [rng.choice(table.column_names) if n == name else n for n in table.column_names]
            )
        case 2:
            lists = pa.types.is_list(column.type)
            kind = rng.choice(types)
            return table.set_column(at, name, column.cast(pa.list_(kind) if lists else kind, safe=False))
        case 3:
            return table.slice(rng.randrange(table.num_rows + 1), rng.randrange(table.num_rows + 1))
        case 4:
            values = column.to_pylist()
            values[rng.randrange(len(values))] = None
            return table.set_column(at, name, pa.array(values, column.type))
        case 5:
            values = mutate_value(column.to_pylist(), rng)
            return table.set_column(at, name, pa.array(values))
        case 6:
            return table.set_column(at, name, column.dictionary_encode())
        case _:
            meta = dict(table.schema.metadata or {})
            meta[KEY] = mutate_json(meta.get(KEY, b"{}"), rng)
            return table.replace_schema_metadata(meta)


def mutate_proto(kind: Any) -> Callable[[bytes, Random], bytes]:
    """Return a mutator of messages of `kind`: it changes, clears or repeats a field, or sometimes changes bytes."""

    def mutate(data: bytes, rng: Random) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(data, rng)
        try:
            message = kind.FromString(data)
            for _ in range(rng.choice((1, 1, 2, 3))):
                _other_field(message, rng)
            return bytes(message.SerializeToString())
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return mutate_bytes(data, rng)
        except Exception as error:
            if type(error).__name__ != "DecodeError":
                raise
            return mutate_bytes(data, rng)

    return mutate


def _other_field(message: Any, rng: Random) -> None:
    found = message.ListFields()
    if not found or rng.random() < 0.05:
        message.Clear()
        return
    descriptor, value = rng.choice(found)
    name = descriptor.name
    if rng.random() < 0.15:
        message.ClearField(name)
    elif hasattr(value, "ListFields"):
        _other_field(value, rng)
    elif isinstance(value, bytes):
        # Values of whole numbers of bytes still decode, and reach the checks behind.
        changed = bytearray(value)
        at = rng.randrange(len(changed) // 8 + 1) * 8
        changed[at : at + 8] = struct.pack("<q", rng.choice(_NUMBERS[:-2]) * rng.choice((1, -1)))
        setattr(message, name, rng.choice((bytes(changed), value[:at], value * 2, mutate_bytes(value, rng))))
    elif hasattr(value, "extend") and len(value):
        at = rng.randrange(len(value))
        if hasattr(value[at], "ListFields"):
            _other_field(value[at], rng)
        elif isinstance(value[at], str):
            value[at] = rng.choice(("", "x" * 600, "\0", value[0], "control"))
        else:
            del value[at:]
        if rng.random() < 0.3:
            value.extend(list(value)[: rng.choice((1, 2, 100))])
    elif isinstance(value, str):
        setattr(message, name, rng.choice(("", "x" * 600, "\0", "\u202e", value * 2)))
    elif isinstance(value, bool):
        setattr(message, name, not value)
    else:
        setattr(message, name, type(value)(rng.choice((-1, 0, 1, 7, 2**31 - 1, 2**63 - 1))))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Return the paths of all values inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))
