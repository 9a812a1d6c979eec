"""The HTTP interface: a thin adapter between bodies and the engine."""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from perturbscope import __version__, wire
from perturbscope.errors import InvalidParameterError, LimitExceededError, OverloadedError, PerturbScopeError
from serving import schemas
from serving.engine import Engine
from serving.limits import too_many_bytes
from serving.log import RequestLog
from serving.pages import PAGE_HEADERS, screen_page
from serving.reports import HTML
from serving.routes import COLUMNS, COMPARE, EMBED, REPORT, SCORE, Route, add_seen, add_warnings, describe, explain
from serving.status import status_of
from serving.uploads import FILE_NAME, PARAMETERS, Upload, read_upload

T = TypeVar("T")
MULTIPART = "multipart/form-data"
HDF5_TYPES = (wire.HDF5, "application/octet-stream")
"""An .h5ad file as the raw body; curl --data-binary is often told the second."""
CLIENT_GONE = 499
"""Written to the log only: nobody is there to read it."""
_MAX_FIELD_BYTES = 2**20


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
            responses=_responses(answer),
            openapi_extra=_request_body(route, body),
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
            responses={**_refusals(), 200: {"description": "The answer.", **described}},
            openapi_extra=_request_body(route, file_body),
        )
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
    log = RequestLog(route.path)
    code = "ok"
    try:
        with engine.admit() as hold:
            upload = await _read(_Limited(request, engine, hold), route, engine)
            describe(log, upload.request)
            answer = await _while_connected(request, route.call(engine, upload.request))
            describe(log, answer)
            answer = add_warnings(answer, upload.warnings)
            answer = add_seen(answer, engine.seen(upload.request, upload.file))
            accepted = request.headers.get("accept", "")
            wants_arrow = wire.ARROW in route.encode and wire.ARROW in accepted
            media_type = wire.ARROW if wants_arrow else next(iter(route.encode))
            body = await engine.work(route.encode[media_type], answer)
        response = Response(body, headers=PAGE_HEADERS if media_type == HTML else None, media_type=media_type)
    except ClientDisconnect:
        code, response = "client_gone", Response(status_code=CLIENT_GONE)
    except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
        told = explain(error, log)
        code, response = told.code, _error_response(told)
    response.headers["x-request-id"] = log.id
    log.write(response.status_code, code)
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


def _error_response(error: PerturbScopeError) -> Response:
    headers = {}
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(math.ceil(error.retry_after))
    return Response(wire.error_to_json(error), status_of(error).http, headers, media_type=wire.JSON)


class _Limited:
    """A request whose body is counted, and timed, while it arrives."""

    def __init__(self, request: Request, engine: Engine, hold: Callable[[int], None]) -> None:
        self.headers = request.headers
        self.content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.query = dict(request.query_params)
        self._limit = engine.settings.max_body_bytes
        self._timeout = engine.settings.body_timeout
        self._hold = hold
        self._request = Request(request.scope, self._counted(request.receive))

    def _counted(self, receive: Receive) -> Receive:
        async def counted() -> Message:
            message = await receive()
            self._hold(len(message.get("body", b"")))
            return message

        return counted

    async def _timed(self, read: Callable[[], Awaitable[T]]) -> T:
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            raise too_many_bytes(self._limit)
        try:
            async with asyncio.timeout(self._timeout):
                return await read()
        except TimeoutError as error:
            raise LimitExceededError(
                f"The body did not arrive within {self._timeout} seconds. Send less at a time.", field="body"
            ) from error

    async def body(self) -> bytes:
        """The whole body."""
        return await self._timed(self._request.body)

    async def save(self, path: Path) -> None:
        """Write the body to a file as it arrives."""

        async def save() -> None:
            with path.open("wb") as file:
                async for part in self._request.stream():
                    file.write(part)

        await self._timed(save)

    async def form(self, path: Path) -> dict[str, str]:
        """Write the form's `file` to `path`; return its other fields."""

        async def read() -> dict[str, str]:
            try:
                form = await self._request.form(max_files=1, max_fields=20, max_part_size=_MAX_FIELD_BYTES)
            except HTTPException as error:
                raise InvalidParameterError(f"The form cannot be read: {error.detail}", field="body") from error
            try:
                fields = {name: value for name, value in form.items() if isinstance(value, str)}
                upload = form.get("file")
                if not isinstance(upload, UploadFile):
                    raise InvalidParameterError(
                        "The form has no file. Send the .h5ad file in the field 'file': curl -F file=@cells.h5ad.",
                        field="file",
                    )
                with path.open("wb") as file:
                    async for part in _parts(upload):
                        file.write(part)
                return fields
            finally:
                await form.close()

        return await self._timed(read)


async def _parts(upload: UploadFile) -> AsyncIterator[bytes]:
    while part := await upload.read(2**20):
        yield part


async def _read(request: _Limited, route: Route, engine: Engine) -> Upload:
    """The request in the body, whatever its type."""
    kind = request.content_type
    if kind in route.decode:
        if request.query:
            raise InvalidParameterError(
                f"The query parameter {next(iter(request.query))!r} has no effect here; put it into the body.",
                field=next(iter(request.query)),
            )
        return Upload(await engine.work(route.decode[kind], await request.body()))
    if kind not in (*HDF5_TYPES, MULTIPART):
        raise InvalidParameterError(
            f"The content type {kind or '(none)'!r} is not understood. Send {''.join(f'{t}, ' for t in route.decode)}"
            f"an .h5ad file as {wire.HDF5}, or a form ({MULTIPART}) with the .h5ad file in the field 'file'.",
            field="content-type",
        )
    with tempfile.TemporaryDirectory(prefix="perturbscope-") as directory:
        path = Path(directory) / FILE_NAME
        parameters: Mapping[str, str] = request.query
        if kind == MULTIPART:
            parameters = {**request.query, **await request.form(path)}
        else:
            await request.save(path)
        return await engine.work(read_upload, route.name, path, parameters, engine.settings)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
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


def _responses(answer: type[Any]) -> dict[int | str, dict[str, Any]]:
    """What a route may answer, for the OpenAPI document."""
    arrow = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"model": answer, "description": "The answer.", "content": {wire.ARROW: arrow}}, **_refusals()}


def _refusals() -> dict[int | str, dict[str, Any]]:
    """What every route may answer in place of what was asked for."""
    texts = {
        404: "No such model.",
        413: "Larger than this server takes.",
        422: "The input cannot be used; the message says why and what to do.",
        429: "The queue is full; Retry-After says when to come back.",
        500: "The server failed.",
    }
    return {status: {"model": schemas.ErrorAnswer, "description": text} for status, text in texts.items()}


def _request_body(route: Route, body: type[Any] | None) -> dict[str, Any]:
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
