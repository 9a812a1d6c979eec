"""What the HTTP routes take and answer, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from perturbscope import wire
from serving import schemas
from serving.bodies import MULTIPART
from serving.routes import Route
from serving.uploads import PARAMETERS


def responses(answer: type[Any]) -> dict[int | str, dict[str, Any]]:
    """What a route may answer, for the OpenAPI document."""
    arrow = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"model": answer, "description": "The answer.", "content": {wire.ARROW: arrow}}, **refusals()}


def refusals() -> dict[int | str, dict[str, Any]]:
    """What every route may answer in place of what was asked for."""
    texts = {
        404: "No such model.",
        413: "Larger than this server takes.",
        422: "The input cannot be used; the message says why and what to do.",
        429: "The queue is full; Retry-After says when to come back.",
        500: "The server failed.",
    }
    return {status: {"model": schemas.ErrorAnswer, "description": text} for status, text in texts.items()}


def request_body(route: Route, body: type[Any] | None) -> dict[str, Any]:
    """What a route takes, for the OpenAPI document."""
    binary = {"type": "string", "format": "binary"}
    parameters = PARAMETERS[route.name]
    form = {"file": {**binary, "description": "An .h5ad file."}} | {
        name: {"type": "string", "description": text} for name, text in parameters.items()
    }
    return {
        "requestBody": {
            "required": True,
            "content": {
                **({wire.JSON: {"schema": schemas.inlined(body)}, wire.ARROW: {"schema": binary}} if body else {}),
                wire.HDF5: {"schema": binary},
                MULTIPART: {"schema": {"type": "object", "properties": form, "required": ["file"]}},
            },
        },
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "schema": {"type": "string"},
                "description": f"For an .h5ad file: {text}",
            }
            for name, text in parameters.items()
        ],
    }
