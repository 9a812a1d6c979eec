"""What the protocol's HTTP routes take and answer, for the OpenAPI document. Nothing is parsed with these models."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.http.openapi import refusals
from serving.http.schemas import inlined
from serving.openinference.json_codec import JSON_LENGTH
from serving.openinference.tensors import MAX_INPUTS

OCTETS = "application/octet-stream"
TAG = "Open Inference Protocol"
_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Datatype = Literal["INT32", "INT64", "FP32"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Open(BaseModel):
    """Clients of the protocol may add what they like."""

    model_config = ConfigDict(extra="allow")


class InferError(_Body):
    """The protocol's form of an error."""

    error: str


class Liveness(_Body):
    """Whether the process answers."""

    live: bool


class Readiness(_Body):
    """Whether every model answers."""

    ready: bool


class ModelReadiness(_Body):
    """Whether a model answers."""

    name: str
    ready: bool


class ServerDescription(_Body):
    """What server this is."""

    name: str
    version: str
    extensions: list[str]


class TensorDescription(_Body):
    """One input or output of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 where any size will do.")


class ModelDescription(_Body):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorDescription]
    outputs: list[TensorDescription]


class ConfiguredTensor(_Body):
    """One input or output, without the batch."""

    name: str
    data_type: str
    dims: list[int]


class ModelConfiguration(_Body):
    """What a model takes and gives, in Triton's terms."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]


class Duration(_Body):
    """Events, and the time that they took."""

    count: int
    ns: int


class InferDurations(_Body):
    """Requests by outcome, and by stage."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_infer: Duration


class CountedModel(_Body):
    """What was asked of one version of a model."""

    name: str
    version: str
    last_inference: int = Field(description="Milliseconds since 1970.")
    inference_count: int = Field(description="Cells.")
    execution_count: int = Field(description="Requests.")
    inference_stats: InferDurations


class CountedModels(_Body):
    """What was asked of the models over this protocol."""

    model_stats: list[CountedModel]


class IndexedModel(_Body):
    """One model of the repository."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str


class Done(_Body):
    """Nothing: it is done."""


class InferInput(_Open):
    """An input: numbers in `data`, or bytes behind the JSON."""

    name: str = Field(max_length=512)
    datatype: _Datatype
    shape: list[_Size] = Field(description="[batch, length]", min_length=1, max_length=MAX_INPUTS)
    parameters: dict[str, Any] = Field({}, description="binary_data_size: bytes of this input behind the JSON.")
    data: list[Any] | None = Field(None, description="Row by row, flat or nested.")


class InferOutput(_Open):
    """An output that is wanted."""

    name: Literal["cell_embedding"]
    parameters: dict[str, Any] = Field({}, description="binary_data: whether as bytes behind the JSON.")


class InferBody(_Open):
    """Tokens of cells, padded, and which of them are padding."""

    id: str | None = Field(None, description="Sent back.", max_length=512)
    parameters: dict[str, Any] = Field({}, description="binary_data_output: whether outputs are wanted as bytes.")
    inputs: list[InferInput] = Field(min_length=1, max_length=MAX_INPUTS)
    outputs: list[InferOutput] | None = Field(None, description="All of them by default.", max_length=MAX_INPUTS)


class InferredOutput(_Body):
    """An output: numbers in `data`, or bytes behind the JSON."""

    name: Literal["cell_embedding"]
    datatype: Literal["FP32"]
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | None = Field(None, description="Row by row, flat.")


class Inferred(_Body):
    """Vectors of cells."""

    id: str | None = None
    model_name: str
    model_version: str
    outputs: list[InferredOutput]


EXAMPLE = {
    "inputs": [
        {"name": "input_ids", "datatype": "INT64", "shape": [2, 3], "data": [812, 31, 4077, 95, 8, 0]},
        {"name": "attention_mask", "datatype": "INT64", "shape": [2, 3], "data": [1, 1, 1, 1, 1, 0]},
    ]
}
"""Two cells, the second of them padded."""


def operation(path: str, summary: str, answer: Any, *, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What FastAPI is told of a route.

    Parameters
    ----------
    path
        With its parameters in braces.
    summary
        One line.
    answer
        The model of what it answers.
    body
        The OpenAPI description of what it takes.
    """
    ok: dict[str, Any] = {"model": answer, "description": "The answer."}
    if answer is Inferred:
        ok["content"] = {OCTETS: {"schema": {"type": "string", "format": "binary"}}}
        ok["headers"] = {
            JSON_LENGTH: {
                "description": "Bytes of the JSON, where the tensor follows it.",
                "schema": {"type": "integer"},
            }
        }
    named = re.findall(r"{(\w+)}", path)
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in (("name", "Of the model."), ("version", "Of the model."))
        if name in named
    ]
    if answer is Inferred:
        parameters.append(
            {
                "name": JSON_LENGTH,
                "in": "header",
                "required": False,
                "description": "Bytes of the JSON, where tensors follow it: a whole number.",
                "schema": {"type": "string", "pattern": "^[0-9]{1,15}$"},
            }
        )
    extra: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if body:
        extra["requestBody"] = body
    statuses = {401, 403, 422, 429, 500, 504, *((404,) if named else ()), *((413,) if body else ())}
    if answer is Done:
        statuses.add(409)
    not_now = {503: {"model": answer, "description": "Not now."}} if answer is ModelReadiness else {}
    return {
        "summary": summary,
        "tags": [TAG],
        "responses": {200: ok, **refusals(statuses, InferError), **not_now},
        "openapi_extra": extra,
    }


def probe(summary: str, answer: Any, *, may_fail: bool) -> dict[str, Any]:
    """What FastAPI is told of a route that asks for no key, and is never refused."""
    responses: dict[int | str, Any] = {200: {"model": answer, "description": "Yes."}}
    if may_fail:
        responses[503] = {"model": answer, "description": "Not now."}
    return {"summary": summary, "tags": [TAG], "responses": responses}


def infer_body() -> dict[str, Any]:
    """What the route takes that embeds tokens."""
    content = {
        "application/json": {"schema": inlined(InferBody), "example": EXAMPLE},
        OCTETS: {"schema": {"type": "string", "format": "binary"}},
    }
    return {"required": True, "content": content, "description": "JSON; the bytes of tensors may follow it."}


def repository_body(**properties: dict[str, Any]) -> dict[str, Any]:
    """What the routes of the repository take: an object with some of these properties, or nothing."""
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"required": False, "content": {"application/json": {"schema": schema}}}
