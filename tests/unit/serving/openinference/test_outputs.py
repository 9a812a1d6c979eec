"""The Open Inference Protocol over a model with several outputs, on either transport."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.families.tokens import pad
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol.proto import open_inference_pb2 as pb
from perturbscope.protocol.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub
from serving.engine.engine import Engine
from serving.openinference.json_codec import JSON_LENGTH
from tests.bundles import TINY_OUTPUTS, tiny_table
from tests.unit.serving.openinference.test_open_inference import (
    INFER,
    Arrays,
    Target,
    body_of,
    channel_of,
    message_of,
)

__all__ = ["channel_of"]  # a fixture
NAMES = [spec.name for spec in TINY_OUTPUTS]


@pytest.fixture
def fake_embedder(outputs_bundle: Path) -> Embedder:
    """The model of the engine, in place of the fake one: a real graph with several outputs."""
    return Embedder.from_bundle(Bundle.open(outputs_bundle), threads=1)


@pytest.fixture
def arrays(fake_embedder: Embedder, tiny_cells: CountMatrix) -> Arrays:
    tokens = fake_embedder.tokenize(tiny_cells)
    return pad(tokens, np.arange(len(tokens)), fake_embedder.family.inputs, length=43)


@pytest.fixture
def wanted(fake_embedder: Embedder, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """What the model gives for the arrays, 0 behind the last token of each cell."""
    ids, mask = arrays["input_ids"], arrays["attention_mask"][..., None]
    table = tiny_table(len(fake_embedder.family.vocabulary))
    vectors = (table[ids] * mask).astype(np.float32)
    cells = vectors.sum(axis=1) / mask.sum(axis=1)
    found = {"gene_embedding": vectors, "gene_value": ids[..., None] / 2 * mask, "cell_logits": cells[:, :3]}
    return {"cell_embedding": cells} | found


def assert_close(values: Any, wanted: NDArray[np.float32]) -> None:
    assert values.shape == wanted.shape
    np.testing.assert_allclose(values, wanted, atol=1e-5)


async def test_outputs_are_described(http: httpx.AsyncClient) -> None:
    outputs = (await http.get("/v2/models/fake")).json()["outputs"]
    assert {output["name"]: output["shape"] for output in outputs} == {
        "cell_embedding": [-1, 8],
        "gene_embedding": [-1, -1, 8],
        "gene_value": [-1, -1, 1],
        "cell_logits": [-1, 3],
    }
    assert {output["datatype"] for output in outputs} == {"FP32"}
    dims = {output["name"]: output["dims"] for output in (await http.get("/v2/models/fake/config")).json()["output"]}
    assert dims["gene_embedding"] == [-1, 8]
    assert dims["cell_logits"] == [3]


async def test_all_outputs_or_those_that_are_named(
    http: httpx.AsyncClient, arrays: Arrays, wanted: dict[str, NDArray[np.float32]]
) -> None:
    """Numbers and bytes may be mixed in one answer."""
    reply = (await http.post(INFER, json=body_of(arrays))).json()
    assert [output["name"] for output in reply["outputs"]] == NAMES
    for output in reply["outputs"]:
        assert_close(np.array(output["data"]).reshape(output["shape"]), wanted[output["name"]])

    outputs: list[dict[str, Any]] = [
        {"name": "gene_embedding", "parameters": {"binary_data": True}},
        {"name": "cell_logits"},
        {"name": "gene_value", "parameters": {"binary_data": True}},
    ]
    answer = await http.post(INFER, json=body_of(arrays, outputs=outputs))
    size = int(answer.headers[JSON_LENGTH])
    rest = answer.content[size:]
    found = {output["name"]: output for output in json.loads(answer.content[:size])["outputs"]}
    assert set(found) == {"gene_embedding", "cell_logits", "gene_value"}
    for name, output in found.items():
        if name == "cell_logits":
            values = np.array(output["data"], np.float32)
        else:
            n_bytes = output["parameters"]["binary_data_size"]
            values, rest = np.frombuffer(rest[:n_bytes], "<f4"), rest[n_bytes:]
        assert_close(values.reshape(output["shape"]), wanted[name])
    assert not rest

    reply = await http.post(INFER, json=body_of(arrays, outputs=[{"name": "gene_logits"}]))
    assert reply.status_code == 422
    assert "no output 'gene_logits'; it has 'cell_embedding', 'gene_embedding'" in reply.json()["error"]


async def test_the_same_over_grpc(
    engine: Engine, channel_of: Target, arrays: Arrays, wanted: dict[str, NDArray[np.float32]]
) -> None:
    stub = GRPCInferenceServiceStub(await channel_of(engine))
    for names in ([], ["cell_logits", "gene_embedding"]):
        requested = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in names]
        reply = await stub.ModelInfer(message_of(arrays, outputs=requested))
        assert {output.name for output in reply.outputs} == set(names or NAMES)
        for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True):
            assert_close(np.frombuffer(raw, "<f4").reshape(output.shape), wanted[output.name])
