"""Messages that are still arriving hold memory, by what the kernel says that their connection received."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from perturbscope.errors import PerturbScopeError
from serving.access.limits import Admission
from serving.grpc import inflow as module
from serving.grpc.inflow import Inflow
from serving.settings import Settings

MIB = 2**20


class Context:
    """A call of a connection, whose message comes when `message` is set."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.message: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def peer(self) -> str:
        return self._peer

    async def read(self) -> bytes:
        return await self.message


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that each connection has received, by its peer."""
    found: dict[str, int] = {}
    monkeypatch.setattr(module, "TICK", 0.001)
    monkeypatch.setattr(Inflow, "_received", lambda _, peer: found.get(peer))
    return found


async def looked() -> None:
    await asyncio.sleep(0.02)


async def test_bytes_are_held_while_they_arrive_and_given_back_with_the_message(received: dict[str, int]) -> None:
    admission = Admission(Settings(max_body_bytes=10 * MIB, max_held_bytes=100 * MIB))
    inflow, context, idle = Inflow(admission), Context("a"), Context("a")
    received["a"] = 5 * MIB
    waits = asyncio.ensure_future(inflow.read(idle, "alice"))
    reading = asyncio.ensure_future(inflow.read(context, "alice"))
    await looked()
    assert admission.held_bytes == 0
    received["a"] += 9 * MIB
    await looked()
    assert admission.held_bytes == 3 * 8 * MIB
    context.message.set_result(bytes(9 * MIB))
    assert len(await reading) == 9 * MIB
    assert admission.held_bytes == 0
    for _ in range(100):
        received["a"] += 1000
        small = Context("a")
        small.message.set_result(bytes(900))
        await inflow.read(small, "alice")
    await looked()
    assert admission.held_bytes == 0
    received["a"] += 3 * MIB
    await looked()
    assert admission.held_bytes > 0
    waits.cancel()
    await looked()
    assert admission.held_bytes == 0


async def test_who_sends_more_than_there_is_room_for_is_refused_and_no_other(received: dict[str, int]) -> None:
    """Bob and Alice share a connection, as behind a proxy; Carol has one of her own."""
    admission = Admission(Settings(max_body_bytes=10 * MIB, max_held_bytes=100 * MIB))
    inflow = Inflow(admission)
    contexts: list[Any] = []
    for peer, flow in (("a", "alice"), ("a", "bob"), ("a", "bob"), ("c", "carol")):
        context = Context(peer)
        contexts.append((flow, context, asyncio.ensure_future(inflow.read(context, flow))))
        received[peer] = 0
    await looked()
    received["a"] += 200 * MIB
    await looked()
    for flow, context, reading in contexts:
        if flow == "bob":
            with pytest.raises(PerturbScopeError, match="in progress"):
                await reading
        else:
            context.message.set_result(b"x")
            assert await reading == b"x"
    assert admission.held_bytes == 0


async def test_a_reader_without_patience_is_timed_out(received: dict[str, int]) -> None:
    with pytest.raises(TimeoutError):
        await Inflow(Admission(Settings())).read(Context("a"), "alice", 0.01)


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
async def test_the_kernel_counts_what_a_connection_received(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        listening.listen()
        with socket.socket(family) as client:
            client.connect(listening.getsockname())
            accepted, _ = listening.accept()
            port = client.getsockname()[1]
            peer = f"ipv4:{host}:{port}" if family == socket.AF_INET else f"ipv6:[{host}]:{port}"
            inflow = Inflow(Admission(Settings()))
            with accepted:
                before = inflow._received(peer)
                client.sendall(bytes(100_000))
                n_bytes = 0
                while n_bytes < 100_000:
                    n_bytes += len(accepted.recv(2**16))
                assert (before, inflow._received(peer)) == (0, 100_000)
            assert inflow._received(peer) is None
