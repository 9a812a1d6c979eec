"""The real tritonclient, its four kinds, against the server over a little bundle."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families.tokens import TokenizedCells, pad
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from tests.bundles import TINY_WIDTH
from tests.integration import triton_calls
from tests.integration.in_process import MODEL, SPARE, Running, running
from tests.integration.triton_calls import KINDS

Arrays = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("triton")) as server:
        yield server


Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Call a function of :mod:`triton_calls` in the process that has the tritonclient."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(120)


@pytest.fixture(scope="module")
def embedder(tiny_bundle: Path) -> Embedder:
    return Embedder.from_bundle(Bundle.open(tiny_bundle), threads=1)


@pytest.fixture(scope="module")
def cells(embedder: Embedder) -> TokenizedCells:
    genes = GeneVocabulary.geneformer_gc30m().gene_ids[:40]
    counts = np.random.default_rng(0).poisson(1.0, size=(24, 40))
    counts[:, 0] += 1  # no cell is empty
    return embedder.tokenize(CountMatrix.from_matrix(counts, genes))


@pytest.fixture(scope="module")
def arrays(embedder: Embedder, cells: TokenizedCells) -> Arrays:
    return pad(cells, np.arange(len(cells)), embedder.family.inputs)


@pytest.fixture(scope="module")
def expected(embedder: Embedder, cells: TokenizedCells) -> NDArray[np.float32]:
    return embedder.embed_tokens(cells)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("binary", [None, True, False], ids=["default", "bytes", "json"])
def test_vectors_are_those_of_perturbscope(
    server: Running, ask: Ask, arrays: Arrays, expected: NDArray[np.float32], kind: str, binary: bool | None
) -> None:
    if kind.startswith("grpc"):
        binary = None  # bytes are all that there is
    values, answer = ask(
        triton_calls.infer, kind, server.of(kind), MODEL, arrays, binary=binary, request_id="r1", headers=server.headers
    )
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("r1", MODEL, "0.1")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_of_server_and_model(server: Running, ask: Ask, kind: str) -> None:
    def get(method: str, *args: Any) -> Any:
        options = {"as_json": True} if kind.startswith("grpc") and method.startswith("get") else {}
        return ask(triton_calls.call, kind, server.of(kind), method, *args, headers=server.headers, **options)

    assert get("is_server_live")
    assert get("is_server_ready")
    assert get("is_model_ready", MODEL)
    assert get("is_model_ready", MODEL, "0.1")
    assert not get("is_model_ready", "nope")
    assert get("get_server_metadata")["name"] == "perturbscope"
    metadata = get("get_model_metadata", MODEL)
    assert [item["name"] for item in metadata["inputs"]] == ["input_ids", "attention_mask"]
    assert [int(size) for size in metadata["outputs"][0]["shape"]] == [-1, TINY_WIDTH]
    config = get("get_model_config", MODEL)
    config = config.get("config", config)
    assert config["output"][0]["data_type"] == "TYPE_FP32"
    assert get("get_inference_statistics", MODEL)["model_stats"][0]["name"] == MODEL
    index = get("get_model_repository_index")
    found = index["models"] if kind.startswith("grpc") else index
    assert {(model["name"], model["version"], model["state"]) for model in found} == {
        (name, "0.1", "READY") for name in (MODEL, SPARE)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_errors_say_what_is_wrong(server: Running, ask: Ask, arrays: Arrays, kind: str) -> None:
    def infer(model: str = MODEL, key: str | None = None, **spoilt: NDArray[Any]) -> Any:
        headers = {"x-api-key": key or server.key}
        return ask(triton_calls.infer, kind, server.of(kind), model, arrays | spoilt, headers=headers)

    http = kind.startswith("http")
    status, message = infer(input_ids=np.full_like(arrays["input_ids"], 10**6))
    assert status == ("422" if http else "StatusCode.INVALID_ARGUMENT")
    assert "1000000 in row 0 of the input 'input_ids' is no token" in message
    status, message = infer(model="nope")
    assert status == ("404" if http else "StatusCode.NOT_FOUND")
    assert f"there is {MODEL}" in message
    status, message = infer(key="psk_00000000_wrong")
    assert status == ("401" if http else "StatusCode.UNAUTHENTICATED")
    assert "API key" in message
    status, message = ask(triton_calls.call, kind, server.of(kind), "unload_model", MODEL, headers=server.headers)
    assert status == ("403" if http else "StatusCode.PERMISSION_DENIED")
    assert "'admin'" in message
    status, message = ask(triton_calls.call, kind, server.of(kind), "load_model", "other", headers=server.admin_headers)
    assert status == ("404" if http else "StatusCode.NOT_FOUND")
    assert "'other'" in message


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_unloaded_and_loaded(server: Running, ask: Ask, arrays: Arrays, kind: str) -> None:
    url, headers = server.of(kind), server.admin_headers
    assert ask(triton_calls.call, kind, url, "unload_model", SPARE, headers=headers) is None
    assert not ask(triton_calls.call, kind, url, "is_model_ready", SPARE, headers=headers)
    _, message = ask(triton_calls.infer, kind, url, SPARE, arrays, headers=headers)
    assert f"there is {MODEL}" in message
    assert ask(triton_calls.call, kind, url, "load_model", SPARE, headers=headers) is None
    values, _ = ask(triton_calls.infer, kind, url, SPARE, arrays, headers=headers)
    assert values.shape == (24, TINY_WIDTH)
    _, message = ask(triton_calls.call, kind, url, "load_model", SPARE, headers=headers, config="{}")
    assert "'config' is not supported here" in message


def test_a_stream_of_requests(server: Running, ask: Ask, arrays: Arrays, expected: NDArray[np.float32]) -> None:
    answers = ask(triton_calls.stream, server.grpc, MODEL, arrays, ["", "nope", ""], server.headers)
    assert [name for name, _ in answers] == ["0", "", "2"]
    np.testing.assert_allclose(answers[2][1], expected, rtol=0, atol=1e-6)
    assert f"there is {MODEL}" in answers[1][1]
