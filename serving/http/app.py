"""The table of the HTTP routes, as a FastAPI application."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from perturbscope import __version__, protocol
from serving.engine.engine import Engine
from serving.engine.operations import all_served
from serving.engine.reports import HTML
from serving.http import admin, openapi, streams, vocabulary
from serving.http.edge import OperationEndpoint
from serving.http.gate import refused
from serving.http.metrics_page import metrics_page
from serving.http.upload_page import PAGE_HEADERS, screen_page


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


async def _screen(request: Request) -> Response:
    """The page on which a screen is uploaded in the browser."""
    return Response(screen_page(request.app.state.engine.settings), headers=PAGE_HEADERS, media_type=HTML)
