"""Faults made on the real service, in little: benchmarks/reliability makes them in full, and tells of them."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope import errors, protocol
from perturbscope.client import AsyncClient, AsyncGrpcClient, Client, GrpcClient, RetryPolicy
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest, ScoreRequest
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub
from perturbscope.scoring.results import ScoreOptions
from tests.bundles import write_tiny_bundle
from tests.fuzz.mutators import mutate_arrow, mutate_bytes, mutate_json, mutate_proto
from tests.fuzz.seeds import cells as seed_cells
from tests.fuzz.seeds import h5ad
from tests.integration.server import ROOT, RunningServer

PATIENCE = 1
"""Seconds that a head, a body and the reading of a file may take here."""
HOOKS = ROOT / "benchmarks" / "reliability" / "hooks"
LOOP = ROOT / "tests" / "fuzz" / "corpus" / "h5ad" / "attribute-loop"
CELLS = seed_cells(40)
ONCE = RetryPolicy(attempts=1)
SLOW_SCORE = ScoreRequest(
    embeddings=np.random.default_rng(0).standard_normal((1200, 32)).astype(np.float32),
    perturbations=("control",) * 600 + ("KO",) * 600,
    control="control",
    options=ScoreOptions(metrics=("wasserstein",), max_cells=600, wasserstein_permutations=50_000),
)
"""Takes minutes, longer than any test waits; nobody waits for it to end."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in it decide what the model's provider does; see benchmarks/reliability/hooks."""
    return tmp_path_factory.mktemp("switch")


