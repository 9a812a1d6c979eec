"""The bodies of the protocol's HTTP routes, for the OpenAPI document. Nothing is parsed with these models."""

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


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Open(BaseModel):
    """An object to which clients may add fields."""

    model_config = ConfigDict(extra="allow")


class InferError(_Closed):
    """The protocol's form of an error."""

    error: str


class Liveness(_Closed):
    """Whether the process answers."""

    live: bool


class Readiness(_Closed):
    """Whether every model answers."""

    ready: bool


class ModelReadiness(_Closed):
    """Whether a model answers."""

    name: str
    ready: bool


class ServerDescription(_Closed):
    """A description of the server."""

    name: str
    version: str
    extensions: list[str]


class TensorDescription(_Closed):
    """One input or output of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="Sizes of the axes; -1 means any size.")


class ModelDescription(_Closed):
    """Inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorDescription]
    outputs: list[TensorDescription]
    properties: dict[str, str] = Field(
        description="max_length: tokens of the longest cell; and the vocabulary's facts."
    )


class ConfiguredTensor(_Closed):
    """One input or output, without the batch."""

    name: str
    data_type: str
    dims: list[int]


class ConfiguredParameter(_Closed):
    """One property of a model."""

    string_value: str


class ModelConfiguration(_Closed):
    """Inputs and outputs of a model, in Triton's terms."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]
    parameters: dict[str, ConfiguredParameter] = Field(description="The properties of the model's metadata.")


class Duration(_Closed):
    """A number of events, and the time that they took."""

    count: int
    ns: int


class InferDurations(_Closed):
    """Requests by outcome, and by stage."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_infer: Duration


class CountedModel(_Closed):
    """Counters of one version of a model."""

    name: str
    version: str
    last_inference: int = Field(description="Time of the last inference, in milliseconds since 1970.")
    inference_count: int = Field(description="Number of cells.")
    execution_count: int = Field(description="Number of requests.")
    inference_stats: InferDurations


class CountedModels(_Closed):
    """Counters of the models, for requests over this protocol."""

    model_stats: list[CountedModel]


class IndexedModel(_Closed):
    """One model of the repository."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str


class Done(_Closed):
    """An empty object: the change is made."""


class InferInput(_Open):
    """An input: numbers in `data`, or bytes after the JSON."""

    name: str = Field(max_length=512)
    datatype: _Datatype
    shape: list[_Size] = Field(description="[batch, length]", min_length=1, max_length=MAX_INPUTS)
    parameters: dict[str, Any] = Field({}, description="binary_data_size: bytes of this input after the JSON.")
    data: list[Any] | None = Field(None, description="Numbers, row by row, flat or nested.")


class InferOutput(_Open):
    """An output that the caller wants."""

    name: str = Field(max_length=512)
    parameters: dict[str, Any] = Field({}, description="binary_data: whether the output comes as bytes after the JSON.")


class InferBody(_Open):
    """Padded tokens of cells, and a mask that tells tokens from padding."""

    id: str | None = Field(None, description="The caller's name for the request; sent back.", max_length=512)
    parameters: dict[str, Any] = Field({}, description="binary_data_output: whether outputs come as bytes.")
    inputs: list[InferInput] = Field(min_length=1, max_length=MAX_INPUTS)
    outputs: list[InferOutput] | None = Field(None, description="Default: all outputs.", max_length=MAX_INPUTS)


class InferredOutput(_Closed):
    """An output: numbers in `data`, or bytes after the JSON."""

    name: str
    datatype: Literal["FP32"]
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | None = Field(None, description="Numbers, row by row, flat.")


class Inferred(_Closed):
    """Outputs of the model for the cells."""

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
    """Return FastAPI's description of a route.

    Parameters
    ----------
    path
        Path of the route, with its parameters in braces.
    summary
        One line about the route.
    answer
        Pydantic model of the answer.
    body
        OpenAPI description of the request body.
    """
    ok: dict[str, Any] = {"model": answer, "description": "The answer."}
    if answer is Inferred:
        ok["content"] = {OCTETS: {"schema": {"type": "string", "format": "binary"}}}
        ok["headers"] = {
            JSON_LENGTH: {
                "description": "Bytes of the JSON, if the tensor follows it.",
                "schema": {"type": "integer"},
            }
        }
    named = re.findall(r"{(\w+)}", path)
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in (("name", "Name of the model."), ("version", "Version of the model."))
        if name in named
    ]
    if answer is Inferred:
        parameters.append(
            {
                "name": JSON_LENGTH,
                "in": "header",
                "required": False,
                "description": "Bytes of the JSON, if tensors follow it: a whole number.",
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
    """Return FastAPI's description of a route that asks for no key, and is never refused."""
    responses: dict[int | str, Any] = {200: {"model": answer, "description": "Yes."}}
    if may_fail:
        responses[503] = {"model": answer, "description": "Not now."}
    return {"summary": summary, "tags": [TAG], "responses": responses}


def infer_body() -> dict[str, Any]:
    """Return the request body of the route that embeds tokens."""
    content = {
        "application/json": {"schema": inlined(InferBody), "example": EXAMPLE},
        OCTETS: {"schema": {"type": "string", "format": "binary"}},
    }
    return {"required": True, "content": content, "description": "JSON; the bytes of tensors may follow it."}


def repository_body(**properties: dict[str, Any]) -> dict[str, Any]:
    """Return the request body of a repository route: an object with some of these properties, or nothing."""
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"required": False, "content": {"application/json": {"schema": schema}}}
