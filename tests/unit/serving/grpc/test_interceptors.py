"""Messages are read late or never; bytes that protobuf cannot read are the caller's mistake, with every method."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from serving.engine.engine import Engine
from serving.grpc import health
from serving.grpc.interceptors import OPEN
from tests.apps import grpc_server_of
from tests.unit.serving.conftest import MakeEngine

UNARY = (
    "perturbscope.v1.PerturbScope/Embed",
    "perturbscope.v1.PerturbScope/Score",
    "inference.GRPCInferenceService/ModelInfer",
)
STREAMS = ("perturbscope.v1.PerturbScope/EmbedStream", "inference.GRPCInferenceService/ModelStreamInfer")


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff", b"\x0a\x03\x0a\x01\xff"], ids=["tag", "length", "not UTF-8"])
async def test_bytes_that_are_no_message_are_refused(
    engine: Engine, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    server = grpc_server_of(engine)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in UNARY:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(f"/{method}")(data)
            metadata = dict(raised.value.trailing_metadata() or ())
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert metadata["perturbscope-code"] == "unreadable_file"
            assert metadata["x-request-id"]
        for method in STREAMS:
            call = channel.stream_stream(f"/{method}")()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await call.write(data)
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert await call.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
    await server.stop()
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.name.startswith("grpc")]


async def test_a_message_that_does_not_come_is_not_waited_for(make_engine: MakeEngine) -> None:
    engine = make_engine(body_timeout=1)
    server = grpc_server_of(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        for method in UNARY:
            call = channel.stream_unary(f"/{method}")()
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "did not arrive within 1 seconds" in await call.details()
            empty = channel.stream_unary(f"/{method}")()
            await empty.done_writing()
            assert await empty.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert engine.admission.in_progress == 0
    await server.stop()


async def test_open_methods_answer_before_anything_is_sent(engine: Engine) -> None:
    server = grpc_server_of(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel, asyncio.timeout(30):
        for method in OPEN:
            call = channel.stream_stream(method)()
            assert await call.read() is not grpc.aio.EOF, method
            call.cancel()
    await server.stop()


async def test_one_address_does_not_take_all_watches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WATCHERS", 8)
    server = grpc_server_of(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel, asyncio.timeout(30):
        watch = channel.stream_stream("/grpc.health.v1.Health/Watch")
        calls = []
        for _ in range(6):
            calls.append(watch())
            await calls[-1].read()
        assert await watch().code() is grpc.StatusCode.UNIMPLEMENTED
        calls[0].cancel()
        await asyncio.sleep(0.1)
        calls.append(watch())
        await calls[-1].read()
        for call in calls:
            call.cancel()
    await server.stop()