@pytest.fixture(scope="module")
def server(bundle: Path, switch: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    environ = {"PERTURBSCOPE_TRIAL": str(switch), "PYTHONPATH": os.pathsep.join([str(HOOKS), str(ROOT)])}
    settings = {
        "head_timeout": PATIENCE,
        "body_timeout": PATIENCE,
        "file_timeout": 2 * PATIENCE,
        "score_workers": 2,
        "max_score_seconds": 100_000,
    }
    with RunningServer(tmp_path_factory.mktemp("server"), environ=environ, bundle=bundle, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def expected(bundle: Path) -> NDArray[np.float32]:
    return Embedder.from_bundle(Bundle.open(bundle), threads=1).embed(CELLS).values


def assert_well(server: RunningServer, expected: NDArray[np.float32]) -> None:
    """It lives, is ready, answers rightly over both transports, and knows of no bug."""
    assert server.answers("/livez")
    assert server.answers("/readyz")
    with Client(server.url) as http, GrpcClient(server.target) as rpc:
        for client in (http, rpc):
            np.testing.assert_allclose(client.embed_cells(CELLS).values, expected, rtol=0, atol=1e-6)
    assert "Traceback" not in server.log


def head(server: RunningServer, content_type: str, length: int, path: str = "/v1/embed") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{server.http_port}\r\ncontent-type: {content_type}\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def eventually(condition: Any, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


async def test_clients_that_leave_cost_nothing_more(server: RunningServer, expected: NDArray[np.float32]) -> None:
    """In the head, in the body, while perturbations are scored; by closing, cancelling and a deadline."""
    body = protocol.request_to_arrow(SLOW_SCORE)
    start, message = head(server, protocol.ARROW, len(body), "/v1/score"), protocol.request_to_proto(SLOW_SCORE)
    await asyncio.to_thread(assert_well, server, expected)
    before = server.usage()
    async with grpc.aio.insecure_channel(server.target) as channel:
        for number in range(2):
            for sent in (start[:30], start + body[:1000], start + body):
                connection = connect(server.http_port)
                connection.sendall(sent)
                await asyncio.sleep(0.05 * number)
                connection.close()
            calls = [PerturbScopeStub(channel).Score(message, timeout=timeout) for timeout in (None, 0.05)]
            await asyncio.sleep(0.1)
            calls[0].cancel()
            for call in calls:
                with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                    await call

    def rests() -> bool:
        cpu = server.usage().cpu
        time.sleep(0.5)
        return server.usage().cpu - cpu < 0.1

    assert await asyncio.to_thread(eventually, rests), "work went on for callers that had left"
    assert await asyncio.to_thread(eventually, lambda: server.usage().files <= before.files + 2)
    await asyncio.to_thread(assert_well, server, expected)


@pytest.mark.parametrize("what", ["nothing", "part of a head", "part of a body", "nothing to gRPC"])
def test_slow_clients_are_ended(server: RunningServer, what: str) -> None:
    connection = connect(server.grpc_port if what == "nothing to gRPC" else server.http_port)
    start = head(server, protocol.JSON, 1000)
    connection.sendall({"part of a head": start[:40], "part of a body": start + b"{"}.get(what, b""))
    answer = b""
    try:
        while part := connection.recv(65536):
            answer += part
            if answer.startswith(b"HTTP"):
                break
    except ConnectionError:
        pass
    connection.close()
    # gRPC greets its clients before they do.
    if what != "nothing to gRPC":
        assert answer[:12] == (b"HTTP/1.1 413" if what == "part of a body" else b"")


def test_a_file_that_never_ends_hurts_its_sender_only(server: RunningServer, expected: NDArray[np.float32]) -> None:
    found: list[httpx.Response] = []

    def upload() -> None:
        headers = {"content-type": protocol.HDF5}
        found.append(httpx.post(f"{server.url}/v1/embed", content=LOOP.read_bytes()[1:], headers=headers, timeout=60))

    thread = threading.Thread(target=upload)
    thread.start()
    while thread.is_alive():
        assert_well(server, expected)
    thread.join()
    assert (found[0].status_code, found[0].json()["error"]["code"]) == (422, "unreadable_file")


async def test_fuzzed_requests_get_typed_errors(server: RunningServer, expected: NDArray[np.float32]) -> None:
    small = EmbedRequest(cells=CELLS)
    bodies = [
        (protocol.JSON, protocol.request_to_json(small), mutate_json),
        (protocol.ARROW, protocol.request_to_arrow(small), mutate_arrow),
        (protocol.HDF5, h5ad(CELLS), mutate_bytes),
    ]
    proto, mutate = protocol.request_to_proto(small).SerializeToString(), mutate_proto(pb.EmbedRequest)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60) as http,
        grpc.aio.insecure_channel(server.target) as channel,
    ):
        for number in range(30):
            for kind, body, change in bodies:
                content = change(body, Random(number))
                reply = await http.post("/v1/embed", content=content, headers={"content-type": kind})
                assert reply.status_code < 500, (kind, number, reply.text)
                assert reply.status_code == 200 or reply.json()["error"]["code"] != "internal"
            call = channel.unary_unary("/perturbscope.v1.PerturbScope/Embed")(mutate(proto, Random(number)))
            if await call.code() is not grpc.StatusCode.OK:
                assert "perturbscope-code" in dict(await call.trailing_metadata() or ()), number
    await asyncio.to_thread(assert_well, server, expected)


def test_a_provider_that_is_lost_comes_back(server: RunningServer, switch: Path, expected: NDArray[np.float32]) -> None:
    (switch / "raise").touch()
    with Client(server.url, retries=ONCE) as http, GrpcClient(server.target, retries=ONCE) as rpc:
        for client in (http, rpc):
            with pytest.raises(errors.InferenceError):
                client.embed_cells(CELLS)
    assert eventually(lambda: not server.answers("/readyz"))
    assert server.answers("/livez")
    (switch / "raise").unlink()
    assert eventually(lambda: server.answers("/readyz"))
    assert_well(server, expected)


async def test_kill_nine_in_the_middle_of_requests(
    server: RunningServer, switch: Path, expected: NDArray[np.float32]
) -> None:
    """A client that does not try again has a typed error; one that does has its vectors. Last: it takes a restart."""
    patient = RetryPolicy(attempts=60, first=0.2, longest=1.0)
    (switch / "hang").touch()
    clients = [kind(address, retries=policy) for policy in (ONCE, patient) for kind, address in _addresses(server)]
    tasks = [asyncio.ensure_future(client.embed_cells(CELLS)) for client in clients]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in tasks)
    server.kill()
    for task in tasks[:2]:
        with pytest.raises(errors.ServerUnreachableError):
            await task
    (switch / "hang").unlink()
    server.launch()
    for task in tasks[2:]:
        np.testing.assert_allclose((await task).values, expected, rtol=0, atol=1e-6)
    for client in clients:
        await client.close()
    await asyncio.to_thread(server.wait_until_ready)
    await asyncio.to_thread(assert_well, server, expected)


def _addresses(server: RunningServer) -> list[tuple[Any, str]]:
    return [(AsyncClient, server.url), (AsyncGrpcClient, server.target)]
