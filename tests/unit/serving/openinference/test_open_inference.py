"""The Open Inference Protocol over a fake model: the same over HTTP and gRPC, and its refusals."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.families.tokens import pad
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedAnswer, EmbedRequest, answer_from_proto, request_to_proto
from perturbscope.protocol.proto import open_inference_pb2 as pb
from perturbscope.protocol.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub
from serving.access.keys import Key, keys_to_json, make_key
from serving.engine.engine import Engine
from serving.grpc.server import GrpcServer
from serving.openinference.json_codec import JSON_LENGTH
from serving.openinference.tensors import REFUSED
from tests.apps import grpc_server_of
from tests.bundles import TINY_WIDTH
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import Connect, MakeEngine
from tests.unit.serving.grpc.test_server import failure

INFER = "/v2/models/fake/infer"
Arrays = dict[str, NDArray[np.int64]]


@pytest.fixture
def arrays(fake_embedder: Embedder, tiny_cells: CountMatrix) -> Arrays:
    """The tiny cells as padded tokens."""
    tokens = fake_embedder.tokenize(tiny_cells)
    return pad(tokens, np.arange(len(tokens)), fake_embedder.family.inputs)


def tensor(name: str, values: NDArray[Any], **changes: Any) -> dict[str, Any]:
    """An input in JSON."""
    return {"name": name, "datatype": "INT64", "shape": list(values.shape), "data": values.ravel().tolist(), **changes}


def body_of(arrays: Arrays, **changes: Any) -> dict[str, Any]:
    return {"inputs": [tensor(name, values) for name, values in arrays.items()], **changes}


def message_of(arrays: Arrays, **changes: Any) -> pb.ModelInferRequest:
    """The same over gRPC, as bytes."""
    return pb.ModelInferRequest(
        model_name="fake",
        inputs=[
            pb.ModelInferRequest.InferInputTensor(name=name, datatype="INT64", shape=values.shape)
            for name, values in arrays.items()
        ],
        raw_input_contents=[values.astype("<i8").tobytes() for values in arrays.values()],
        **changes,
    )


Target = Callable[[Engine], Any]


@pytest.fixture
async def channel_of() -> AsyncIterator[Target]:
    """A channel to an engine, on a free port."""
    servers: list[GrpcServer] = []
    channels: list[grpc.aio.Channel] = []

    async def make(engine: Engine) -> grpc.aio.Channel:
        server = grpc_server_of(engine)
        servers.append(server)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}"))
        return channels[-1]

    yield make
    for channel in channels:
        await channel.close()
    for server in servers:
        await server.stop()


def values_of(reply: pb.ModelInferResponse) -> NDArray[np.float32]:
    (output,) = reply.outputs
    assert (output.name, output.datatype) == ("cell_embedding", "FP32")
    return np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(output.shape)


async def test_tokens_give_the_vectors_of_their_cells_on_every_way(
    engine: Engine, connect: Connect, channel_of: Target, arrays: Arrays, tiny_cells: CountMatrix
) -> None:
    http, channel = connect(engine), await channel_of(engine)
    stub = GRPCInferenceServiceStub(channel)
    embed = PerturbScopeStub(channel).Embed(request_to_proto(EmbedRequest(cells=tiny_cells)))
    expected = answer_from_proto(EmbedAnswer, await embed).values

    raw = values_of(await stub.ModelInfer(message_of(arrays, id="mine")))
    np.testing.assert_array_equal(raw, expected)

    reply = (await http.post(INFER, json=body_of(arrays, id="mine"))).json()
    assert (reply["id"], reply["model_name"], reply["model_version"]) == ("mine", "fake", "1.0")
    (output,) = reply["outputs"]
    values = np.array(output["data"], np.float32).reshape(output["shape"])
    np.testing.assert_array_equal(values, expected)

    inputs = [tensor(name, values, data=values.tolist()) for name, values in arrays.items()]  # nested lists
    inputs[1] |= {"datatype": "INT32"}
    reply = await http.post("/v2/models/fake/versions/1.0/infer", json={"inputs": inputs})
    assert reply.json()["outputs"][0]["data"] == output["data"]

    reply = await http.post(INFER, **binary(arrays, {"parameters": {"binary_data_output": True}}))
    size = int(reply.headers[JSON_LENGTH])
    (output,) = json.loads(reply.content[:size])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(reply.content) - size
    np.testing.assert_array_equal(np.frombuffer(reply.content[size:], "<f4").reshape(output["shape"]), expected)

    message = message_of(arrays)
    del message.raw_input_contents[:]
    for item, values in zip(message.inputs, arrays.values(), strict=True):
        item.contents.int64_contents.extend(values.ravel().tolist())
    np.testing.assert_array_equal(values_of(await stub.ModelInfer(message)), expected)


def binary(arrays: Arrays, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a request with its tensors after the JSON, as arguments of httpx."""
    inputs = [
        {
            "name": name,
            "datatype": "INT64",
            "shape": list(values.shape),
            "parameters": {"binary_data_size": values.nbytes},
        }
        for name, values in arrays.items()
    ]
    head = json.dumps({"inputs": inputs, **(more or {})}).encode()
    rest = b"".join(values.tobytes() for values in arrays.values())
    return {"content": head + rest, "headers": {JSON_LENGTH: str(len(head))}}


