"""The gRPC interface over a fake model: the same answers and errors as over HTTP; health and reflection."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import CompareRequest, EmbedRequest, ScoreRequest
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.scoring.results import ScoreOptions
from serving.engine.engine import Engine
from serving.grpc.server import SERVICE
from tests.apps import grpc_server_of
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import FAST, LABELS, Connect, MakeEngine

StubOf = Callable[[Engine], Awaitable[Any]]


async def failure(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Return status, text and trailing metadata of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = raised.value
    return error.code(), str(error.details()), {name: str(value) for name, value in error.trailing_metadata() or ()}


async def test_embed_gives_what_the_model_says_offline(
    engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    stub = await stub_of(engine)
    reply = await stub.Embed(protocol.request_to_proto(EmbedRequest(cells=tiny_cells)))
    answer = protocol.answer_from_proto(protocol.EmbedAnswer, reply)
    np.testing.assert_array_equal(answer.values, fake_embedder.embed(tiny_cells).values)
    assert answer.model_id == fake_embedder.model_id
    assert set(answer.timings) == {"tokenize", "queue", "inference"}


async def test_scores_and_pairs_are_those_of_http(
    engine: Engine, stub_of: StubOf, connect: Connect, tiny_cells: CountMatrix
) -> None:
    stub, http = await stub_of(engine), connect(engine)
    options = ScoreOptions(**FAST)
    score = ScoreRequest(cells=tiny_cells, perturbations=LABELS, control="control", options=options)
    compare = CompareRequest(cells=tiny_cells, perturbations=LABELS, options=options)
    reply = await http.post(
        "/v1/score", content=protocol.request_to_json(score), headers={"content-type": protocol.JSON}
    )
    over_grpc = protocol.answer_from_proto(
        protocol.ScoreAnswer, await stub.Score(protocol.request_to_proto(score))
    ).result
    assert over_grpc.table.equals(protocol.answer_from_json(protocol.ScoreAnswer, reply.content).result.table)
    reply = await http.post(
        "/v1/compare", content=protocol.request_to_json(compare), headers={"content-type": protocol.JSON}
    )
    compared = protocol.answer_from_proto(
        protocol.CompareAnswer, await stub.Compare(protocol.request_to_proto(compare))
    ).result
    assert compared.table.equals(protocol.answer_from_json(protocol.CompareAnswer, reply.content).result.table)


async def test_models(engine: Engine, stub_of: StubOf) -> None:
    answer = protocol.answer_from_proto(protocol.ModelsAnswer, await (await stub_of(engine)).Models(pb.ModelsRequest()))
    assert answer == engine.models()


Spoil = Callable[[pb.EmbedRequest], object]
BAD: dict[str, Spoil] = {
    "negative": lambda m: setattr(m.cells, "data", np.full(len(m.cells.data) // 4, -1, "<i4").tobytes()),
    "ragged": lambda m: setattr(m.cells, "indptr", m.cells.indptr[:-8]),
    "cut bytes": lambda m: setattr(m.cells, "data", m.cells.data[:-1]),
    "unknown genes": lambda m: m.cells.gene_ids.__setitem__(slice(None), [f"x{i}" for i in range(40)]),
    "duplicate gene": lambda m: m.cells.gene_ids.__setitem__(0, m.cells.gene_ids[1]),
    "nothing": lambda m: m.ClearField("cells"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_is_typed_and_a_batch_mate_is_unharmed(
    engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix, case: str
) -> None:
    stub = await stub_of(engine)
    good = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
    bad = pb.EmbedRequest()
    bad.CopyFrom(good)
    BAD[case](bad)
    mate = stub.Embed(good)
    status, text, trailing = await failure(stub.Embed(bad))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert trailing["perturbscope-code"] in {
        "not_raw_counts",
        "malformed_matrix",
        "unknown_genes",
        "duplicate_genes",
        "invalid_parameter",
    }
    assert text
    assert len(protocol.answer_from_proto(protocol.EmbedAnswer, await mate)) == 24


async def test_an_unknown_model_is_not_found(engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix) -> None:
    stub = await stub_of(engine)
    message = protocol.request_to_proto(EmbedRequest(cells=tiny_cells, model="nöpe"))
    status, text, trailing = await failure(stub.Embed(message))
    assert (status, trailing["perturbscope-code"]) == (grpc.StatusCode.NOT_FOUND, "unknown_model")
    assert trailing["perturbscope-field"] == "model"
    assert "there is fake" in text


async def test_an_error_that_is_long_and_strange_is_still_answered(
    engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise InvalidParameterError("ü" * 100_000, field="größe\n\x00")

    monkeypatch.setattr("serving.access.limits.check_shape", refuse)
    stub = await stub_of(engine)
    _, text, trailing = await failure(stub.Embed(protocol.request_to_proto(EmbedRequest(cells=tiny_cells))))
    assert text.startswith("ü")
    assert trailing["perturbscope-field"] == r"gr\xf6\xdfe"


async def test_limits_and_overload(make_engine: MakeEngine, stub_of: StubOf, tiny_cells: CountMatrix) -> None:
    message = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
    small = await stub_of(make_engine(max_cells=3))
    status, _, trailing = await failure(small.Embed(message))
    assert (status, trailing["perturbscope-code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "limit_exceeded")
    engine = make_engine(max_requests=1)
    busy = await stub_of(engine)
    with engine.admission.admit():
        status, _, trailing = await failure(busy.Embed(message))
    assert (status, trailing["perturbscope-code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
    assert int(trailing["retry-after"]) >= 1


async def test_a_message_over_the_limit_is_refused(
    make_engine: MakeEngine, stub_of: StubOf, tiny_cells: CountMatrix
) -> None:
    message = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
    stub = await stub_of(make_engine(max_body_bytes=1000))
    status, _, trailing = await failure(stub.Embed(message))
    assert (status, trailing["perturbscope-code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "limit_exceeded")
    message.cells.gene_ids.append("x" * 200_000)
    status, text, _ = await failure(stub.Embed(message))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text


async def test_a_bug_of_ours_is_internal_and_tells_no_secret(
    engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("serving.access.limits.check_shape", broken)
    stub = await stub_of(engine)
    status, text, trailing = await failure(stub.Embed(protocol.request_to_proto(EmbedRequest(cells=tiny_cells))))
    assert (status, trailing["perturbscope-code"]) == (grpc.StatusCode.INTERNAL, "internal")
    assert "secret" not in text
    assert trailing["perturbscope-request-id"] in text


async def test_a_caller_that_gives_up_costs_no_compute(
    engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    gate = fake_embedder.encoder.gate = threading.Event()
    stub = await stub_of(engine)
    message = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
    first = asyncio.ensure_future(stub.Embed(message))
    async with asyncio.timeout(60):
        while not fake_embedder.encoder.batches:
            await asyncio.sleep(0.001)
    status, _, _ = await failure(stub.Embed(message, timeout=0.3))
    assert status is grpc.StatusCode.DEADLINE_EXCEEDED
    dispatcher = engine.registry.default.dispatcher
    alone = int(fake_embedder.tokenize(tiny_cells).offsets[-1])
    async with asyncio.timeout(60):
        while dispatcher.pending_tokens > alone:
            await asyncio.sleep(0.001)
    gate.set()
    await first
    assert len(fake_embedder.encoder.batches) == 1


async def test_health_and_reflection(engine: Engine) -> None:
    server = grpc_server_of(engine)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask() -> Any:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)

        replies = [reply async for reply in reflection.ServerReflectionInfo(ask())]
        names = {service.name for service in replies[0].list_services_response.service}
        assert {"perturbscope.v1.PerturbScope", "grpc.health.v1.Health"} <= names
        file = FileDescriptorProto.FromString(replies[1].file_descriptor_response.file_descriptor_proto[0])
        assert file.package == "perturbscope.v1"
    await server.stop()


async def test_a_taken_port_is_an_error_not_a_second_listener(engine: Engine) -> None:
    first = grpc_server_of(engine)
    port = await first.start()
    second = grpc_server_of(engine, port=port)
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}.*PERTURBSCOPE_GRPC_PORT"):
        await second.start()
    await first.stop()


def test_the_service_has_the_name_of_the_interface() -> None:
    assert SERVICE == "perturbscope.v1.PerturbScope"
    assert json.dumps(sorted(pb.DESCRIPTOR.services_by_name["PerturbScope"].methods_by_name)) == (
        '["Compare", "Embed", "EmbedStream", "Models", "Score"]'
    )
