"""The memory that a protobuf message will take, from its bytes, before it is decoded.

Numbers in a `bytes` field take what they take on the wire. But an empty message inside another is two bytes there, and
a hundred times that in memory; so the items are counted first, without making any of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

MESSAGE, TEXT, NUMBER, UNKNOWN = 256, 128, 64, 32
"""Bytes of memory that an item takes beside its own: a message in a list or a map, a string in a list, a number in a
list, and a field that the message does not have. Measured with Python's lists of them: 244, 70, 48 and 22."""
_INSIDE = 16
"""Bytes of memory for each byte of a message without lists and arrays; measured at most 65 for four bytes."""
_DEEPEST = 100
"""Messages within messages that protobuf decodes."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRES = {
    FieldDescriptor.TYPE_STRING: _BYTES,
    FieldDescriptor.TYPE_BYTES: _BYTES,
    FieldDescriptor.TYPE_MESSAGE: _BYTES,
    FieldDescriptor.TYPE_FIXED64: _FIXED64,
    FieldDescriptor.TYPE_SFIXED64: _FIXED64,
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_FIXED32: _FIXED32,
    FieldDescriptor.TYPE_SFIXED32: _FIXED32,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
}


class _Plan(NamedTuple):
    """What the fields of a message cost, by their tags."""

    whole: dict[int, tuple[int, int]]
    """Fields whose inside is not looked at: the price of an item, and of each of its bytes."""
    inner: dict[int, Descriptor]
    """Fields that are messages with lists or arrays."""
    packed: dict[int, int]
    """Lists of numbers that stand together: bytes of one number, or 0 for as many as it needs."""
    single: dict[int, int]
    """Prices of numbers."""


def weigh(data: bytes, kind: Descriptor, most: int) -> int:
    """Estimate the memory that the items of a message take, beside its bytes.

    Parameters
    ----------
    data
        The message as it was sent.
    kind
        Description of the message.
    most
        Bytes beyond which it is not counted on.

    Returns
    -------
    int
        Bytes, at least those that decoding the message and reading its lists takes.

    Raises
    ------
    DecodeError
        The bytes are no message.
    """
    try:
        return _weigh(data, 0, len(data), kind, most, 0)
    except IndexError:
        raise DecodeError("it is cut off") from None


@functools.cache
def _plan(kind: Descriptor) -> _Plan:
    plan = _Plan({}, {}, {}, {})
    for field in kind.fields:
        wire = _WIRES.get(field.type, _VARINT)
        tag, together = field.number << 3 | wire, field.number << 3 | _BYTES
        if field.message_type is not None:
            if _is_small(field.message_type, 0):
                plan.whole[tag] = (MESSAGE, _INSIDE)
            else:
                plan.inner[tag] = field.message_type
        elif wire == _BYTES:
            plan.whole[tag] = (TEXT if field.is_repeated else 0, 0)
        elif field.is_repeated:
            plan.single[tag] = NUMBER
            plan.packed[together] = {_VARINT: 0, _FIXED32: 4, _FIXED64: 8}[wire]
        else:
            plan.single[tag] = 0
    return plan


def _is_small(kind: Descriptor, depth: int) -> bool:
    """Whether a message has neither lists nor arrays of bytes, so that nothing in it is worth a look."""
    return depth < _DEEPEST and not any(
        field.is_repeated
        or field.type == field.TYPE_BYTES
        or (field.message_type is not None and not _is_small(field.message_type, depth + 1))
        for field in kind.fields
    )


def _weigh(data: bytes, at: int, end: int, kind: Descriptor, most: int, depth: int) -> int:
    """Weigh the message from `at` to `end`. Raises IndexError beyond the last byte."""
    if depth > _DEEPEST:
        raise DecodeError("its messages are nested too deeply")
    plan = _plan(kind)
    whole = plan.whole
    total = 0
    while at < end and total <= most:
        tag = data[at]
        prices = whole.get(tag) if tag < 128 else None  # of one byte, as nearly all are
        if prices is not None:
            size = data[at + 1]
            if size < 128:
                at += size + 2
            else:
                size, at = _number(data, at + 1)
                at += size
            total += prices[0] + prices[1] * size
            continue
        tag, at = _number(data, at)
        wire = tag & 7
        if wire == _BYTES:
            size, at = _number(data, at)
            stop = at + size
            if stop > end:
                raise DecodeError("a field is longer than its message")
            if tag in plan.inner:
                total += MESSAGE + _weigh(data, at, stop, plan.inner[tag], most - total, depth + 1)
            elif tag in plan.packed:
                total += NUMBER * _numbers(data, at, stop, plan.packed[tag])
            else:
                prices = whole.get(tag, (UNKNOWN, 0))
                total += prices[0] + prices[1] * size
            at = stop
        else:
            total += plan.single.get(tag, UNKNOWN)
            if wire == _VARINT:
                _, at = _number(data, at)
            elif wire in (_FIXED32, _FIXED64):
                at += 4 if wire == _FIXED32 else 8
            else:
                raise DecodeError("it has groups, which no message of this server has")
    if at > end:
        raise DecodeError("a field is longer than its message")
    return total


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Read a number of up to ten bytes; return it, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise DecodeError("a number has more than ten bytes")


def _numbers(data: bytes, at: int, stop: int, width: int) -> int:
    """Count the numbers of a list that stand together: each has one last byte, whose first bit is not set."""
    if width:
        return (stop - at) // width
    return int(np.count_nonzero(np.frombuffer(data, np.uint8, stop - at, at) < 128)) if stop > at else 0
