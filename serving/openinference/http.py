"""The routes of the protocol over HTTP."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from perturbscope import protocol
from perturbscope.errors import InvalidParameterError
from perturbscope.protocol import checks as check
from serving.access.limits import Held, decoded_bytes
from serving.call import Call, Right
from serving.http.edge import Endpoint, LimitedBody, while_connected
from serving.openinference import describe, documents, repository
from serving.openinference.inference import TokenEngine
from serving.openinference.json_codec import JSON_LENGTH, answer_to_body, request_from_body

Answering = Callable[[Request, TokenEngine, Call, Held], Awaitable[Any]]
"""Returns the object that is answered in JSON, or the whole answer."""


def add_routes(app: FastAPI) -> None:
    """Add the routes of the protocol to an application whose ``state.tokens`` will be set."""
    for path, probe, answer, what in (
        ("/v2/health/live", _live, documents.Liveness, "Whether the process answers."),
        ("/v2/health/ready", _ready, documents.Readiness, "Whether every model answers."),
    ):
        described = documents.probe(what, answer, may_fail=probe is _ready)
        app.add_api_route(path, probe, methods=["GET"], name=path, response_class=Response, **described)
    get = functools.partial(_add, app, "GET")
    post = functools.partial(_add, app, "POST")
    get("/v2", _server, "A description of the server.", documents.ServerDescription)
    get("/v2/models/stats", _all_statistics, "Counters of the models.", documents.CountedModels)
    for where in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        get(where, _metadata, "The tensors that a model takes and returns.", documents.ModelDescription)
        get(f"{where}/ready", _model_ready, "Whether a model answers.", documents.ModelReadiness)
        get(f"{where}/config", _configuration, "The tensors of a model, for Triton.", documents.ModelConfiguration)
        get(f"{where}/stats", _statistics, "Counters of a model.", documents.CountedModels)
        post(f"{where}/infer", _infer, "Vectors of tokens.", documents.Inferred, body=documents.infer_body())
    models = documents.repository_body(ready={"type": "boolean"})
    post("/v2/repository/index", _index, "The models that are loaded.", list[documents.IndexedModel], body=models)
    for end, endpoint, what, names in (
        ("load", _load, "Load a model.", ()),
        ("unload", _unload, "Unload a model.", repository.UNLOAD_PARAMETERS),
    ):
        parameters = {"type": "object", "properties": {key: {} for key in names}, "additionalProperties": False}
        body = documents.repository_body(parameters=parameters)
        post(f"/v2/repository/models/{{name}}/{end}", endpoint, what, documents.Done, body=body, right="admin")


def _add(
    app: FastAPI,
    method: str,
    path: str,
    answering: Answering,
    summary: str,
    answer: Any,
    *,
    body: dict[str, Any] | None = None,
    right: Right = "infer",
) -> None:
    described = documents.operation(path, summary, answer, body=body)
    route = Endpoint(path, _Work(answering), right)
    app.add_api_route(path, route.answer, methods=[method], name=path, response_class=Response, **described)


class _Work:
    """The work of one route."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    async def __call__(self, request: Request, call: Call, held: Held) -> Response:
        answer = await self._answering(request, request.app.state.tokens, call, held)
        return answer if isinstance(answer, Response) else _json(answer)


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value, allow_nan=False), status, media_type=protocol.JSON)


def _named(request: Request) -> tuple[str, str | None]:
    """Return the name and version in the path."""
    found = request.path_params
    return check.text(found["name"], "name"), check.optional_text(found.get("version"), "version")


async def _live(request: Request) -> Response:
    """Tell that the process answers."""
    return _json({"live": True})


async def _ready(request: Request) -> Response:
    """Tell whether every model answers."""
    tokens: TokenEngine = request.app.state.tokens
    ready = await tokens.engine.ready()
    return _json({"ready": ready}, 200 if ready else 503)


async def _server(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    return describe.server()


async def _metadata(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    with tokens.engine.registry.lease(*_named(request)) as model:
        return describe.metadata(model, tokens.engine.registry.infos())


async def _model_ready(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    with tokens.engine.registry.lease(*_named(request)) as model:
        ready = model.verified and not tokens.engine.leaving
        return _json({"name": model.info.name, "ready": ready}, 200 if ready else 503)


async def _configuration(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    with tokens.engine.registry.lease(*_named(request)) as model:
        return describe.configuration(model, tokens.engine.settings)


async def _all_statistics(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    return tokens.statistics.told(tokens.engine.registry.infos())


async def _statistics(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    with tokens.engine.registry.lease(*_named(request)) as model:
        return tokens.statistics.told((model.info,))


async def _infer(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    name, version = _named(request)
    with tokens.engine.registry.lease(name, version):  # an unknown model should not cost the reading of a body
        pass
    body = await LimitedBody(request, tokens.engine, hold, call).body()
    json_length = request.headers.get(JSON_LENGTH)
    call.reserve(await tokens.engine.work(decoded_bytes, protocol.JSON if json_length is None else "", body))
    answer = await while_connected(
        request, tokens.infer(name, version or "", lambda: request_from_body(body, json_length), call)
    )
    with call.stage("encode"):
        content, headers = await tokens.engine.work(answer_to_body, answer)
    return Response(content, headers=headers)


async def _index(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    only_ready = (await _object(request, tokens, hold, "ready")).get("ready", False)
    if not isinstance(only_ready, bool):
        raise InvalidParameterError(f"ready must be true or false; got {check.shown(only_ready)}.", field="ready")
    return repository.index(tokens.engine, only_ready=only_ready)


async def _load(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    body = await _object(request, tokens, hold, "parameters")
    await repository.load(tokens.engine, _named(request)[0], body.get("parameters", {}))
    return {}


async def _unload(request: Request, tokens: TokenEngine, call: Call, hold: Held) -> Any:
    body = await _object(request, tokens, hold, "parameters")
    await repository.unload(tokens.engine, _named(request)[0], body.get("parameters", {}))
    return {}


async def _object(request: Request, tokens: TokenEngine, hold: Held, name: str) -> dict[str, Any]:
    """Read the body: an object that may have the field `name`, or nothing."""
    body = await LimitedBody(request, tokens.engine, hold).body()
    return check.mapping(check.parse_json(body), "body", optional=[name]) if body else {}
