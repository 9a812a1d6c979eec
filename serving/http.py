"""The HTTP interface: a thin adapter between bodies and the engine."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from perturbscope import __version__, wire
from perturbscope.errors import OverloadedError, PerturbScopeError
from serving import openapi, schemas
from serving.bodies import LimitedBody, read_request
from serving.calls import REQUEST_ID, Call
from serving.engine import Engine
from serving.pages import PAGE_HEADERS, screen_page
from serving.reports import HTML
from serving.routes import COLUMNS, COMPARE, EMBED, REPORT, SCORE, Route, add_seen, add_warnings, describe, explain
from serving.status import status_of
from serving.telemetry.states import metrics_page

T = TypeVar("T")
CLIENT_GONE = 499
"""Written to the log only: nobody is there to read it."""


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
        responses={200: {"model": schemas.ModelsAnswer}},
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
    app.add_api_route("/metrics", metrics_page, include_in_schema=False, response_class=Response)
    app.add_api_route("/", _screen, methods=["GET"], include_in_schema=False, response_class=Response)
    app.add_exception_handler(HTTPException, _refused)
    return app


def _endpoint(route: Route) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await _answer(request, route)

    return endpoint


async def _answer(request: Request, route: Route) -> Response:
    """Read, call, encode; whatever goes wrong becomes an error answer and a line in the log."""
    engine: Engine = request.app.state.engine
    call = Call.begin(route.path, "http", request.headers, peer=request.client.host if request.client else "")
    code = "ok"
    try:
        async with engine.front.admitted(call) as hold:
            upload = await read_request(LimitedBody(request, engine, hold, call), route, engine)
            describe(call, upload.request)
            answer = await while_connected(request, route.call(engine, upload.request, call))
            answer = add_warnings(answer, upload.warnings)
            answer = add_seen(answer, engine.seen(upload.request, upload.file, call))
            accepted = request.headers.get("accept", "")
            wants_arrow = wire.ARROW in route.encode and wire.ARROW in accepted
            media_type = wire.ARROW if wants_arrow else next(iter(route.encode))
            with call.stage("encode"):
                body = await engine.work(route.encode[media_type], answer)
        response = Response(body, headers=PAGE_HEADERS if media_type == HTML else None, media_type=media_type)
    except ClientDisconnect:
        code, response = "client_gone", Response(status_code=CLIENT_GONE)
    except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
        told = explain(error, call)
        code, response = told.code, error_response(told)
    response.headers[REQUEST_ID] = call.id
    call.finish(response.status_code, code)
    return response


async def _models(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    return Response(wire.models_answer_to_json(engine.models()), media_type=wire.JSON)


async def _screen(request: Request) -> Response:
    """Where a screen is uploaded in the browser."""
    engine: Engine = request.app.state.engine
    return Response(screen_page(engine.settings), headers=PAGE_HEADERS, media_type=HTML)


async def _refused(_: Request, error: Exception) -> Response:
    """What the framework itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for nothing else
    body = {"error": {"code": "invalid_parameter", "message": str(error.detail), "field": None}}
    return Response(json.dumps(body), error.status_code, error.headers, media_type=wire.JSON)


def error_response(error: PerturbScopeError) -> Response:
    """The answer that tells of an error."""
    headers = {}
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(math.ceil(error.retry_after))
    return Response(wire.error_to_json(error), status_of(error).http, headers, media_type=wire.JSON)


async def while_connected(request: Request, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away: its cells then cost nothing more."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
