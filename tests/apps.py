"""The ASGI application of an engine, without building all its routes and schemas for every test."""

from __future__ import annotations

import copy
import functools

from fastapi import FastAPI
from starlette.datastructures import State

from serving.engine.engine import Engine
from serving.http.app import _document, build_app


def app_of(engine: Engine, *, beside_others: bool = False) -> FastAPI:
    """What ``build_app()`` makes, for this engine. Its routes are those of every other such application: add none.

    ``beside_others``: with routes of the kind that BentoML has, which answer "theirs".
    """
    app = copy.copy(_built(beside_others))
    app.openapi = functools.partial(_document, app)  # type: ignore[method-assign]
    app.state = State()
    app.state.engine = engine
    return app


@functools.cache
def _built(beside_others: bool) -> FastAPI:
    app = build_app()
    if beside_others:
        for path in ("/metrics", "/readyz", "/docs.json"):
            app.add_api_route(path, _theirs)
    return app


def _theirs() -> str:
    return "theirs"
