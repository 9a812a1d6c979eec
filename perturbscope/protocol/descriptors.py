"""Protobuf of the operations that are not in ``perturbscope_v1.proto``: made from their dataclasses.

Each has a file of its own in the package ``perturbscope.v1``, with its two messages, and a service of the operation's
name with the one method ``Run``. Numbers of fields follow the order of the dataclass: fields may be added at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from perturbscope.protocol.fields import Field, Form, Kind
from perturbscope.protocol.operations import Operation
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb

PACKAGE: str = pb.DESCRIPTOR.package
METHOD = "Run"
_FIELD = FieldDescriptorProto
_NUMBERS: Mapping[str, Any] = {
    "bool": _FIELD.TYPE_BOOL,
    "float32": _FIELD.TYPE_FLOAT,
    "float64": _FIELD.TYPE_DOUBLE,
    "int64": _FIELD.TYPE_INT64,
    "uint64": _FIELD.TYPE_UINT64,
    "uint32": _FIELD.TYPE_UINT32,
}
_SCALARS: Mapping[Kind, Any] = {
    "text": _FIELD.TYPE_STRING,
    "integer": _FIELD.TYPE_INT64,
    "number": _FIELD.TYPE_DOUBLE,
    "flag": _FIELD.TYPE_BOOL,
}
_MESSAGES: Mapping[Kind, str] = {
    "cells": "CountMatrix",
    "vectors": "EmbeddingMatrix",
    "options": "ScoreOptions",
    "pairs": "Pair",
    "meta": "Meta",
}
_REPEATED: frozenset[Kind] = frozenset({"labels", "texts", "numbers", "pairs"})


def is_written(operation: Operation[Any, Any]) -> bool:
    """Tell whether an operation stands in ``perturbscope_v1.proto``."""
    return operation.rpc in pb.DESCRIPTOR.services_by_name["PerturbScope"].methods_by_name


def service_of(operation: Operation[Any, Any]) -> str:
    """Return the full name of the service of an operation."""
    return pb.DESCRIPTOR.services_by_name["PerturbScope"].full_name if is_written(operation) else _full(operation.rpc)


def method_of(operation: Operation[Any, Any]) -> str:
    """Return service and method of an operation, without the slash at the beginning."""
    return f"{service_of(operation)}/{operation.rpc if is_written(operation) else METHOD}"


def file_of(operation: Operation[Any, Any]) -> FileDescriptor:
    """Return the file of an operation, which the default pool, and so reflection, has from then on.

    Raises
    ------
    ValueError
        A message of that name is another one already.
    """
    if is_written(operation):
        return pb.DESCRIPTOR
    made = _file(operation)
    for message in made.message_type:
        if message.name in pb.DESCRIPTOR.message_types_by_name:
            raise ValueError(
                f"{message.name} is a message of {pb.DESCRIPTOR.name} already; name the dataclass otherwise"
            )
    pool = descriptor_pool.Default()
    try:
        pool.AddSerializedFile(made.SerializeToString())
    except TypeError as error:
        raise ValueError(f"the messages of {operation.name} were different before in this process") from error
    return pool.FindFileByName(made.name)


def proto_of(operation: Operation[Any, Any]) -> str:
    """Return the text of an operation's .proto, for other languages."""
    if is_written(operation):
        return f"// {operation.rpc} is a method of service PerturbScope in {pb.DESCRIPTOR.name}.\n"
    made = _file(operation)
    lines = [f"// {operation.summary}", 'syntax = "proto3";', "", f"package {made.package};", ""]
    lines += [f'import "{name}";' for name in made.dependency]
    lines += ["", f"service {operation.rpc} {{", f"  // {operation.summary}"]
    lines += [f"  rpc {METHOD}({operation.takes.name}) returns ({operation.gives.name});", "}"]
    for message, form in zip(made.message_type, (operation.takes, operation.gives), strict=True):
        lines += ["", f"message {message.name} {{"]
        for described, item in zip(message.field, _sent(form), strict=True):
            lines += [f"  // {item.doc}", f"  {_text(described)} {described.name} = {described.number};"]
        lines += ["}"]
    return "\n".join(lines) + "\n"


def _full(name: str) -> str:
    return f"{PACKAGE}.{name}"


def _sent(form: Form) -> list[Field]:
    """Return the fields of a message: of one string or several, a field for each."""
    found = []
    for item in form.fields:
        if item.kind == "names":
            found.append(replace(item, kind="text"))
            found.append(replace(item, name=f"{item.name}s", kind="texts", doc=f"Several, in place of `{item.name}`."))
        elif not item.derived:
            found.append(item)
    return found


def _file(operation: Operation[Any, Any]) -> FileDescriptorProto:
    made = FileDescriptorProto(
        name=f"perturbscope/operations/{operation.name}.proto",
        package=PACKAGE,
        syntax="proto3",
        dependency=[pb.DESCRIPTOR.name],
        message_type=[_message(operation.takes), _message(operation.gives)],
    )
    service = made.service.add(name=operation.rpc)
    service.method.add(
        name=METHOD, input_type=f".{_full(operation.takes.name)}", output_type=f".{_full(operation.gives.name)}"
    )
    return made


def _message(form: Form) -> DescriptorProto:
    message = DescriptorProto(name=form.name)
    for number, item in enumerate(_sent(form), 1):
        found = message.field.add(name=item.name, number=number)
        if item.kind in _MESSAGES:
            found.type, found.type_name = _FIELD.TYPE_MESSAGE, f".{_full(_MESSAGES[item.kind])}"
        elif item.kind == "numbers":
            found.type = _NUMBERS.get(item.dtype.name, _FIELD.TYPE_INT32)
        elif item.kind in ("labels", "texts"):
            found.type = _FIELD.TYPE_STRING
        elif item.kind in _SCALARS:
            found.type = _SCALARS[item.kind]
        else:
            raise ValueError(f"{form.name}.{item.name}: {item.kind} is for messages of {pb.DESCRIPTOR.name} alone")
        found.label = _FIELD.LABEL_REPEATED if item.kind in _REPEATED else _FIELD.LABEL_OPTIONAL
        if item.kind in _SCALARS and not item.required:
            # As protoc writes `optional`: a oneof of its own makes absence and the zero value two things.
            found.proto3_optional = True
            found.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{item.name}")
    return message


def _text(described: FieldDescriptorProto) -> str:
    """Return the type of a field as it is written."""
    label = (
        "repeated " if described.label == _FIELD.LABEL_REPEATED else "optional " if described.proto3_optional else ""
    )
    name = described.type_name.rpartition(".")[2] or _FIELD.Type.Name(described.type).removeprefix("TYPE_").lower()
    return label + name
