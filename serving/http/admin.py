"""HTTP routes of the operator, to load and unload models. They need an API key with the right ``admin``.

A bundle is named by its folder in the model repository, never by a path; see :mod:`serving.models.repository`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from perturbscope import protocol
from perturbscope.errors import InvalidParameterError
from serving.access.limits import Held
from serving.call import Call
from serving.engine.engine import Engine
from serving.http import openapi, schemas
from serving.http.edge import Endpoint, while_connected

Change = Callable[[Engine, Request], Awaitable[Any]]
_STATUSES = (401, 403, 404, 413, 422, 429, 500, 504)
_CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": schemas.ErrorAnswer, "description": "The bundle cannot be served; what was served before still is."}
}


class ListedBundle(BaseModel):
    """A model that is loaded, or a bundle folder that is not."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of the model; name of the folder if the model is not loaded.")
    version: str = Field(description="Version of the model; empty if it is not known.")
    folder: str = Field(description="Name of the bundle folder, as /v1/models/{name}/load takes it.")
    state: str = Field(description="READY or UNAVAILABLE.")
    reason: str = Field(description="Why the model, or a newer bundle, is not served; empty if all is well.")


class RepositoryAnswer(BaseModel):
    """Loaded models, and bundle folders that could be loaded."""

    model_config = ConfigDict(extra="forbid")

    bundles: list[ListedBundle]


def router() -> APIRouter:
    """Return the routes; the application's ``state.engine`` must be set before the first request."""
    routes = APIRouter()
    for path, method, change, answer, what in (
        ("/v1/models/{name}/load", "POST", _load, schemas.Model, "Load a bundle, or load it again."),
        ("/v1/models/{name}/unload", "POST", _unload, schemas.Model, "Stop serving a model."),
        ("/v1/repository", "GET", _index, RepositoryAnswer, "Loaded models, and bundle folders that could be loaded."),
    ):
        routes.add_api_route(
            path,
            Endpoint(path, _Change(change), "admin").answer,
            methods=[method],
            summary=what,
            name=path.rsplit("/", 1)[-1],
            response_class=Response,
            responses={200: {"model": answer}, **openapi.refusals(_STATUSES), **_CONFLICT},
            openapi_extra={"parameters": _parameters(path)},
        )
    return routes


def _parameters(path: str) -> list[dict[str, Any]]:
    text = {"type": "string"}
    name = {"name": "name", "in": "path", "required": True, "description": "Name of the folder.", "schema": text}
    if path.endswith("/unload"):
        version = "Version of the model, if several are loaded."
        return [
            {**name, "description": "Name of the folder, or of the model."},
            {"name": "version", "in": "query", "description": version, "schema": text},
        ]
    return [name] if "{name}" in path else []


class _Change:
    """The work of one route: a change of the registry, or a look into it, answered in JSON."""

    def __init__(self, change: Change) -> None:
        self._change = change

    async def __call__(self, request: Request, call: Call, held: Held) -> Response:
        answer = await while_connected(request, self._change(request.app.state.engine, request))
        return Response(json.dumps(answer), media_type=protocol.JSON)


async def _load(engine: Engine, request: Request) -> Any:
    """Load a bundle; a caller that goes away does not stop it."""
    return asdict(await engine.registry.load(request.path_params["name"]))


async def _unload(engine: Engine, request: Request) -> Any:
    unknown = set(request.query_params) - {"version"}
    if unknown:
        raise InvalidParameterError(f"Unknown parameter {min(unknown)[:40]!r}; there is version.", field="version")
    version = request.query_params.get("version")
    return asdict(await engine.registry.unload(request.path_params["name"], version or None))


async def _index(engine: Engine, request: Request) -> Any:
    return {"bundles": [asdict(item) for item in engine.registry.index()]}
