"""A new operation is one module: here ``tests/operations/count_tokens.py``, and nothing else names it.

The test registers it for a while; in the product, a module in ``perturbscope/operations/`` is found by itself. What it
then has: JSON, Arrow and uploads over HTTP, gRPC with reflection, all four clients, the front door, the command, the
OpenAPI document, a .proto for other languages, and a place in the reference.
"""

from __future__ import annotations

import ast
import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import perturbscope
from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.cli.app import run
from perturbscope.client import AsyncClient, AsyncGrpcClient, Client, GrpcClient
from perturbscope.errors import InvalidParameterError, UnsupportedOperationError
from perturbscope.inference.embedder import Embedder
from perturbscope.operations import OPERATIONS
from perturbscope.protocol.descriptors import file_of, proto_of
from perturbscope.protocol.fields import Labels
from perturbscope.protocol.operations import Operation
from tests.integration.in_process import Running, running
from tests.operations.count_tokens import OPERATION, CountTokensAnswer, CountTokensRequest
from tests.unit.serving.conftest import write_h5ad

ROOT = Path(__file__).resolve().parents[2]
METHOD = "/perturbscope.v1.CountTokens/Run"
TOUCHED = ["tests/operations/count_tokens.py"]
"""Everything that was written for the operation, beside this test."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with OPERATIONS.added(OPERATION), running(tmp_path_factory.mktemp("server"), max_cells=20) as found:
        yield found


@pytest.fixture
def lengths(tiny_cells: CountMatrix) -> list[int]:
    """Every gene of the tiny cells is in the vocabulary, and a cell is no longer than its genes."""
    return [int(n) for n in np.diff(tiny_cells.counts.indptr)]


def test_the_operation_is_one_module() -> None:
    def names(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        return {str(getattr(node, key, "")).casefold() for node in nodes for key in ("id", "attr", "name", "module")}

    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("perturbscope", "serving", "tests/operations")
        for path in (ROOT / folder).rglob("*.py")
        if any("count_tokens" in name or "counttokens" in name for name in names(path))
    ]
    assert found == TOUCHED
    assert len((ROOT / TOUCHED[0]).read_text().splitlines()) < 80


def test_its_module_is_found_in_its_folder(tmp_path: Path) -> None:
    """A copy of the package with the module among its operations has the command; nothing registers it."""
    shutil.copytree(ROOT / "perturbscope", tmp_path / "perturbscope", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / TOUCHED[0], tmp_path / "perturbscope" / "operations")
    done = subprocess.run(
        [sys.executable, "-m", "perturbscope.cli", "count-tokens", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert OPERATION.summary in done.stdout


def test_json_and_arrow_over_http(server: Running, tiny_cells: CountMatrix, lengths: list[int]) -> None:
    request = CountTokensRequest(cells=tiny_cells[:9], most=12)
    with httpx.Client(base_url=f"http://{server.http}", headers=server.headers) as http:
        body = protocol.request_to_json(request)
        reply = http.post("/v1/count_tokens", content=body, headers={"content-type": protocol.JSON})
        assert reply.status_code == 200, reply.text
        assert reply.json()["n_tokens"] == [min(n, 12) for n in lengths[:9]]
        assert reply.json()["meta"]["model_id"].startswith("tiny-0.1-")
        assert reply.json()["meta"]["timings"]["tokenize"] > 0
        headers = {"content-type": protocol.ARROW, "accept": protocol.ARROW}
        reply = http.post("/v1/count_tokens", content=protocol.request_to_arrow(request), headers=headers)
        table = pa.ipc.open_stream(reply.content).read_all()
        assert table.to_pydict() == {"n_tokens": [min(n, 12) for n in lengths[:9]]}
        assert table.schema.field("n_tokens").type == pa.int32()
        for change, status, field in (
            ({"most": "many"}, 422, "most"),
            ({"mots": 1}, 422, "mots"),
            ({"model": "nobody"}, 404, "model"),
        ):
            spoilt = {**json.loads(body), **change}
            reply = http.post("/v1/count_tokens", json=spoilt)
            assert (reply.status_code, reply.json()["error"]["field"]) == (status, field)
        body = protocol.request_to_json(CountTokensRequest(cells=tiny_cells))
        reply = http.post("/v1/count_tokens", content=body, headers={"content-type": protocol.JSON})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "limit_exceeded")
        reply = http.post("/v1/count_genes", json={})
        assert reply.status_code == 404
        assert "count_tokens" in reply.json()["error"]["message"]
        # Without a key nobody is let in, as anywhere.
        assert httpx.post(f"http://{server.http}/v1/count_tokens", json={}).status_code == 401


def test_an_uploaded_file(server: Running, tiny_cells: CountMatrix, lengths: list[int], tmp_path: Path) -> None:
    file = write_h5ad(tiny_cells[:20], tmp_path / "in.h5ad", labels=("a",) * 20).read_bytes()
    with httpx.Client(base_url=f"http://{server.http}", headers=server.headers) as http:
        raw = http.post(
            "/v1/count_tokens", params={"most": "7"}, content=file, headers={"content-type": protocol.HDF5}, timeout=60
        )
        assert raw.status_code == 200, raw.text
        assert raw.json()["n_tokens"] == [min(n, 7) for n in lengths[:20]]
        form = http.post("/v1/count_tokens", files={"file": ("a.h5ad", file)}, data={"layer": "counts"})
        assert form.json()["n_tokens"] == lengths[:20]
        refused = http.post("/v1/count_tokens", params={"perturbation_key": "x"}, content=file,
                            headers={"content-type": protocol.HDF5})  # fmt: skip
        assert refused.json()["error"]["field"] == "perturbation_key"


def test_grpc_with_reflection(server: Running, tiny_cells: CountMatrix, lengths: list[int]) -> None:
    metadata = tuple(server.headers.items())
    with grpc.insecure_channel(server.grpc) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="perturbscope.v1.CountTokens"),
        ]
        listed, described = reflection.ServerReflectionInfo(iter(asked), metadata=metadata)
        assert "perturbscope.v1.CountTokens" in {item.name for item in listed.list_services_response.service}
        files = [
            FileDescriptorProto.FromString(data) for data in described.file_descriptor_response.file_descriptor_proto
        ]
        assert "CountTokensRequest" in {message.name for file in files for message in file.message_type}
        message = protocol.request_to_proto(CountTokensRequest(cells=tiny_cells[:5]))
        call = channel.unary_unary(
            METHOD,
            request_serializer=type(message).SerializeToString,
            response_deserializer=type(
                protocol.answer_to_proto(CountTokensAnswer(n_tokens=np.zeros(1, np.int32)))
            ).FromString,
        )
        answer = call(message, metadata=metadata)
        assert list(answer.n_tokens) == lengths[:5]
        with pytest.raises(grpc.RpcError) as refused:
            call(message)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_all_clients_divide_and_join(server: Running, tiny_cells: CountMatrix, lengths: list[int]) -> None:
    """The server takes twenty cells of the 24: clients learn that, and ask in parts."""
    key = {"api_key": server.key}
    clients: list[Any] = [
        Client(f"http://{server.http}", **key),
        Client(f"http://{server.http}", body="json", **key),
        GrpcClient(server.grpc, **key),
    ]
    for client in clients:
        with client:
            answer = client.count_tokens(tiny_cells, most=30)
            assert isinstance(answer, CountTokensAnswer)
            assert answer.n_tokens.tolist() == [min(n, 30) for n in lengths]
            assert answer.n_tokens.dtype == np.int32
            assert answer.meta.model_id == client.model_id
            assert client.ask(CountTokensRequest(cells=tiny_cells)).n_tokens.tolist() == lengths
            with pytest.raises(TypeError, match="mots"):
                client.count_tokens(tiny_cells, mots=1)
            with pytest.raises(AttributeError, match=r"count_genes.*operations are embed, .*count_tokens"):
                client.count_genes(tiny_cells)

    async def asynchronously() -> list[list[int]]:
        found = []
        for client in (AsyncClient(f"http://{server.http}", **key), AsyncGrpcClient(server.grpc, **key)):
            async with client:
                found.append((await client.count_tokens(tiny_cells)).n_tokens.tolist())
        return found

    assert asyncio.run(asynchronously()) == [lengths, lengths]


def test_the_front_door_here_and_on_a_server(
    server: Running, tiny_cells: CountMatrix, lengths: list[int], tiny_bundle: Path, tmp_path: Path
) -> None:
    file = write_h5ad(tiny_cells, tmp_path / "in.h5ad")
    for address, key in ((str(tiny_bundle), None), (f"grpc://{server.grpc}", server.key)):
        with perturbscope.load(address, api_key=key) as model:
            for cells in (tiny_cells, file):
                answer = model.ask("count_tokens", cells, most=12)
                assert answer.n_tokens.tolist() == [min(n, 12) for n in lengths]
                assert answer.meta.model_id == model.model_id
            assert getattr(model, "count_tokens")(tiny_cells).n_tokens.tolist() == lengths  # noqa: B009
            with pytest.raises(InvalidParameterError, match="'count_genes'; there are embed, "):
                model.ask("count_genes", tiny_cells)


def test_the_command(
    server: Running, tiny_cells: CountMatrix, lengths: list[int], tiny_bundle: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PERTURBSCOPE_API_KEY", server.key)
    file, out = str(write_h5ad(tiny_cells, tmp_path / "in.h5ad")), tmp_path / "out.parquet"
    assert run(["count-tokens", file, "--bundle", str(tiny_bundle), "--most", "12"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert table["cell"].tolist() == [f"cell{number}" for number in range(24)]
    assert table["n_tokens"].tolist() == [min(n, 12) for n in lengths]
    assert run(["count-tokens", file, str(out), "--server", f"http://{server.http}"]) == 0
    assert pd.read_parquet(out)["n_tokens"].tolist() == lengths
    assert run(["count-tokens", "--help"]) == 0
    assert "Largest number that is reported." in " ".join(capsys.readouterr().out.split())
    assert run(["--help"]) == 0
    assert "count-tokens" in capsys.readouterr().out
    assert run(["count-genes", file]) == 2
    assert run(["operations"]) == 0
    page = capsys.readouterr().out
    assert "## count_tokens\n\nThe number of tokens of each cell.\n" in page
    assert "| `most` | integer | metadata | May be absent. Largest number that is reported. Default: 1000000. |" in page
    assert run(["operations", "--proto", "count_tokens"]) == 0
    assert capsys.readouterr().out == proto_of(OPERATION)
    assert run(["operations", "--proto", "count_genes"]) == 2
    assert run(["count-tokens", file, "--most", "some"]) == 2


def test_the_openapi_document(server: Running, tiny_cells: CountMatrix) -> None:
    with httpx.Client(base_url=f"http://{server.http}", headers=server.headers) as http:
        document = http.get("/v1/openapi.json").json()
        operation = document["paths"]["/v1/count_tokens"]["post"]
        body = operation["requestBody"]["content"][protocol.JSON]
        assert http.post("/v1/count_tokens", json=body["example"]).json()["n_tokens"] == [3, 2]
    assert operation["summary"] == OPERATION.summary
    assert body["schema"]["properties"]["most"]["description"] == "Largest number that is reported."
    assert body["schema"]["required"] == ["cells"]
    assert "most" in {item["name"] for item in operation["parameters"]}
    answer = document["components"]["schemas"]["CountTokensAnswer"]
    assert answer["properties"]["n_tokens"]["items"] == {"type": "integer"}


def test_the_printed_proto_is_the_one_that_is_served(tmp_path: Path) -> None:
    (tmp_path / "perturbscope" / "operations").mkdir(parents=True)
    (tmp_path / "perturbscope" / "operations" / "count_tokens.proto").write_text(proto_of(OPERATION))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(tmp_path), "-I", str(ROOT)]
    command += [f"--descriptor_set_out={tmp_path}/set", "perturbscope/operations/count_tokens.proto"]
    subprocess.run(command, check=True, timeout=60, cwd=tmp_path)
    (compiled,) = FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    for message in compiled.message_type:
        for field in message.field:
            field.ClearField("json_name")
    assert compiled == FileDescriptorProto.FromString(file_of(OPERATION).serialized_pb)


@dataclass(frozen=True, kw_only=True, eq=False)
class NameCellsRequest:
    """A request for the classes of cells.

    Attributes
    ----------
    cells
        Raw counts.
    model
        Name of a model.
    """

    cells: CountMatrix
    model: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class NameCellsAnswer:
    """The class of each cell.

    Attributes
    ----------
    names
        Name of each class.
    """

    names: Labels


def test_a_model_that_cannot(tiny_cells: CountMatrix, tiny_bundle: Path, tmp_path: Path) -> None:
    def never(model: Embedder, request: NameCellsRequest) -> NameCellsAnswer:
        raise AssertionError("the model cannot")

    other = Operation(
        name="name_cells",
        summary="Classes.",
        request=NameCellsRequest,
        answer=NameCellsAnswer,
        run=never,
        capability="classify_cells",
    )
    request = NameCellsRequest(cells=tiny_cells)
    said = "name_cells needs the capability 'classify_cells', and the model tiny"
    with OPERATIONS.added(other), running(tmp_path) as server:
        with httpx.Client(base_url=f"http://{server.http}", headers=server.headers) as http:
            reply = http.post("/v1/name_cells", json=json.loads(protocol.request_to_json(request)))
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["field"]) == (409, "unsupported_operation", "model")
            assert error["message"].startswith(f"{said} has embed")
            assert error["message"].endswith("No model of this server can.")
            assert "409" in http.get("/v1/openapi.json").json()["paths"]["/v1/name_cells"]["post"]["responses"]
        client = GrpcClient(server.grpc, api_key=server.key)
        with client, pytest.raises(UnsupportedOperationError, match=said):
            client.ask(request)
        with perturbscope.load(tiny_bundle) as model, pytest.raises(UnsupportedOperationError, match="Load a model"):
            model.ask("name_cells", tiny_cells)
