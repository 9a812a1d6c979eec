"""The shutdown begins with the signal."""

from __future__ import annotations

import asyncio
import signal
import threading

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest
from perturbscope.protocol.proto import open_inference_pb2 as pb
from perturbscope.protocol.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub
from serving.access.front import Front
from serving.engine.engine import Engine
from serving.engine.shutdown import Stopping
from serving.http.gate import Gate
from tests.apps import app_of, grpc_server_of
from tests.fakes import FakeEncoder


class Recorder:
    """A server that notes when it is stopped, and a signal handler that notes when it is called."""

    def __init__(self) -> None:
        self.stopped = self.left = 0
        self.signals: list[int] = []

    async def leave(self) -> None:
        self.left += 1

    async def stop(self) -> None:
        self.stopped += 1

    def handle(self, number: int, frame: object) -> None:
        self.signals.append(number)


async def test_the_signal_refuses_what_is_new_at_once_and_finishes_the_rest(
    engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    gate = fake_embedder.encoder.gate = threading.Event()
    recorder, call = Recorder(), Front.begin("/v1/embed", "http", {})

    async def ask() -> int:
        async with engine.front.admitted(call):
            return len(await engine.embed(EmbedRequest(cells=tiny_cells), call))

    accepted = asyncio.ensure_future(ask())
    async with asyncio.timeout(60):
        while not fake_embedder.encoder.batches:
            await asyncio.sleep(0.001)
    before = {number: signal.signal(number, recorder.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stopping = Stopping(engine, recorder)
        stopping.listen()
        signal.raise_signal(signal.SIGTERM)
        assert recorder.signals == [signal.SIGTERM]
        async with asyncio.timeout(60):
            while not engine.admission.closed:
                await asyncio.sleep(0.001)
        assert not await engine.ready()
        assert not accepted.done()
        gate.set()
        await stopping.begin()
        assert await accepted == 24
        assert recorder.stopped == 1
        assert stopping.begin().done()
        stopping.forget()
        assert signal.getsignal(signal.SIGTERM) == recorder.handle
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def test_the_drain_delay_takes_requests_and_is_not_ready(engine: Engine, tiny_cells: CountMatrix) -> None:
    """On every probe of both transports; connections are told to end, a second SIGTERM changes nothing."""
    server = grpc_server_of(engine)
    app = Gate(app_of(engine), front=lambda: engine.front)
    recorder = Recorder()
    before = {number: signal.signal(number, recorder.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel,
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http,
        ):
            stopping = Stopping(engine, server, delay=2.0)
            stopping.listen()
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
            signal.raise_signal(signal.SIGTERM)
            async with asyncio.timeout(1.5):
                assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            signal.raise_signal(signal.SIGTERM)
            assert recorder.signals == []
            for path in ("/v2/health/ready", "/v2/models/fake/ready"):
                assert (await http.get(path)).status_code == 503, path
            assert (await http.get("/v2/health/live")).status_code == 200
            open_inference = GRPCInferenceServiceStub(channel)
            assert not (await open_inference.ServerReady(pb.ServerReadyRequest())).ready
            assert not (await open_inference.ModelReady(pb.ModelReadyRequest(name="fake"))).ready
            assert not await engine.ready()
            content, kind = protocol.request_to_arrow(EmbedRequest(cells=tiny_cells)), {"content-type": protocol.ARROW}
            reply = await http.post("/v1/embed", content=content, headers=kind)
            assert (reply.status_code, reply.headers["connection"]) == (200, "close")
            request = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
            assert (await PerturbScopeStub(channel).Embed(request)).ByteSize() > 100
            async with asyncio.timeout(30):
                while not recorder.signals:
                    await asyncio.sleep(0.01)
            assert recorder.signals == [signal.SIGTERM]
            assert engine.admission.closed
            await stopping.begin()
            stopping.forget()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def test_an_interrupt_ends_the_drain_delay(engine: Engine) -> None:
    recorder = Recorder()
    before = {number: signal.signal(number, recorder.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stopping = Stopping(engine, recorder, delay=600.0)
        stopping.listen()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        assert (recorder.left, recorder.signals) == (1, [])
        signal.raise_signal(signal.SIGINT)
        assert recorder.signals == [signal.SIGINT]
        await stopping.begin()
        assert recorder.stopped == 1
        stopping.forget()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
