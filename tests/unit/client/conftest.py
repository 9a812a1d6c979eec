from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from perturbscope.client import AsyncClient, AsyncGrpcClient, Client, GrpcClient, RetryPolicy
from perturbscope.inference.embedder import Embedder
from tests.unit.client.fake_server import FakeServer

QUICK = RetryPolicy(attempts=4, first=0.0)
KINDS = ["http-arrow", "http-json", "async-http", "grpc", "async-grpc"]


@pytest.fixture
def server(fake_embedder: Embedder) -> FakeServer:
    return FakeServer(fake_embedder)


@pytest.fixture
def grpc_target(server: FakeServer) -> Iterator[str]:
    with server.grpc() as target:
        yield target


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest, server: FakeServer) -> Callable[..., Any]:
    """A function that makes a client of each kind; call it while an event loop runs."""
    kind = request.param
    if "grpc" in kind:
        target = request.getfixturevalue("grpc_target")
        cls = AsyncGrpcClient if "async" in kind else GrpcClient
        return lambda **options: cls(target, **{"retries": QUICK, **options})
    cls = AsyncClient if "async" in kind else Client
    body = "json" if kind == "http-json" else "arrow"
    return lambda **options: cls(
        "http://server/prefix",
        **{"retries": QUICK, "body": body, "transport": httpx.MockTransport(server.http), **options},
    )


async def done(value: Any) -> Any:
    """Return the result of a method of a blocking or of an asynchronous client."""
    return await value if inspect.isawaitable(value) else value
