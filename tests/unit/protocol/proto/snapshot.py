"""The promises of a .proto as plain data, and the changes of it that break a client.

Run it to write the snapshot anew, after a change that breaks nobody or on the way to a new major version:
``python -m tests.unit.protocol.proto.snapshot``. The test then compares with what it wrote, so look at its diff.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)

from tests.snapshots import renew

SNAPSHOT = Path(__file__).with_name("perturbscope_v1.json")
Promise = dict[str, Any]


def of_file(file: FileDescriptorProto) -> Promise:
    """Messages, enums and services by their full names."""
    found: Promise = {"package": file.package, "messages": {}, "enums": {}, "services": {}}
    for enum in file.enum_type:
        found["enums"][f"{file.package}.{enum.name}"] = _of_enum(enum)
    for message in file.message_type:
        _add_message(found, f"{file.package}.{message.name}", message)
    for service in file.service:
        found["services"][f"{file.package}.{service.name}"] = {
            method.name: {
                "takes": method.input_type.removeprefix("."),
                "gives": method.output_type.removeprefix("."),
                "streams": [method.client_streaming, method.server_streaming],
            }
            for method in service.method
        }
    return found


def _add_message(found: Promise, name: str, message: DescriptorProto) -> None:
    oneofs = [oneof.name for oneof in message.oneof_decl]
    found["messages"][name] = {
        "fields": {str(field.number): _of_field(field, oneofs) for field in message.field},
        "reserved": _numbers((part.start, part.end) for part in message.reserved_range),
        "reserved_names": sorted(message.reserved_name),
    }
    for nested in message.nested_type:
        _add_message(found, f"{name}.{nested.name}", nested)
    for enum in message.enum_type:
        found["enums"][f"{name}.{enum.name}"] = _of_enum(enum)


def _of_field(field: FieldDescriptorProto, oneofs: list[str]) -> Promise:
    told: Promise = {
        "name": field.name,
        "type": FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower(),
        "label": FieldDescriptorProto.Label.Name(field.label).removeprefix("LABEL_").lower(),
        "presence": field.proto3_optional,
    }
    if field.type_name:
        told["type"] += " " + field.type_name.removeprefix(".")
    if field.HasField("oneof_index") and not field.proto3_optional:
        told["oneof"] = oneofs[field.oneof_index]
    return told


def _of_enum(enum: EnumDescriptorProto) -> Promise:
    return {
        "values": {str(value.number): value.name for value in enum.value},
        "reserved": _numbers((part.start, part.end + 1) for part in enum.reserved_range),
        "reserved_names": sorted(enum.reserved_name),
    }


def _numbers(ranges: Iterable[tuple[int, int]]) -> list[int]:
    return sorted(number for start, stop in ranges for number in range(start, stop))


def broken(old: Promise, new: Promise) -> list[str]:
    """Return, in words, the changes from `old` to `new` that break a client of `old`."""
    found: list[str] = []
    if old["package"] != new["package"]:
        found.append(f"the package {old['package']} is now {new['package']}")
    for name, message in old["messages"].items():
        if name not in new["messages"]:
            found.append(f"the message {name} is gone")
            continue
        found += _members(name, "field", message, new["messages"][name], "fields")
    for name, enum in old["enums"].items():
        if name not in new["enums"]:
            found.append(f"the enum {name} is gone")
            continue
        found += _members(name, "value", enum, new["enums"][name], "values")
    for name, methods in old["services"].items():
        for method, promise in methods.items():
            now = new["services"].get(name, {}).get(method)
            if now is None:
                found.append(f"the method {name}/{method} is gone")
            elif now != promise:
                found.append(f"the method {name}/{method} was {promise} and is {now}")
    return found


def _members(name: str, kind: str, old: Promise, new: Promise, key: str) -> list[str]:
    """Fields of a message, or values of an enum: none changed; one that is gone is reserved, and stays so."""
    found = []
    for number, promise in old[key].items():
        now = new[key].get(number)
        was = promise["name"] if kind == "field" else promise
        if now is None:
            if int(number) not in new["reserved"] or was not in new["reserved_names"]:
                found.append(f"the {kind} {name}.{was} = {number} is gone, and its number and name are not reserved")
        elif now != promise:
            found.append(f"the {kind} {name}.{was} = {number} was {promise} and is {now}")
    for what in ("reserved", "reserved_names"):
        for item in old[what]:
            if item not in new[what]:
                found.append(f"{item} is no longer reserved in {name}")
    return found


def current() -> Promise:
    """The promise of the proto as it is."""
    from perturbscope.protocol.proto import perturbscope_v1_pb2

    return of_file(FileDescriptorProto.FromString(perturbscope_v1_pb2.DESCRIPTOR.serialized_pb))


if __name__ == "__main__":
    sys.exit(renew(SNAPSHOT, current(), broken))
