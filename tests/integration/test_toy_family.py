"""A second family goes the whole way: trained, resumed, exported, opened, and served over every transport.

What it needs is two modules (:mod:`tests.toy_family`) and their names in two tables. Its cells have two inputs a token,
of which padding may have a value that tokens have, and a floating-point input a cell; it has one output of each kind,
and no fusion.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch

from export.parity import random_cells
from export.pipeline import export_checkpoint
from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.client import Client, GrpcClient
from perturbscope.families.outputs import Outputs
from perturbscope.families.tokens import TokenizedCells, pad
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import Embeddings
from perturbscope.inference.golden import check_golden, read_golden
from perturbscope.protocol.proto.open_inference_pb2 import ModelInferRequest
from perturbscope.protocol.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.integration.in_process import Running, running
from tests.toy_family import registered
from tests.training_data import VOCABULARY, pretrain_values
from training import families
from training.checkpoint import load_checkpoint
from training.commands.pretrain import pretrain
from training.config.stages import PretrainConfig
from training.config.strict import parse
from training.loop.engine import PlainEngine

OTHERS = ("gene_value", "cell_logits")
CLASSES = ("resting", "cycling", "dying")
VARIANTS = ("fp32", "fp16", "int8")


@pytest.fixture(autouse=True, scope="module")
def _toy_family() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was interrupted while it was trained, and then finished; and its bundle."""
    folder = tmp_path_factory.mktemp("toy")
    values = pretrain_values(folder, epochs=1, checkpoint_every=4)
    values["corpus"] |= {"family": "toy", "family_options": {"n_bins": 5}}
    config = parse(PretrainConfig, values | {"model": {"hidden": 12, "n_bins": 5, "classes": list(CLASSES)}})
    step, steps = PlainEngine.micro_step, itertools.count()

    def killed(self: PlainEngine, *arguments: Any, **options: Any) -> float:
        if next(steps) == 6:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainEngine, "micro_step", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
        checkpoint = pretrain(config)
    assert checkpoint is not None
    export_checkpoint(checkpoint, folder / "bundle", name="toy", version="1", variants=["fp16", "int8"], min_cosine=0.9)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return Bundle.open(folder / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Embedder:
    return Embedder.from_bundle(bundle, threads=1)


@pytest.fixture(scope="module")
def cells() -> CountMatrix:
    """Cells of 3 to 60 genes; the longest are cut to 40."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 60, size=12, endpoint=True)
    return random_cells(VOCABULARY, [60, 3, *lengths.tolist()], rng=rng)


@pytest.fixture(scope="module")
def tokens(model: Embedder, cells: CountMatrix) -> TokenizedCells:
    return model.tokenize(cells)


@pytest.fixture(scope="module")
def here(model: Embedder, tokens: TokenizedCells) -> Outputs:
    return model.infer(tokens, OTHERS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server"), bundle=folder / "bundle") as found:
        yield found


def test_the_bundle_says_what_the_model_can_do(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert [(spec.name, spec.per, spec.width, spec.meaning, spec.names) for spec in manifest.outputs] == [
        ("cell_embedding", "cell", 12, "embedding", None),
        ("gene_value", "token", 1, "value", None),
        ("cell_logits", "cell", 3, "logits", CLASSES),
    ]
    assert (manifest.family, manifest.family_config) == ("toy", {"max_length": 40, "n_bins": 5})
    assert (manifest.task, manifest.classes) == ("cell_classification", CLASSES)
    assert manifest.capabilities == ("classify_cells", "edit_tokens", "embed")
    assert (manifest.layer, manifest.pooling) == ("the only layer", "mean over genes")
    assert set(manifest.parity["outputs"]) == {"cell_embedding", *OTHERS}
    assert manifest.parity["max_abs_difference"] < 1e-5
    for name in ("fp16", "int8"):
        measured = manifest.parity["variants"][name]
        assert set(measured["outputs"]) == set(OTHERS)
        assert all(found["lowest_cosine"] > 0.9 for found in measured["outputs"].values())


def test_the_outputs_are_those_of_torch(folder: Path, model: Embedder, tokens: TokenizedCells, here: Outputs) -> None:
    checkpoint = load_checkpoint(folder / "pretrain" / "checkpoint")
    half = families.load("toy")
    spec = half.export_spec(half.parse_config(checkpoint.model_config), family=model.family)
    module = spec.reference(checkpoint.model())
    for cell in range(len(tokens)):
        batch = pad(tokens, np.array([cell]), model.family.inputs)
        with torch.inference_mode():
            expected = module(**{name: torch.from_numpy(array) for name, array in batch.items()})
        for output, values in zip(spec.outputs, expected, strict=True):
            rows = slice(*tokens.offsets[cell : cell + 2]) if output.per == "token" else cell
            np.testing.assert_allclose(here[output.name][rows], values[0], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_values_of_every_output(bundle: Bundle, variant: str) -> None:
    golden = read_golden(bundle)
    assert golden is not None
    assert set(golden.outputs) == {"cell_embedding", *OTHERS}
    check_golden(Embedder.from_bundle(bundle, variant=variant, threads=1), golden).require("toy")


def expect(found: Embeddings, here: Outputs, tokens: TokenizedCells) -> None:
    np.testing.assert_allclose(found.values, here.cell_embedding, rtol=1e-5, atol=1e-6)
    assert set(found.outputs) == set(OTHERS)
    for name in OTHERS:
        np.testing.assert_allclose(found.outputs[name].values, here[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.outputs["gene_value"].offsets, tokens.offsets)


def test_json(server: Running, cells: CountMatrix, here: Outputs, tokens: TokenizedCells) -> None:
    request = protocol.request_to_json(protocol.EmbedRequest(cells=cells, outputs=OTHERS))
    headers = {"content-type": "application/json", **server.headers}
    reply = httpx.post(f"http://{server.http}/v1/embed", content=request, headers=headers)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    np.testing.assert_allclose(answer["embeddings"], here.cell_embedding, rtol=1e-5, atol=1e-6)
    assert answer["outputs"]["cell_logits"]["names"] == list(CLASSES)
    genes = answer["outputs"]["gene_value"]
    assert [len(cell) for cell in genes["values"]] == tokens.lengths.tolist()
    np.testing.assert_allclose(np.concatenate(genes["values"]), here["gene_value"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Client, GrpcClient])
def test_arrow_and_grpc(server: Running, kind: Any, cells: CountMatrix, here: Outputs, tokens: TokenizedCells) -> None:
    address = f"http://{server.http}" if kind is Client else server.grpc
    with kind(address, api_key=server.key) as client:
        expect(client.embed_cells(cells, outputs=list(OTHERS)), here, tokens)
        (info,) = [info for info in client.models() if info.name == "toy"]
        assert info.family == "toy"


# The Open Inference Protocol: padded tensors in, tensors out.

TYPES = {"genes": "INT64", "bins": "INT64", "depth": "FP32", "attention_mask": "INT64"}


def expect_tensors(found: dict[str, np.ndarray], here: Outputs, batch: dict[str, Any]) -> None:
    is_real = batch["attention_mask"] > 0
    np.testing.assert_allclose(found["cell_embedding"], here.cell_embedding, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["cell_logits"], here["cell_logits"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["gene_value"][is_real], here["gene_value"], rtol=1e-5, atol=1e-6)


def test_metadata_and_inference_over_http(
    server: Running, model: Embedder, tokens: TokenizedCells, here: Outputs
) -> None:
    with httpx.Client(base_url=f"http://{server.http}", headers=server.headers) as http:
        told = http.get("/v2/models/toy").json()
        assert {(item["name"], item["datatype"], tuple(item["shape"])) for item in told["inputs"]} == {
            ("genes", "INT64", (-1, -1)),
            ("bins", "INT64", (-1, -1)),
            ("depth", "FP32", (-1,)),
            ("attention_mask", "INT64", (-1, -1)),
        }
        assert {(item["name"], tuple(item["shape"])) for item in told["outputs"]} == {
            ("cell_embedding", (-1, 12)),
            ("gene_value", (-1, -1, 1)),
            ("cell_logits", (-1, 3)),
        }
        batch = pad(tokens, np.arange(len(tokens)), model.family.inputs)
        inputs = [
            {"name": name, "datatype": TYPES[name], "shape": list(array.shape), "data": array.ravel().tolist()}
            for name, array in batch.items()
        ]
        reply = http.post("/v2/models/toy/infer", json={"inputs": inputs})
        assert reply.status_code == 200, reply.text
        found = {item["name"]: np.reshape(item["data"], item["shape"]) for item in reply.json()["outputs"]}
        expect_tensors(found, here, batch)


def test_inference_over_grpc(server: Running, model: Embedder, tokens: TokenizedCells, here: Outputs) -> None:
    batch = pad(tokens, np.arange(len(tokens)), model.family.inputs)
    request = ModelInferRequest(model_name="toy")
    for name, array in batch.items():
        request.inputs.add(name=name, datatype=TYPES[name], shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    with grpc.insecure_channel(server.grpc) as channel:
        answer = GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=[("x-api-key", server.key)])
    found = {
        output.name: np.frombuffer(raw, dtype="<f4").reshape([*output.shape])
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
    expect_tensors(found, here, batch)
