"""``grpc.health.v1.Health``: every service by name, and a state that follows the models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InferenceError
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest
from serving.engine.engine import Engine
from serving.grpc import health as serving_health
from serving.grpc.server import GrpcServer
from tests.apps import grpc_server_of
from tests.fakes import FakeEncoder

NAMES = ("", "perturbscope.v1.PerturbScope", "inference.GRPCInferenceService")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def server(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[GrpcServer, grpc.aio.Channel]]:
    monkeypatch.setattr(serving_health, "EVERY", 0.01)
    server = grpc_server_of(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        yield server, channel
    await server.stop()


async def states(channel: grpc.aio.Channel) -> list[int]:
    stub = health_pb2_grpc.HealthStub(channel)
    return [(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in NAMES]


async def lose(engine: Engine, cells: CountMatrix, embedder: Embedder) -> None:
    """Let the model fail once, and ever after."""
    assert isinstance(embedder.encoder, FakeEncoder)
    embedder.encoder.error = RuntimeError("lost")
    with pytest.raises(InferenceError):
        await engine.embed(EmbedRequest(cells=cells))


async def test_the_state_follows_the_models(
    engine: Engine,
    server: tuple[GrpcServer, grpc.aio.Channel],
    tiny_cells: CountMatrix,
    fake_embedder: Embedder,
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    _, channel = server
    assert await states(channel) == [SERVING] * 3
    await lose(engine, tiny_cells, fake_embedder)
    assert await states(channel) == [NOT_SERVING] * 3
    fake_embedder.encoder.error = None
    assert await states(channel) == [SERVING] * 3


async def test_who_watches_is_told_of_a_change(
    engine: Engine,
    server: tuple[GrpcServer, grpc.aio.Channel],
    tiny_cells: CountMatrix,
    fake_embedder: Embedder,
) -> None:
    _, channel = server
    async with asyncio.timeout(60):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAMES[2]))
        assert (await watch.read()).status == SERVING
        await lose(engine, tiny_cells, fake_embedder)
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_reflection_lists_and_describes_both_services(server: tuple[GrpcServer, grpc.aio.Channel]) -> None:
    _, channel = server

    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        for name in NAMES[1:]:
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed, *files = [reply async for reply in stub.ServerReflectionInfo(ask())]
    assert set(NAMES[1:]) <= {service.name for service in listed.list_services_response.service}
    assert all(reply.file_descriptor_response.file_descriptor_proto for reply in files)
