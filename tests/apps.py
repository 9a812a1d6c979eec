"""The application and the gRPC server of an engine as the service composes them: with the Open Inference Protocol.

The application is copied, since building all its routes and schemas takes long for every test.
"""

from __future__ import annotations

import copy
import functools
import weakref

from fastapi import FastAPI
from starlette.datastructures import State

from serving.engine.engine import Engine
from serving.grpc.server import GrpcServer
from serving.http.app import _document, build_app
from serving.openinference.grpc import register
from serving.openinference.http import add_routes
from serving.openinference.inference import TokenEngine

_tokens: weakref.WeakKeyDictionary[Engine, TokenEngine] = weakref.WeakKeyDictionary()


def app_of(engine: Engine, *, beside_others: bool = False) -> FastAPI:
    """The application of an engine. Its routes are those of every other such application: add none.

    ``beside_others``: with routes of the kind that BentoML has, which answer "theirs".
    """
    app = copy.copy(_built(beside_others))
    app.openapi = functools.partial(_document, app)  # type: ignore[method-assign]
    app.state = State()
    app.state.engine, app.state.tokens = engine, _tokens_of(engine)
    return app


def grpc_server_of(engine: Engine, *, port: int = 0) -> GrpcServer:
    """A gRPC server of this engine, on a free port."""
    services = [functools.partial(register, _tokens_of(engine))]
    return GrpcServer(engine, host="127.0.0.1", port=port, register_more=services)


def _tokens_of(engine: Engine) -> TokenEngine:
    """The same one for both transports."""
    return _tokens.setdefault(engine, TokenEngine(engine))


@functools.cache
def _built(beside_others: bool) -> FastAPI:
    app = _new_app()
    if beside_others:
        for path in ("/metrics", "/readyz", "/docs.json"):
            app.add_api_route(path, _theirs)
    return app


def new_app_of(engine: Engine) -> FastAPI:
    """A new application of an engine, with an OpenAPI document of its own."""
    app = _new_app()
    app.state.engine, app.state.tokens = engine, _tokens_of(engine)
    return app


def _new_app() -> FastAPI:
    app = build_app()
    add_routes(app)
    return app


def _theirs() -> str:
    return "theirs"
