"""Requests and answers of the protocol over gRPC."""

from __future__ import annotations

from typing import Any

import numpy as np

from perturbscope.errors import MalformedMatrixError
from perturbscope.protocol import checks as check
from perturbscope.protocol.proto import open_inference_pb2 as messages
from serving.openinference.tensors import (
    MAX_INPUTS,
    InferAnswer,
    InferRequest,
    Tensor,
    check_parameters,
    checked_shape,
    shown_name,
    tensor_of_bytes,
    tensor_of_values,
)

_CONTENTS = {"INT32": ("int_contents", "i4"), "INT64": ("int64_contents", "i8"), "FP32": ("fp32_contents", "f4")}
"""Protobuf field of a type's values, and numpy's name of the type."""


def request_from_proto(message: messages.ModelInferRequest) -> InferRequest:
    """Read a request. Raises InvalidParameterError or MalformedMatrixError, naming the input at fault."""
    check_parameters(message.parameters)
    raw, items = message.raw_input_contents, message.inputs
    if len(items) > MAX_INPUTS:
        raise MalformedMatrixError(f"The request has {len(items):,} inputs; {MAX_INPUTS} are taken.", field="inputs")
    if raw and len(raw) != len(items):
        raise MalformedMatrixError(
            f"The request has {len(items)} inputs and {len(raw)} raw contents; there must be one for each, or none.",
            field="raw_input_contents",
        )
    inputs: dict[str, Tensor] = {}
    for at, item in enumerate(items):
        name = check.text(item.name, "name")
        check_parameters(item.parameters, name)
        if name in inputs:
            raise MalformedMatrixError(f"The input {shown_name(name)} is given twice.", field=check.printable(name))
        if raw and item.HasField("contents"):
            raise MalformedMatrixError(
                f"The input {shown_name(name)} has both contents and raw contents; give one of them.",
                field=check.printable(name),
            )
        if raw:
            inputs[name] = tensor_of_bytes(name, item.datatype, _shape(item), raw[at])
        else:
            inputs[name] = _tensor(name, item)
    for output in message.outputs:
        check_parameters(output.parameters, output.name)
    outputs: dict[str, bool | None] = {check.text(output.name, "outputs"): None for output in message.outputs}
    return InferRequest(inputs=inputs, outputs=outputs, id=check.text(message.id, "id"), binary=True)


def answer_to_proto(answer: InferAnswer) -> messages.ModelInferResponse:
    """Encode an answer, its values as bytes."""
    return messages.ModelInferResponse(
        model_name=answer.name,
        model_version=answer.version,
        id=answer.id,
        outputs=[
            messages.ModelInferResponse.InferOutputTensor(name=output.name, datatype="FP32", shape=output.values.shape)
            for output in answer.outputs
        ],
        raw_output_contents=[np.ascontiguousarray(output.values, dtype="<f4").tobytes() for output in answer.outputs],
    )


def _shape(item: Any) -> list[int]:
    # An input has two axes and a few of its own: more than a handful is nonsense, and is refused by its length.
    return list(item.shape[:MAX_INPUTS])


def _tensor(name: str, item: Any) -> Tensor:
    checked_shape(name, item.datatype, _shape(item))
    attribute, dtype = _CONTENTS[item.datatype]
    filled = [field.name for field, _ in item.contents.ListFields() if field.name != attribute]
    if filled:
        raise MalformedMatrixError(
            f"The input {shown_name(name)} is {item.datatype}, but has {filled[0]}; {attribute} is where it belongs.",
            field=check.printable(name),
        )
    return tensor_of_values(name, item.datatype, _shape(item), np.array(getattr(item.contents, attribute), dtype=dtype))
