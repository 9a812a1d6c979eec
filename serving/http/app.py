"""The HTTP interface: a thin adapter between bodies and the engine."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from perturbscope import __version__, protocol
from perturbscope.errors import InvalidParameterError
from serving.access.front import Front
from serving.access.limits import Held
from serving.call import GROWTH, JSON_GROWTH, REQUEST_ID, Call
from serving.engine.engine import Engine
from serving.engine.operations import COLUMNS, COMPARE, EMBED, REPORT, SCORE, Route, add_seen, add_warnings, describe
from serving.engine.reports import HTML
from serving.http import admin, openapi, schemas, streams
from serving.http.bodies import LimitedBody, read_request
from serving.http.edge import answered, error_body, while_connected
from serving.http.metrics_page import metrics_page
from serving.http.upload_page import PAGE_HEADERS, screen_page
from serving.telemetry.metrics import OTHER


def build_app() -> FastAPI:
    """The ASGI application; its ``state.engine`` must be set before the first request."""
    app = FastAPI(
        title="PerturbScope",
        version=__version__,
        summary="Embed cells and score perturbations.",
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    routes: list[tuple[Route, type[Any], type[Any], str]] = [
        (EMBED, schemas.EmbedBody, schemas.EmbedAnswer, "Vectors of cells."),
        (SCORE, schemas.ScoreBody, schemas.ScoreAnswer, "How far each perturbation moved its cells from control."),
        (COMPARE, schemas.CompareBody, schemas.CompareAnswer, "How far perturbations lie from each other."),
    ]
    for route, body, answer, what in routes:
        app.add_api_route(
            route.path,
            _endpoint(route),
            methods=["POST"],
            summary=what,
            name=route.name,
            response_class=Response,
            responses=openapi.responses(answer),
            openapi_extra=openapi.request_body(route, body),
        )
    app.add_api_route(
        "/v1/models",
        _models,
        methods=["GET"],
        summary="The models that are served; the first is the default.",
        name="models",
        response_class=Response,
        responses={200: {"model": schemas.ModelsAnswer}, **openapi.refusals((401, 403, 422, 429, 500, 504))},
    )
    for route, file_body, described, what in (
        (
            REPORT,
            schemas.ScoreBody,
            {"content": {HTML: {"schema": {"type": "string"}}}},
            "As /v1/score, as a page to read.",
        ),
        (COLUMNS, None, {"model": schemas.ColumnsAnswer}, "The labels of an .h5ad file, to choose from."),
    ):
        app.add_api_route(
            route.path,
            _endpoint(route),
            methods=["POST"],
            summary=what,
            name=route.name,
            response_class=Response,
            responses={**openapi.refusals(), 200: {"description": "The answer.", **described}},
            openapi_extra=openapi.request_body(route, file_body),
        )
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
    app.add_exception_handler(HTTPException, _refused)
    app.router.redirect_slashes = False
    app.openapi = functools.partial(_document, app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; BentoML asks for it when it packs the service too, where there is no engine."""
    engine: Engine | None = getattr(app.state, "engine", None)
    return openapi.document(app, keys=engine is not None and bool(engine.settings.keys))


def _endpoint(route: Route) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await _answer(request, route)

    return endpoint


async def _answer(request: Request, route: Route) -> Response:
    """Read, call, encode."""
    engine: Engine = request.app.state.engine

    async def read_and_answer(call: Call, hold: Held) -> Response:
        upload = await read_request(LimitedBody(request, engine, hold, call), route, engine)
        describe(call, upload.request)
        accepted = request.headers.get("accept", "")
        wants_arrow = protocol.ARROW in route.encode and protocol.ARROW in accepted
        media_type = protocol.ARROW if wants_arrow else next(iter(route.encode))
        call.growth = GROWTH if wants_arrow else JSON_GROWTH

        async def answer_encoded() -> bytes:
            answer = await route.call(engine, upload.request, call)
            answer = add_warnings(answer, upload.warnings)
            answer = add_seen(answer, engine.seen(upload.request, upload.file, call))
            with call.stage("encode"):
                return await engine.work(route.encode[media_type], answer)

        body = await while_connected(request, answer_encoded())
        return Response(body, headers=PAGE_HEADERS if media_type == HTML else None, media_type=media_type)

    return await answered(request, route.path, read_and_answer)


async def _embed_stream(request: Request) -> Response:
    return streams.StreamedAnswer(request)


async def _models(request: Request) -> Response:
    engine: Engine = request.app.state.engine

    async def list_models(call: Call, hold: Held) -> Response:
        return Response(protocol.models_answer_to_json(engine.models()), media_type=protocol.JSON)

    return await answered(request, "/v1/models", list_models)


async def _screen(request: Request) -> Response:
    """Where a screen is uploaded in the browser."""
    engine: Engine = request.app.state.engine
    return Response(screen_page(engine.settings), headers=PAGE_HEADERS, media_type=HTML)


async def _refused(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: an unknown path, a wrong method. Says what OPTIONS asks for."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for nothing else
    # The path may be anything, so the log has one name for all of them.
    call = Front.begin(OTHER, "http", request.headers, peer=request.client.host if request.client else "")
    headers = {**(error.headers or {}), REQUEST_ID: call.id}
    if error.status_code == 405 and request.method == "OPTIONS":
        Front.finish(call, 204)
        return Response(status_code=204, headers=headers)
    path = request.url.path
    message = {
        404: f"There is nothing at {path[:200]!r}. See /v1/openapi.json for what there is.",
        405: f"{request.method[:20]} is not what {path[:200]!r} takes, but {headers.get('Allow')}.",
    }.get(error.status_code, str(error.detail))
    told = InvalidParameterError(message)
    Front.finish(call, error.status_code, told.code)
    return Response(error_body(told, path), error.status_code, headers, media_type=protocol.JSON)
