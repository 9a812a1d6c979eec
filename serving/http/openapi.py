"""The OpenAPI document of the HTTP routes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from perturbscope import protocol
from perturbscope.protocol.operations import SCORE
from serving.call import REQUEST_ID, SECONDS, TIMEOUT
from serving.engine.operations import Served
from serving.http import schemas
from serving.http.files import MULTIPART
from serving.http.gate import OPEN
from serving.uploads.requests import parameters_for

BINARY = {"type": "string", "format": "binary"}
_TEXTS = {
    401: "This server asks for an API key, and the request has none that it knows.",
    403: "The API key does not have the right to do this.",
    404: "There is no such model.",
    409: "The bundle cannot be served; what was served still is. Or the model cannot do what is asked.",
    413: "Larger than this server takes, or the body did not arrive in time.",
    415: "The content type is not understood.",
    422: "The input cannot be used; the message says why and what to do.",
    429: "The queue is full, or the caller has had its share; Retry-After says when to come back.",
    500: "The server failed.",
    504: "The time that the caller allowed is over, or would be before the answer is there.",
}
USUAL = (401, 403, 404, 413, 415, 422, 429, 500, 504)
"""Statuses with which a route that reads a body may refuse."""
UNREAD = (401, 403, 422, 429, 500, 504)
"""The same of a route that reads none."""
_OPERATIONS = {"get", "post"}
_HEADERS = {
    REQUEST_ID: {"description": "The caller's id of the request, or a new one.", "schema": {"type": "string"}},
    "retry-after": {"description": "Seconds to wait before the next try.", "schema": {"type": "integer", "minimum": 1}},
    "www-authenticate": {"description": "How to authenticate.", "schema": {"type": "string"}},
}
_REQUEST_HEADERS = [
    {
        "name": REQUEST_ID,
        "in": "header",
        "required": False,
        "description": "An id that is sent back and logged, if it is of 1 to 64 letters, digits and _ . : -",
        "schema": {"type": "string"},
    },
    {
        "name": TIMEOUT,
        "in": "header",
        "required": False,
        "description": "Seconds that the caller will wait, such as 30 or 0.5; then the work ends.",
        "schema": {"type": "string", "pattern": f"^{SECONDS}$"},
    },
]
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "An API key."},
}


def document(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """Return the whole document.

    Parameters
    ----------
    app
        Application with the routes.
    keys
        Whether this server asks for API keys.
    """
    found = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
    )
    found["components"]["securitySchemes"] = _SCHEMES
    for path, operations in found["paths"].items():
        for operation in (operations[name] for name in _OPERATIONS & operations.keys()):
            if path in OPEN:
                continue
            operation.setdefault("parameters", []).extend(_REQUEST_HEADERS)
            # Without keys everyone may come in, and nothing is looked at.
            operation["security"] = [{name: []} for name in _SCHEMES] if keys else [{}]
            for status, answer in operation["responses"].items():
                headers = answer.setdefault("headers", {})
                headers[REQUEST_ID] = {**_HEADERS[REQUEST_ID], "required": True}
                for name, of in (("retry-after", "429"), ("www-authenticate", "401")):
                    if status == of:
                        headers[name] = {**_HEADERS[name], "required": True}
    return found


def route(served: Served) -> dict[str, Any]:
    """Return what the document says about the route of an operation, as arguments of ``add_api_route``."""
    if served.operation is None:
        answer: dict[str, Any] = (
            {"model": schemas.ColumnsAnswer}
            if served.name == "columns"
            else {"content": {media_type: {"schema": {"type": "string"}} for media_type in served.encode}}
        )
    else:
        answer = {"model": schemas.given(served.operation)}
        if protocol.ARROW in served.encode:
            answer["content"] = {protocol.ARROW: {"schema": BINARY}}
    conflicts = (409,) if served.operation is not None and served.operation.capability != "embed" else ()
    return {
        "methods": ["POST" if served.has_body else "GET"],
        "summary": served.summary,
        "name": served.name,
        "responses": {
            **refusals((*(USUAL if served.has_body else UNREAD), *conflicts)),
            200: {"description": "The answer.", **answer},
        },
        "openapi_extra": _request_body(served) if served.has_body else None,
    }


def refusals(
    statuses: Iterable[int] = USUAL, model: type[Any] = schemas.ErrorAnswer
) -> dict[int | str, dict[str, Any]]:
    """Return the error answers of a route."""
    return {status: {"model": model, "description": _TEXTS[status]} for status in sorted(statuses)}


def _request_body(served: Served) -> dict[str, Any]:
    """Return the request body and parameters of a route."""
    parameters = parameters_for(served.name)
    form = {"file": {**BINARY, "description": "An .h5ad file."}} | {
        name: {"type": "string", "description": text} for name, text in parameters.items()
    }
    written: dict[str, Any] = {}
    if served.decode:
        operation = served.operation or SCORE
        example = schemas.example(operation)
        body = {"schema": schemas.body(operation), **({"example": example} if example else {})}
        written = {protocol.JSON: body, protocol.ARROW: {"schema": BINARY}}
    if not served.uploads:
        return {"requestBody": {"required": True, "content": written}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                **written,
                protocol.HDF5: {"schema": BINARY},
                "application/octet-stream": {"schema": BINARY},
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
