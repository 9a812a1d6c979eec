"""``GET /v1/models/{name}/vocabulary``: the operation ``vocabulary``, for browsers, caches and curl."""

from __future__ import annotations

import weakref

from fastapi import APIRouter, Request, Response

from perturbscope import protocol
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embedder import Embedder
from perturbscope.operations import OPERATIONS
from perturbscope.operations.vocabulary import VocabularyRequest
from serving.access.limits import Held
from serving.call import Call
from serving.engine.engine import Engine
from serving.http import openapi, schemas
from serving.http.edge import Endpoint

PATH = "/v1/models/{name}/vocabulary"
_WRITTEN: weakref.WeakKeyDictionary[Embedder, bytes] = weakref.WeakKeyDictionary()
"""Answers in JSON, which are the same for everyone."""
_NAME = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "Name, name@version or model_id of the model.",
    "schema": {"type": "string"},
}
_IF_NONE_MATCH = {
    "name": "if-none-match",
    "in": "header",
    "required": False,
    "description": "ETags of what the caller has; if one of them is still right, the answer is 304 without a body.",
    "schema": {"type": "string"},
}


def router() -> APIRouter:
    """Return the route; the application's ``state.engine`` must be set before the first request."""
    routes = APIRouter()
    operation = OPERATIONS["vocabulary"]
    routes.add_api_route(
        PATH,
        Endpoint(PATH, _vocabulary).answer,
        methods=["GET"],
        summary=operation.summary,
        name="vocabulary_of_a_model",
        response_class=Response,
        responses={
            **openapi.refusals((401, 403, 404, 422, 429, 500, 504)),
            200: {"model": schemas.given(operation)},
            304: {"description": "What the caller has is still right."},
        },
        openapi_extra={"parameters": [_NAME, _IF_NONE_MATCH]},
    )
    return routes


async def _vocabulary(request: Request, call: Call, held: Held) -> Response:
    engine: Engine = request.app.state.engine
    if request.query_params:
        raise InvalidParameterError(
            f"Unknown parameter {next(iter(request.query_params))[:40]!r}; there is none.", field="query"
        )
    with engine.registry.lease(request.path_params["name"]) as model:
        embedder, call.model_id = model.embedder, model.info.model_id
        tag = f'"{embedder.model_id}"'
        headers = {"etag": tag, "cache-control": "private, no-cache"}
        if _has(request.headers.get("if-none-match", ""), tag):
            return Response(status_code=304, headers=headers)
        # About 50 bytes a gene, held until they are sent.
        call.reserve(100 * len(embedder.family.vocabulary))
        if embedder not in _WRITTEN:
            with call.stage("encode"):
                _WRITTEN[embedder] = await engine.work(_written, embedder)
        return Response(_WRITTEN[embedder], headers=headers, media_type=protocol.JSON)


def _written(embedder: Embedder) -> bytes:
    return protocol.answer_to_json(OPERATIONS["vocabulary"].answered(embedder, VocabularyRequest()))


def _has(sent: str, tag: str) -> bool:
    """Whether the header If-None-Match holds a tag, in its weak form too."""
    return sent.strip() == "*" or tag in {part.strip().removeprefix("W/") for part in sent.split(",")}
