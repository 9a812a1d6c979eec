"""The table of the HTTP routes, as a FastAPI application."""

from __future__ import annotations

import functools
import json
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from perturbscope import __version__, protocol
from perturbscope.errors import InvalidParameterError, PerturbScopeError
from serving.access.front import Front
from serving.call import REQUEST_ID
from serving.engine.engine import Engine
from serving.engine.operations import all_served
from serving.engine.progress import percent
from serving.engine.reports import HTML
from serving.http import admin, openapi, schemas, streams, vocabulary
from serving.http.edge import OperationEndpoint, error_response, peer_of
from serving.http.gate import refused
from serving.http.metrics_page import metrics_page
from serving.http.upload_page import EXAMPLE, EXAMPLE_FILE, PAGE_HEADERS, screen_page

PROGRESS = "/v1/progress"
_ID = {
    "name": "id",
    "in": "query",
    "required": True,
    "description": "The header x-request-id of the request.",
    "schema": {"type": "string", "minLength": 1},
}


def build_app() -> FastAPI:
    """Build the ASGI application; its ``state.engine`` must be set before the first request."""
    app = FastAPI(
        title="PerturbScope",
        version=__version__,
        summary="Embed cells and score perturbations.",
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    for served in all_served():
        endpoint = OperationEndpoint(served).answer
        app.add_api_route(served.path, endpoint, response_class=Response, **openapi.route(served))
    app.add_api_route(
        streams.PATH,
        _embed_stream,
        methods=["POST"],
        summary="Vectors of any number of cells, while they are sent: one Arrow IPC stream in, another out.",
        name="embed_stream",
        response_class=Response,
        responses={
            **openapi.refusals(),
            200: {"description": "The answer.", "content": {protocol.ARROW: {"schema": openapi.BINARY}}},
        },
        openapi_extra={"requestBody": {"required": True, "content": {protocol.ARROW: {"schema": openapi.BINARY}}}},
    )
    app.add_api_route(
        PROGRESS,
        _progress,
        methods=["GET"],
        summary="How far a request of the same caller is that was sent with a header x-request-id.",
        name="progress",
        response_class=Response,
        responses={200: {"model": schemas.ProgressAnswer}, **openapi.refusals((401, 404, 422, 500))},
        openapi_extra={"parameters": [_ID]},
    )
    app.add_api_route(EXAMPLE, _example, methods=["GET"], include_in_schema=False, response_class=Response)
    app.add_api_route("/metrics", metrics_page, include_in_schema=False, response_class=Response)
    app.add_api_route("/", _screen, methods=["GET"], include_in_schema=False, response_class=Response)
    app.include_router(admin.router())
    app.include_router(vocabulary.router())
    app.add_exception_handler(HTTPException, refused)
    app.router.redirect_slashes = False
    app.openapi = functools.partial(_document, app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document; BentoML also asks for it when it packs the service, where there is no engine."""
    engine: Engine | None = getattr(app.state, "engine", None)
    return openapi.document(app, keys=engine is not None and bool(engine.settings.keys))


async def _embed_stream(request: Request) -> Response:
    return streams.StreamedAnswer(request)


async def _progress(request: Request) -> Response:
    """Tell the stage of a request. It is no work: it takes nothing of the caller's share, and is not logged."""
    front: Front = request.app.state.engine.front
    call = Front.begin(PROGRESS, "http", request.headers, peer=peer_of(request.scope), method="GET")
    try:
        unknown = set(request.query_params) - {"id"}
        wanted = request.query_params.get("id", "")
        if unknown or not wanted:
            raise InvalidParameterError(
                "Give id, the x-request-id of a request in progress, and nothing else.", field="id"
            )
        caller = front.doorkeeper.caller(request.headers, peer_of(request.scope))
        found = front.call_of(caller.name, wanted)
        if found is None:
            response = error_response(InvalidParameterError("You have no request of this id in progress.", field="id"))
            response.status_code = 404
        else:
            answer = {"stage": found.at[0], "percent": percent(found)}
            response = Response(json.dumps(answer), media_type=protocol.JSON)
    except PerturbScopeError as error:
        response = error_response(error)
    response.headers[REQUEST_ID] = call.id
    return response


async def _example(request: Request) -> Response:
    """A small screen to try the page with; 404 where the server was installed without it."""
    if not EXAMPLE_FILE.is_file():
        raise HTTPException(404)
    body = await request.app.state.engine.work(EXAMPLE_FILE.read_bytes)
    return Response(body, headers={"cache-control": "no-store"}, media_type=protocol.HDF5)


async def _screen(request: Request) -> Response:
    """The page on which a screen is uploaded in the browser."""
    return Response(screen_page(request.app.state.engine.settings), headers=PAGE_HEADERS, media_type=HTML)
