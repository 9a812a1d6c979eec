"""Bytes that protobuf cannot read are the caller's mistake, with every method."""

from __future__ import annotations

import contextlib

import grpc
import pytest

from serving.engine.engine import Engine
from tests.apps import grpc_server_of

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
