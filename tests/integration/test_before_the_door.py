"""What gRPC reads of a stranger (nothing), and of a caller with a key (what was counted): the memory of the service."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.commands import keys as command
from tests.integration.server import RunningServer

MIB = 2**20
LARGE, CALLS = 64 * MIB, 8
MOST = 150 * MIB
"""Growth of the service; what is sent at it is several times that."""
EMBED = "/perturbscope.v1.PerturbScope/Embed"
OPEN = (
    "/grpc.health.v1.Health/Check",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path
) -> Iterator[tuple[RunningServer, tuple[tuple[str, str], ...]]]:
    """A service with keys, and the metadata of one of them."""
    folder = tmp_path_factory.mktemp("door")
    keys = folder / "keys.json"
    output = folder / "key"
    with output.open("w") as file, contextlib.redirect_stdout(file):
        assert command.main(["add", "--file", str(keys), "--name", "caller"]) == 0
    with RunningServer(folder, bundle=tiny_bundle, keys=keys) as running:
        yield running, (("authorization", f"Bearer {output.read_text().strip()}"),)


@contextlib.contextmanager
def growth(service: RunningServer) -> Iterator[Callable[[], int]]:
    """A function that returns by how many bytes the service has grown, at most, since this was entered."""
    worker = service.worker()
    before = peak = worker.memory_info().rss
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, worker.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak - before
    finally:
        ended.set()
        thread.join()


def field(number: int, data: bytes) -> bytes:
    """A field of a message, with as many bytes as it has."""
    size, length = len(data), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes([*length, size]) + data


def channel_of(service: RunningServer) -> Any:
    return grpc.insecure_channel(
        service.target, [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    )


def outcomes(calls: list[Any]) -> set[str]:
    """Names of the statuses of calls, once all have ended."""
    return {call.code().name for call in calls}


@pytest.mark.parametrize("packed", [None, grpc.Compression.Gzip], ids=["plain", "gzip"])
def test_nothing_is_read_of_a_stranger(service: Any, packed: Any) -> None:
    running, _ = service
    message, n_calls = field(1, b"a" * LARGE), CALLS if packed is None else 2  # packing takes the test's time
    with growth(running) as grown, channel_of(running) as channel:
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="a" * LARGE), compression=packed
            )
            for _ in range(n_calls)
        ]
        calls = [
            channel.unary_unary(method).future(message, compression=packed, timeout=60)
            for method in (*OPEN, EMBED)
            for _ in range(n_calls)
        ]
        found = outcomes(calls)
        time.sleep(1)
        for watch in watches:
            watch.cancel()
        assert grown() < MOST
    assert found <= {"OK", "UNAUTHENTICATED", *(("UNIMPLEMENTED",) if packed else ())}


def test_a_packed_message_is_refused_before_it_is_unpacked(service: Any) -> None:
    running, key = service
    message = field(15, bytes(LARGE))
    with growth(running) as grown, channel_of(running) as channel:
        calls = [
            channel.unary_unary(EMBED).future(message, metadata=key, compression=grpc.Compression.Gzip, timeout=60)
            for _ in range(4)
        ]
        assert outcomes(calls) == {"UNIMPLEMENTED"}
        assert grown() < MOST


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("perturbscope.v1.PerturbScope/Compare", field(4, b"") * 8_000_000),
        (
            "perturbscope.v1.PerturbScope/Compare",
            field(3, b"a") * 9_000_000,
        ),
        ("perturbscope.v1.PerturbScope/EmbedStream", field(1, field(1, b"") * 9_000_000)),
        ("inference.GRPCInferenceService/ModelInfer", field(5, b"") * 8_000_000),
        ("inference.GRPCInferenceService/ModelInfer", field(5, field(5, field(3, b"\1" * 17_000_000)))),
    ],
    ids=["pairs", "labels", "genes", "inputs", "numbers"],
)
def test_items_are_counted_before_they_are_made(service: Any, method: str, message: bytes) -> None:
    """16 MB that would be a gigabyte and more."""
    running, key = service
    with growth(running) as grown, channel_of(running) as channel:
        call = channel.stream_stream(f"/{method}")(iter([message]), metadata=key, timeout=60)
        with pytest.raises(grpc.RpcError) as refused:
            list(call)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ("perturbscope-code", "limit_exceeded") in refused.value.trailing_metadata()
        assert grown() < MOST


def test_a_message_over_the_limit_is_refused_at_its_first_bytes(service: Any) -> None:
    running, key = service
    with growth(running) as grown, channel_of(running) as channel:
        call = channel.unary_unary(EMBED).future(bytes(300 * MIB), metadata=key, timeout=60)
        assert outcomes([call]) == {"RESOURCE_EXHAUSTED"}
        assert grown() < MOST


@pytest.mark.parametrize("method", ["Embed", "EmbedStream"])
def test_messages_are_held_while_they_arrive(tmp_path: Path, tiny_bundle: Path, method: str) -> None:
    """One caller sends 2 GB at a time to a service that gives 160 MB to all; another is answered meanwhile."""
    keys = tmp_path / "keys.json"
    made = {}
    for name in ("greedy", "other"):
        with (tmp_path / name).open("w") as file, contextlib.redirect_stdout(file):
            assert command.main(["add", "--file", str(keys), "--name", name]) == 0
        made[name] = (("authorization", f"Bearer {(tmp_path / name).read_text().strip()}"),)
    held = 160 * MIB
    with RunningServer(
        tmp_path, bundle=tiny_bundle, keys=keys, max_body_bytes=100 * MIB, max_held_bytes=held
    ) as running:
        large = field(1, field(2, bytes(96 * MIB)))
        with growth(running) as grown, channel_of(running) as channel, channel_of(running) as second:
            greedy = [
                channel.stream_stream(f"/perturbscope.v1.PerturbScope/{method}")(
                    iter([large]), metadata=made["greedy"], timeout=120
                )
                for _ in range(20)
            ]
            seconds = []
            while any(call.is_active() for call in greedy):
                began = time.monotonic()
                models = second.unary_unary("/perturbscope.v1.PerturbScope/Models")
                assert models(b"", metadata=made["other"], timeout=60)
                seconds.append(time.monotonic() - began)
                time.sleep(0.05)
            assert grown() < held + MOST
        assert max(seconds) < 5
        assert outcomes(greedy) <= {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}
        assert "RESOURCE_EXHAUSTED" in outcomes(greedy)
