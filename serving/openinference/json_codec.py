"""Requests and answers of the protocol over HTTP: JSON, which the bytes of tensors may follow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from perturbscope.errors import InvalidParameterError, MalformedMatrixError
from perturbscope.protocol import checks as check
from serving.openinference.tensors import (
    MAX_INPUTS,
    InferAnswer,
    InferRequest,
    Tensor,
    check_parameters,
    shown_name,
    tensor_of_bytes,
    tensor_of_values,
)

JSON_LENGTH = "inference-header-content-length"
"""Header with the number of bytes of the JSON, if the bytes of tensors follow it."""
_SIZE, _BINARY, _ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"


def request_from_body(body: bytes, json_length: str | None) -> InferRequest:
    """Read a request.

    Parameters
    ----------
    body
        JSON, and the tensors' bytes in the order of the inputs.
    json_length
        Value of the header `JSON_LENGTH`, if there is one.

    Raises
    ------
    InvalidParameterError, MalformedMatrixError, UnreadableFileError
        The message names the header, the field or the input at fault.
    """
    size = _json_length(json_length, len(body))
    data = _object(check.parse_json(body[:size]), "body")
    rest = memoryview(body)[size:]
    parameters = _parameters(data, "body")
    check_parameters(parameters)
    inputs: dict[str, Tensor] = {}
    for item in _list(data.get("inputs"), "inputs"):
        name = check.text(_object(item, "inputs").get("name"), "name")
        if name in inputs:
            raise MalformedMatrixError(f"The input {shown_name(name)} is given twice.", field=check.printable(name))
        inputs[name], rest = _tensor(name, item, rest)
    if rest:
        raise MalformedMatrixError(
            f"{len(rest):,} bytes follow the last tensor. Every input that has bytes must say {_SIZE!r} in its "
            f"parameters, and the header {JSON_LENGTH} how long the JSON is.",
            field="body",
        )
    return InferRequest(
        inputs=inputs,
        outputs=_outputs(data.get("outputs")),
        id=check.optional_text(data.get("id"), "id") or "",
        binary=_flag(parameters.get(_ALL_BINARY, False), _ALL_BINARY),
    )


def answer_to_body(answer: InferAnswer) -> tuple[bytes, dict[str, str]]:
    """Return the body of an answer, and its headers, the content type among them."""
    outputs: list[dict[str, Any]] = []
    raw = b""
    for output in answer.outputs:
        item: dict[str, Any] = {"name": output.name, "datatype": "FP32", "shape": list(output.values.shape)}
        if output.wants_bytes:
            data = np.ascontiguousarray(output.values, dtype="<f4").tobytes()
            item["parameters"] = {_SIZE: len(data)}
            raw += data
        else:
            item["data"] = list(chain.from_iterable(check.short_floats(output.values.reshape(len(output.values), -1))))
        outputs.append(item)
    head: dict[str, Any] = {"model_name": answer.name, "model_version": answer.version, "outputs": outputs}
    if answer.id:
        head["id"] = answer.id
    text = json.dumps(head, allow_nan=False, separators=(",", ":")).encode()
    if not raw:
        return text, {"content-type": "application/json"}
    return text + raw, {"content-type": "application/octet-stream", JSON_LENGTH: str(len(text))}


def _json_length(text: str | None, n_bytes: int) -> int:
    if text is None:
        return n_bytes
    if not (text.isascii() and text.isdecimal() and len(text) < 16 and int(text) <= n_bytes):
        raise InvalidParameterError(
            f"The header {JSON_LENGTH} is {shown_name(text)}; it must be the length of the JSON in a body of "
            f"{n_bytes:,} bytes.",
            field=JSON_LENGTH,
        )
    return int(text)


def _tensor(name: str, item: Mapping[str, Any], rest: memoryview) -> tuple[Tensor, memoryview]:
    """Read one input; return it with the bytes that are left for the inputs after it."""
    parameters = _parameters(item, name)
    check_parameters(parameters, name)
    datatype = check.text(item.get("datatype"), "datatype")
    shape = _list(item.get("shape"), "shape")
    if _SIZE not in parameters:
        return tensor_of_values(name, datatype, shape, _flat(name, item.get("data"), shape)), rest
    size = check.integer(parameters[_SIZE], _SIZE)
    if "data" in item:
        raise MalformedMatrixError(
            f"The input {shown_name(name)} has both 'data' and {_SIZE!r}; give one of them.",
            field=check.printable(name),
        )
    if size > len(rest):
        raise MalformedMatrixError(
            f"The input {shown_name(name)} should have {size:,} bytes ({_SIZE!r}), but only {len(rest):,} follow.",
            field=check.printable(name),
        )
    return tensor_of_bytes(name, datatype, shape, rest[:size]), rest[size:]


def _flat(name: str, data: Any, shape: list[Any]) -> Any:
    """Return the numbers of a tensor, whether its rows are nested lists or not."""
    values = data
    if isinstance(data, list) and data and type(data[0]) is list:
        values = [data]
        for size in shape:
            if any(type(part) is not list or len(part) != size for part in values):
                raise MalformedMatrixError(
                    f"The lists of the input {shown_name(name)} are not nested as its shape says.",
                    field=check.printable(name),
                )
            values = list(chain.from_iterable(values))
    return check.numbers(values, check.printable(name))


def _outputs(value: Any) -> dict[str, bool | None]:
    found: dict[str, bool | None] = {}
    for item in _list(value, "outputs") if value is not None else []:
        name = check.text(_object(item, "outputs").get("name"), "name")
        parameters = _parameters(item, name)
        check_parameters(parameters, name)
        found[name] = _flag(parameters[_BINARY], _BINARY) if _BINARY in parameters else None
    return found


def _parameters(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    return _object(item.get("parameters", {}), f"parameters of {check.printable(where)}")


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidParameterError(f"{field} must be an object; got {check.shown(value)}.", field=field)
    return value


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidParameterError(f"{field} must be a list; got {check.shown(value)}.", field=field)
    if len(value) > MAX_INPUTS:
        raise InvalidParameterError(f"{field} has {len(value):,} items; {MAX_INPUTS} are taken.", field=field)
    return value


def _flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidParameterError(f"{field} must be true or false; got {check.shown(value)}.", field=field)
    return value
