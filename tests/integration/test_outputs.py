"""Outputs beside the cell embedding are the same here, over HTTP, over gRPC and in streams."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.client import AsyncClient, AsyncGrpcClient, Client, GrpcClient
from perturbscope.errors import InvalidParameterError, LimitExceededError
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import Embeddings, gather
from perturbscope.protocol.operations import EMBED
from perturbscope.protocol.streams import StreamChunk, StreamOpened, StreamStart
from serving.http import schemas
from tests.arrow_client import stream_answers_from_arrow, stream_request_to_arrow
from tests.bundles import write_outputs_bundle
from tests.integration.in_process import Running, running
from tests.unit.serving.conftest import write_h5ad

NAMES = ("gene_embedding", "gene_value", "cell_logits")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outputs_bundle(tmp_path_factory.mktemp("bundle") / "outputs", ends=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server"), bundle=bundle, max_cells=20) as found:
        yield found


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Embedder]:
    found = Embedder.from_bundle(Bundle.open(bundle), threads=1)
    yield found
    found.close()


@pytest.fixture
def here(model: Embedder, tiny_cells: CountMatrix) -> Embeddings:
    return model.embed(tiny_cells, outputs=NAMES)


def expect(found: Embeddings, here: Embeddings, names: tuple[str, ...] = NAMES) -> None:
    """Batches differ on the server, and so does the last bit; everything else is the same."""
    assert set(found.outputs) == set(names)
    np.testing.assert_allclose(found.values, here.values, rtol=1e-5, atol=1e-6)
    for name in names:
        one, other = found.outputs[name], here.outputs[name]
        assert one.spec == other.spec
        assert one.values.dtype == np.float32
        np.testing.assert_allclose(one.values, other.values, rtol=1e-5, atol=1e-6)
        if one.spec.per == "token":
            np.testing.assert_array_equal(one.offsets, other.offsets)
            assert one.gene_ids.tolist() == other.gene_ids.tolist()
            np.testing.assert_array_equal(one.of_cell(3), one.values[int(one.offsets[3]) : int(one.offsets[4])])


def test_json_over_http(server: Running, tiny_cells: CountMatrix, here: Embeddings) -> None:
    body = json.loads(protocol.request_to_json(protocol.EmbedRequest(cells=tiny_cells[:6])))
    with httpx.Client(base_url=f"http://{server.http}", headers=server.headers) as http:
        plain = http.post("/v1/embed", json=body).json()
        assert "outputs" not in plain
        reply = http.post("/v1/embed", json={**body, "outputs": ["gene_embedding", "cell_logits"]})
        answer = reply.json()
        schemas.given(EMBED).model_validate(answer)
        genes, classes = answer["outputs"]["gene_embedding"], answer["outputs"]["cell_logits"]
        assert (genes["per"], classes["per"]) == ("token", "cell")
        assert [len(cell) for cell in genes["values"]] == [len(cell) for cell in genes["gene_ids"]]
        assert genes["gene_ids"][0] == here.outputs["gene_embedding"].gene_ids[: len(genes["gene_ids"][0])].tolist()
        assert len(classes["values"]) == 6
        assert classes["names"] == list(here.outputs["cell_logits"].spec.names or ())
        assert {name: value for name, value in answer.items() if name not in ("outputs", "meta")} == {
            name: value for name, value in plain.items() if name != "meta"
        }
        refused = http.post("/v1/embed", json={**body, "outputs": ["nothing"]})
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, "outputs")
        assert "it has cell_embedding" in refused.json()["error"]["message"]


def test_an_uploaded_file(server: Running, tiny_cells: CountMatrix, here: Embeddings, tmp_path: Path) -> None:
    file = write_h5ad(tiny_cells[:20], tmp_path / "in.h5ad", labels=("a",) * 20)
    reply = httpx.post(
        f"http://{server.http}/v1/embed",
        params={"outputs": "cell_logits, gene_value"},
        content=file.read_bytes(),
        headers={"content-type": protocol.HDF5, "accept": protocol.ARROW, **server.headers},
        timeout=60,
    )
    found = protocol.answer_from_arrow(Embeddings, reply.content)
    np.testing.assert_allclose(
        found.outputs["cell_logits"].values, here.outputs["cell_logits"].values[:20], rtol=1e-5, atol=1e-6
    )


def test_all_clients(server: Running, tiny_cells: CountMatrix, here: Embeddings) -> None:
    """The server takes twenty cells of the 24, so each client joins parts."""
    key: dict[str, Any] = {"api_key": server.key}
    chunks = [tiny_cells[:9], tiny_cells[9:]]
    clients: list[Any] = [
        Client(f"http://{server.http}", **key),
        Client(f"http://{server.http}", body="json", **key),
        GrpcClient(server.grpc, **key),
    ]
    for client in clients:
        with client:
            expect(client.embed_cells(tiny_cells, outputs=list(NAMES)), here)
            expect(gather(client.embed_stream(chunks, outputs=NAMES), 24), here)
            assert client.embed_cells(tiny_cells).outputs == {}
            with pytest.raises(InvalidParameterError, match="no output 'nothing'"):
                client.embed_cells(tiny_cells, outputs=["nothing"])
            with pytest.raises(InvalidParameterError, match="no output 'nothing'"):
                list(client.embed_stream(chunks, outputs=["nothing"]))
            (info,) = [info for info in client.models() if info.name == "tiny-outputs"]
            assert {output.name for output in info.outputs} >= set(NAMES)

    async def asynchronously() -> list[Embeddings]:
        found = []
        for client in (AsyncClient(f"http://{server.http}", **key), AsyncGrpcClient(server.grpc, **key)):
            async with client:
                found.append(await client.embed_cells(tiny_cells, outputs=NAMES))
                found.append(gather([part async for part in client.embed_stream(chunks, outputs=NAMES)], 24))
        return found

    for found in asyncio.run(asynchronously()):
        expect(found, here)


def test_the_arrow_stream(server: Running, tiny_cells: CountMatrix, here: Embeddings) -> None:
    start = StreamStart(gene_ids=tiny_cells.gene_ids, outputs=("gene_embedding", "cell_logits"))
    reply = httpx.post(
        f"http://{server.http}/v1/embed/stream",
        content=b"".join(stream_request_to_arrow(start, [tiny_cells[:7], tiny_cells[7:]])),
        headers={"content-type": protocol.ARROW, **server.headers},
        timeout=60,
    )
    opened, *chunks, _ = stream_answers_from_arrow(io.BytesIO(reply.content))
    assert isinstance(opened, StreamOpened)
    assert {spec.name for spec in opened.outputs} == {"gene_embedding", "cell_logits"}
    found = gather([chunk.embeddings for chunk in chunks if isinstance(chunk, StreamChunk)], 24)
    expect(found, here, ("gene_embedding", "cell_logits"))


def test_memory_is_held_for_outputs(tmp_path: Path, bundle: Path, tiny_cells: CountMatrix) -> None:
    """Vectors of all genes are refused where vectors of the cells are not."""
    with (
        running(tmp_path, bundle=bundle, max_held_bytes=70_000, max_body_bytes=60_000, max_json_bytes=60_000) as server,
        Client(f"http://{server.http}", api_key=server.key) as client,
    ):
        assert len(client.embed_cells(tiny_cells)) == 24
        assert client.embed_cells(tiny_cells[:1], outputs=["gene_embedding"]).outputs
        whole = protocol.EmbedRequest(cells=tiny_cells, outputs=NAMES)
        with pytest.raises(LimitExceededError, match="bytes of memory"):
            client._hold(ask_once(whole))
        # Divided, it fits.
        assert set(client.embed_cells(tiny_cells, outputs=list(NAMES)).outputs) == set(NAMES)


def ask_once(request: Any) -> Iterator[Any]:
    from perturbscope.client.conversation import Failure

    try:
        return (yield request)
    except Failure as failure:
        raise failure.error from None
