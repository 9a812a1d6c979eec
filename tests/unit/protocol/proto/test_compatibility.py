"""``perturbscope.v1`` keeps what it promised: clients of yesterday can talk to the server of today.

Allowed are additions, and a removal whose number and name are reserved; then the snapshot is written anew with
``python -m tests.unit.protocol.proto.snapshot``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from perturbscope.protocol.proto import perturbscope_v1_pb2
from tests.unit.protocol.proto.snapshot import SNAPSHOT, broken, current, of_file

Change = Callable[[FileDescriptorProto], Any]


def test_nothing_that_was_promised_has_changed() -> None:
    assert broken(json.loads(SNAPSHOT.read_text()), current()) == []


def test_the_snapshot_is_up_to_date() -> None:
    assert json.loads(SNAPSHOT.read_text()) == current(), (
        "run python -m tests.unit.protocol.proto.snapshot, and look at the diff"
    )


def message(file: FileDescriptorProto, name: str) -> Any:
    return next(item for item in file.message_type if item.name == name)


def field(file: FileDescriptorProto, name: str, number: int) -> Any:
    return next(item for item in message(file, name).field if item.number == number)


def remove(items: Any, name: str) -> None:
    del items[next(at for at, item in enumerate(items) if item.name == name)]


def reserve(file: FileDescriptorProto, name: str, number: int, word: str) -> None:
    message(file, name).reserved_range.add(start=number, end=number + 1)
    message(file, name).reserved_name.append(word)


BREAKING: dict[str, tuple[Change, str]] = {
    "field removed": (lambda f: remove(message(f, "EmbedAnswer").field, "lengths"), "EmbedAnswer.lengths = 2 is gone"),
    "field removed, its number reserved": (
        lambda f: (
            remove(message(f, "EmbedAnswer").field, "lengths"),
            message(f, "EmbedAnswer").reserved_range.add(start=2, end=3),
        ),
        "not reserved",
    ),
    "field renumbered": (lambda f: setattr(field(f, "Score", 5), "number", 50), "Score.distance = 5 is gone"),
    "field renamed": (lambda f: setattr(field(f, "Score", 5), "name", "far"), "Score.distance = 5 was"),
    "fields swapped": (
        lambda f: (setattr(field(f, "Score", 5), "name", "z"), setattr(field(f, "Score", 8), "name", "distance")),
        "Score.z = 8 was",
    ),
    "field retyped": (
        lambda f: setattr(field(f, "Score", 2), "type", FieldDescriptorProto.TYPE_INT32),
        "Score.n_cells = 2 was",
    ),
    "message of a field changed": (
        lambda f: setattr(field(f, "EmbedAnswer", 1), "type_name", ".perturbscope.v1.CountMatrix"),
        "EmbedAnswer.embeddings = 1 was",
    ),
    "field repeated": (
        lambda f: setattr(field(f, "EmbedRequest", 1), "label", FieldDescriptorProto.LABEL_REPEATED),
        "EmbedRequest.cells = 1 was",
    ),
    "presence lost": (lambda f: field(f, "EmbedRequest", 2).ClearField("proto3_optional"), "EmbedRequest.model = 2"),
    "out of its oneof": (lambda f: field(f, "ScoreRequest", 1).ClearField("oneof_index"), "ScoreRequest.cells = 1"),
    "message removed": (lambda f: remove(f.message_type, "Pair"), "the message perturbscope.v1.Pair is gone"),
    "enum value removed": (lambda f: remove(f.enum_type[0].value, "COUNT_TYPE_INT32"), "COUNT_TYPE_INT32 = 1 is gone"),
    "enum value renamed": (lambda f: setattr(f.enum_type[0].value[1], "name", "INT"), "COUNT_TYPE_INT32 = 1 was"),
    "enum removed": (lambda f: remove(f.enum_type, "CountType"), "the enum perturbscope.v1.CountType is gone"),
    "method removed": (lambda f: remove(f.service[0].method, "Score"), "PerturbScope/Score is gone"),
    "method streams": (lambda f: setattr(f.service[0].method[0], "server_streaming", True), "PerturbScope/Embed was"),
    "method takes another message": (
        lambda f: setattr(f.service[0].method[0], "input_type", ".perturbscope.v1.ScoreRequest"),
        "PerturbScope/Embed was",
    ),
    "service renamed": (lambda f: setattr(f.service[0], "name", "Scope"), "PerturbScope/Embed is gone"),
    "package renamed": (lambda f: setattr(f, "package", "perturbscope.v2"), "perturbscope.v1 is now perturbscope.v2"),
}


def changed(change: Change) -> Any:
    file = FileDescriptorProto.FromString(perturbscope_v1_pb2.DESCRIPTOR.serialized_pb)
    change(file)
    return of_file(file)


@pytest.mark.parametrize("case", BREAKING)
def test_a_change_that_breaks_clients_is_seen(case: str) -> None:
    change, text = BREAKING[case]
    found = broken(current(), changed(change))
    assert any(text in item for item in found), found


ALLOWED: dict[str, Change] = {
    "a field": lambda f: message(f, "Score").field.add(name="new", number=99, type=FieldDescriptorProto.TYPE_STRING),
    "a message": lambda f: f.message_type.add(name="New"),
    "a method": lambda f: f.service[0].method.add(name="New", input_type=".x", output_type=".y"),
    "an enum value": lambda f: f.enum_type[0].value.add(name="COUNT_TYPE_INT64", number=4),
    "a removal with number and name reserved": lambda f: (
        remove(message(f, "Score").field, "flags"),
        reserve(f, "Score", 11, "flags"),
    ),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_an_addition_breaks_nobody(case: str) -> None:
    assert broken(current(), changed(ALLOWED[case])) == []


def test_what_is_reserved_stays_reserved() -> None:
    old = changed(ALLOWED["a removal with number and name reserved"])
    found = broken(old, changed(lambda f: remove(message(f, "Score").field, "flags")))
    assert found == [
        "11 is no longer reserved in perturbscope.v1.Score",
        "flags is no longer reserved in perturbscope.v1.Score",
    ]
    again = broken(old, current())
    assert again == found