async def test_tokens_share_their_batches_with_raw_counts(
    engine: Engine, connect: Connect, arrays: Arrays, embed_json: dict[str, Any], fake_embedder: Embedder
) -> None:
    """Both wait while the model is busy, and are then run together."""
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    gate = fake_embedder.encoder.gate = threading.Event()
    http = connect(engine)
    first = asyncio.create_task(http.post("/v1/embed", json=embed_json))
    dispatcher = engine.registry.default.dispatcher
    async with asyncio.timeout(30):
        while not fake_embedder.encoder.batches:
            await asyncio.sleep(0.001)
    busy = dispatcher.pending_tokens
    others = [
        asyncio.create_task(http.post("/v1/embed", json=embed_json)),
        asyncio.create_task(http.post(INFER, json=body_of(arrays))),
    ]
    async with asyncio.timeout(30):
        while dispatcher.pending_tokens < 3 * busy:
            await asyncio.sleep(0.001)
    gate.set()
    assert [reply.status_code for reply in await asyncio.gather(first, *others)] == [200] * 3
    assert [cells for cells, _ in fake_embedder.encoder.batches] == [24, 48]


def changed(name: str, change: Callable[[NDArray[Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Spoil an input of a JSON body by a change of its array."""

    def spoil(body: dict[str, Any]) -> None:
        item = next(item for item in body["inputs"] if item["name"] == name)
        values = np.array(item["data"]).reshape(item["shape"])
        found = change(values)
        values = values if found is None else found
        item.update(shape=list(values.shape), data=values.ravel().tolist())

    return spoil


def set_at(row: int, column: int, value: int) -> Callable[[NDArray[Any]], None]:
    return lambda values: values.__setitem__((row, column), value)


def first(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Spoil fields of the first input, ``input_ids``."""
    return lambda body: body["inputs"][0].update(changes)


IDS, MASK = "input_ids", "attention_mask"
BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "id outside": (changed(IDS, set_at(3, 0, 10**6)), "invalid_parameter", "1000000 in row 3 of the input 'input_ids'"),
    "negative id": (changed(IDS, set_at(0, 0, -1)), "invalid_parameter", "-1 in row 0"),
    "padding as a token": (changed(IDS, set_at(2, 0, 0)), "invalid_parameter", "0 is padding"),
    "mask with a gap": (changed(MASK, set_at(4, 0, 0)), "malformed_matrix", "Row 4 of the input 'attention_mask'"),
    "mask of twos": (changed(MASK, set_at(4, 0, 2)), "malformed_matrix", "0 and 1"),
    "empty row": (changed(MASK, lambda a: a.__setitem__(5, 0)), "empty_cell", "Row 5"),
    "no rows": (changed(IDS, lambda a: a[:0]), "malformed_matrix", "every size must be an integer from 1 on"),
    "one axis": (changed(IDS, lambda a: a.ravel()), "malformed_matrix", "[batch, length] is needed"),
    "other batch": (changed(IDS, lambda a: a[:3]), "malformed_matrix", "must agree"),
    "mask of one axis": (changed(MASK, lambda a: a.ravel()), "malformed_matrix", "'attention_mask' has the shape"),
    "too few values": (first(data=[1, 2]), "malformed_matrix", "'input_ids' has 2 values"),
    "a huge shape": (first(shape=[2**30, 2**30]), "malformed_matrix", "needs 1,152,921,504,606,846,976"),
    "a shape past all": (first(shape=[2**62, 4]), "malformed_matrix", "must be an integer from 1"),
    "a negative shape": (first(shape=[-1, -1]), "malformed_matrix", "must be an integer"),
    "a shape of floats": (first(shape=[1.0, 2.0]), "malformed_matrix", "must be an integer"),
    "no shape": (first(shape=None), "invalid_parameter", "shape"),
    "no data": (first(data=None), "malformed_matrix", "input_ids must be a list of numbers"),
    "text": (first(data=["a"]), "malformed_matrix", "must hold numbers only"),
    "floats": (first(data=[0.5] * 4, shape=[2, 2]), "malformed_matrix", "no integers of that type"),
    "past 32 bits": (first(data=[2**40], shape=[1, 1], datatype="INT32"), "malformed_matrix", "no integers of that"),
    "ragged lists": (first(data=[[1, 2], [3]], shape=[2, 2]), "malformed_matrix", "not nested as its shape says"),
    "FP32 for tokens": (first(datatype="FP32"), "malformed_matrix", "has the datatype FP32; the model takes INT64"),
    "unknown type": (first(datatype="BYTES"), "malformed_matrix", "INT32, INT64, FP32 are taken"),
    "unknown input": (first(name="tokens"), "malformed_matrix", "The input 'input_ids' is missing"),
    "one too many": (lambda b: b["inputs"].append({**b["inputs"][0], "name": "x"}), "malformed_matrix", "no input 'x'"),
    "given twice": (lambda b: b["inputs"].append(b["inputs"][0]), "malformed_matrix", "'input_ids' is given twice"),
    "no inputs": (lambda b: b.clear(), "invalid_parameter", "inputs must be a list"),
    "many inputs": (lambda b: b["inputs"].extend([{}] * 99), "invalid_parameter", "inputs has 101 items"),
    "inputs of text": (lambda b: b.update(inputs=["x"]), "invalid_parameter", "inputs must be an object"),
    "unknown output": (lambda b: b.update(outputs=[{"name": "logits"}]), "invalid_parameter", "no output 'logits'"),
    "shared memory": (first(parameters={"shared_memory_region": "a"}), "invalid_parameter", "'shared_memory_region'"),
    "a sequence": (lambda b: b.update(parameters={REFUSED[0]: 1}), "invalid_parameter", "'sequence_id'"),
    "bytes that are not there": (
        first(data=..., parameters={"binary_data_size": 8}),
        "malformed_matrix",
        "only 0 follow",
    ),
    "both forms": (first(parameters={"binary_data_size": 0}), "malformed_matrix", "both 'data' and"),
    "no flag": (lambda b: b.update(parameters={"binary_data_output": "yes"}), "invalid_parameter", "true or false"),
    "an id that is no text": (lambda b: b.update(id=7), "invalid_parameter", "id must be a string"),
}


async def test_bad_tensors_are_refused_by_name_before_they_cost_anything(
    http: httpx.AsyncClient, fake_embedder: Embedder, arrays: Arrays, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    for case, (spoil, code, message) in BAD.items():
        body = body_of(arrays)
        spoil(body)
        body["inputs"] = [
            {key: value for key, value in item.items() if value is not ...} if isinstance(item, dict) else item
            for item in body.get("inputs", [])
        ] if body else None  # fmt: skip
        with caplog.at_level("INFO", "perturbscope.serving"):
            reply = await http.post(INFER, json=body)
        assert reply.status_code == 422, f"{case}: {reply.text}"
        assert message in reply.json()["error"], case
        assert f"code={code}" in caplog.messages[-1], case
    assert not fake_embedder.encoder.batches


async def test_limits_are_those_of_all_requests(
    make_engine: MakeEngine, connect: Connect, arrays: Arrays, fake_embedder: Embedder
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    engine = make_engine(max_cells=23, max_body_bytes=100_000)
    http = connect(engine)
    reply = await http.post(INFER, json=body_of(arrays))
    assert reply.status_code == 413
    assert "24 cells; this server takes 23" in reply.json()["error"]
    long = {name: np.tile(values[:1, :1], (1, 2049)) for name, values in arrays.items()}
    reply = await http.post(INFER, json=body_of(long))
    assert reply.status_code == 413
    assert "row 0 of 'attention_mask' has 2,049 tokens; the model takes 2,048" in reply.json()["error"]
    assert (await http.post(INFER, content=bytes(100_001))).status_code == 413
    assert (await http.post(INFER, json=body_of(arrays), headers={"x-request-timeout": "1e9"})).status_code == 422
    with engine.admission.admit():
        engine.admission.closed = True
        reply = await http.post(INFER, json=body_of(arrays))
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "5")
    assert not fake_embedder.encoder.batches


@pytest.mark.parametrize("length", ["x", "-1", "99999999", "1e3", "²"])
async def test_the_length_of_the_json_must_be_that(http: httpx.AsyncClient, arrays: Arrays, length: str) -> None:
    sent = binary(arrays) | {"headers": [(JSON_LENGTH.encode(), length.encode())]}
    reply = await http.post(INFER, **sent)
    assert reply.status_code == 422
    assert JSON_LENGTH in reply.json()["error"]


async def test_bytes_that_nobody_owns_are_refused(http: httpx.AsyncClient, arrays: Arrays) -> None:
    sent = binary(arrays)
    sent["content"] += b"more"
    assert "4 bytes follow the last tensor" in (await http.post(INFER, **sent)).json()["error"]


SpoilMessage = Callable[[pb.ModelInferRequest], Any]
BAD_MESSAGES: dict[str, tuple[SpoilMessage, str]] = {
    "cut bytes": (lambda m: m.raw_input_contents.__setitem__(0, b"1234567"), "'input_ids' has 7 bytes"),
    "raw contents missing": (lambda m: m.raw_input_contents.pop(), "2 inputs and 1 raw contents"),
    "both forms": (lambda m: m.inputs[0].contents.int64_contents.append(1), "both contents and raw contents"),
    "no contents": (lambda m: m.ClearField("raw_input_contents"), "'input_ids' has 0 values"),
    "contents of another type": (
        lambda m: (m.ClearField("raw_input_contents"), m.inputs[0].contents.fp32_contents.append(1)),
        "fp32_contents; int64_contents is where it belongs",
    ),
    "a huge shape": (lambda m: m.inputs[0].shape.__setitem__(0, 2**62), "must be an integer from 1 on"),
    "many axes": (lambda m: m.inputs[0].shape.extend([1] * 100_000), "[batch, length] is needed"),
    "given twice": (lambda m: setattr(m.inputs[1], "name", "input_ids"), "'input_ids' is given twice"),
    "many inputs": (lambda m: [m.inputs.add() for _ in range(99)], "The request has 101 inputs"),
    "unknown output": (lambda m: m.outputs.add(name="logits"), "no output 'logits'"),
    "classification": (
        lambda m: m.outputs.add(name="cell_embedding").parameters["classification"].SetInParent(),
        "'classification' is not supported",
    ),
    "a long id": (lambda m: setattr(m, "id", "x" * 600), "600 characters"),
    "a timeout": (lambda m: m.parameters["timeout"].SetInParent(), "set a deadline"),
}


async def test_bad_messages_are_refused_by_name(
    engine: Engine, channel_of: Target, fake_embedder: Embedder, arrays: Arrays
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    stub = GRPCInferenceServiceStub(await channel_of(engine))
    for case, (spoil, text) in BAD_MESSAGES.items():
        message = message_of(arrays)
        spoil(message)
        status, details, trailing = await failure(stub.ModelInfer(message))
        assert status is grpc.StatusCode.INVALID_ARGUMENT, case
        assert trailing["perturbscope-code"] != "internal", case
        assert text in details, case
    assert not fake_embedder.encoder.batches


async def test_a_stream_answers_in_order_and_goes_on_after_an_error(
    engine: Engine, channel_of: Target, arrays: Arrays
) -> None:
    stub = GRPCInferenceServiceStub(await channel_of(engine))
    bad = message_of(arrays, id="bad")
    bad.model_name = "nope"
    sent = [message_of(arrays, id="one"), bad, message_of(arrays, id="two")]
    replies = [reply async for reply in stub.ModelStreamInfer(iter(sent))]
    assert [reply.infer_response.id for reply in replies] == ["one", "bad", "two"]
    assert [bool(reply.error_message) for reply in replies] == [False, True, False]
    assert "there is fake" in replies[1].error_message
    np.testing.assert_array_equal(values_of(replies[0].infer_response), values_of(replies[2].infer_response))


async def test_what_is_told_of_server_and_models(engine: Engine, connect: Connect, channel_of: Target) -> None:
    http, stub = connect(engine), GRPCInferenceServiceStub(await channel_of(engine))
    shapes = {
        "inputs": [{"name": name, "datatype": "INT64", "shape": [-1, -1]} for name in (IDS, MASK)],
        "outputs": [{"name": "cell_embedding", "datatype": "FP32", "shape": [-1, TINY_WIDTH]}],
    }
    found = (await http.get("/v2/models/fake")).json()
    properties = found.pop("properties")
    assert (properties["max_length"], properties["vocabulary_genes"]) == ("2048", "25424")
    assert found == {"name": "fake", "versions": ["1.0"], "platform": "onnxruntime_onnx", **shapes}
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="fake", version="1.0"))
    assert [(item.name, item.datatype, list(item.shape)) for item in metadata.inputs] == [
        (IDS, "INT64", [-1, -1]),
        (MASK, "INT64", [-1, -1]),
    ]
    assert dict(metadata.properties) == properties
    config = (await http.get("/v2/models/fake/config")).json()
    assert config["parameters"]["max_length"] == {"string_value": "2048"}
    assert config["output"] == [{"name": "cell_embedding", "data_type": "TYPE_FP32", "dims": [TINY_WIDTH]}]
    reply = (await stub.ModelConfig(pb.ModelConfigRequest(name="fake"))).config
    assert reply.input[0].data_type == pb.TYPE_INT64
    assert reply.parameters["max_length"].string_value == "2048"
    assert (await http.get("/v2")).json()["name"] == (await stub.ServerMetadata(pb.ServerMetadataRequest())).name
    index = [{"name": "fake", "version": "1.0", "state": "READY", "reason": ""}]
    assert (await http.post("/v2/repository/index")).json() == index
    assert (await http.post("/v2/repository/index", json={"ready": True})).json() == index
    (model,) = (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert (model.name, model.version, model.state) == ("fake", "1.0", "READY")


async def test_readiness_follows_the_model(
    engine: Engine, connect: Connect, channel_of: Target, fake_embedder: Embedder, arrays: Arrays
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    http, stub = connect(engine), GRPCInferenceServiceStub(await channel_of(engine))

    async def states() -> list[Any]:
        return [
            (await http.get("/v2/health/live")).status_code,
            (await http.get("/v2/health/ready")).status_code,
            (await http.get("/v2/models/fake/ready")).status_code,
            (await stub.ServerLive(pb.ServerLiveRequest())).live,
            (await stub.ServerReady(pb.ServerReadyRequest())).ready,
            (await stub.ModelReady(pb.ModelReadyRequest(name="fake"))).ready,
        ]

    assert await states() == [200, 200, 200, True, True, True]
    fake_embedder.encoder.error = RuntimeError("lost")
    assert (await http.post(INFER, json=body_of(arrays))).status_code == 500
    assert await states() == [200, 503, 503, True, False, False]
    fake_embedder.encoder.error = None
    assert await states() == [200, 200, 200, True, True, True]
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="nope"))).ready
    assert (await http.get("/v2/models/nope/ready")).status_code == 404


async def test_statistics_count_cells_and_failures(
    engine: Engine, connect: Connect, channel_of: Target, arrays: Arrays
) -> None:
    http, stub = connect(engine), GRPCInferenceServiceStub(await channel_of(engine))
    await http.post(INFER, json=body_of(arrays))
    await http.post(INFER, json={"inputs": []})
    (model,) = (await http.get("/v2/models/fake/stats")).json()["model_stats"]
    assert (model["inference_count"], model["execution_count"]) == (24, 1)
    assert (model["inference_stats"]["success"]["count"], model["inference_stats"]["fail"]["count"]) == (1, 1)
    assert model["inference_stats"]["compute_infer"]["ns"] > 0
    assert (await http.get("/v2/models/stats")).json() == {"model_stats": [model]}
    (told,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest())).model_stats
    assert (told.inference_count, told.inference_stats.fail.count) == (24, 1)


@pytest.mark.parametrize(
    "path", ["", "/ready", "/config", "/stats", "/versions/2.0", "/versions/2.0/ready", "/versions/2.0/stats"]
)
async def test_a_model_or_version_that_is_not_served(http: httpx.AsyncClient, path: str) -> None:
    name = "fake" if "versions" in path else "nope"
    reply = await http.get(f"/v2/models/{name}{path}")
    assert reply.status_code == 404
    assert "there is fake" in reply.json()["error"]


async def test_an_unknown_model_costs_no_reading_of_the_body(http: httpx.AsyncClient) -> None:
    sent: list[int] = []

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(1000):
            sent.append(1000)
            yield bytes(1000)

    assert (await http.post("/v2/models/nope/infer", content=parts())).status_code == 404
    assert not sent


async def test_errors_of_paths_and_methods_have_the_form_of_the_protocol(http: httpx.AsyncClient) -> None:
    reply = await http.get(INFER)
    assert (reply.status_code, reply.headers["allow"], type(reply.json()["error"])) == (405, "POST", str)
    assert isinstance((await http.get("/v2/nothing")).json()["error"], str)


async def test_keys_and_rights(
    make_engine: MakeEngine, connect: Connect, channel_of: Target, arrays: Arrays, tmp_path: Path
) -> None:
    key, text = make_key("pipeline")
    path = tmp_path / "keys.json"
    keys: tuple[Key, ...] = (key,)
    path.write_bytes(keys_to_json(keys))
    engine = make_engine(keys=str(path))
    http, stub = connect(engine), GRPCInferenceServiceStub(await channel_of(engine))
    for call in (http.post(INFER, json=body_of(arrays)), http.get("/v2/models/fake"), http.get("/v2")):
        reply = await call
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert isinstance(reply.json()["error"], str)
    assert (await http.get("/v2/health/ready")).status_code == 200
    header = {"x-api-key": text}
    assert (await http.post(INFER, json=body_of(arrays), headers=header)).status_code == 200
    for end in ("load", "unload"):
        reply = await http.post(f"/v2/repository/models/fake/{end}", headers=header)
        assert reply.status_code == 403
        assert "'admin'" in reply.json()["error"]
    status, _, _ = await failure(stub.ModelInfer(message_of(arrays)))
    assert status is grpc.StatusCode.UNAUTHENTICATED
    status, _, _ = await failure(
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="fake"), metadata=(("x-api-key", text),))
    )
    assert status is grpc.StatusCode.PERMISSION_DENIED
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
