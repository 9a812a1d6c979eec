"""Connections of gRPC: clients may ping, and a connection ends when it is old."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from serving.engine.engine import Engine
from serving.grpc import server as serving_server
from tests.apps import grpc_server_of
from tests.unit.serving.conftest import MakeEngine

PREFACE, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
PING = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + bytes(8)
PING_KIND, GOAWAY_KIND = 6, 7


async def frames(engine: Engine, *, pings: int, apart: float, until: float) -> list[int]:
    """Kinds of the frames of a server that is pinged, until the connection ends or the seconds are over."""
    server = grpc_server_of(engine)
    reader, writer = await asyncio.open_connection("127.0.0.1", await server.start())
    found: list[int] = []

    async def read() -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                found.append(head[3])

    reading = asyncio.create_task(read())
    writer.write(PREFACE + SETTINGS)
    for _ in range(pings):
        writer.write(PING)
        await asyncio.sleep(apart)
    await asyncio.wait([reading], timeout=until)
    reading.cancel()
    writer.close()
    await server.stop()
    return found


async def test_clients_may_ping_without_calls(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_server, "PING", 0.1)
    found = await frames(engine, pings=8, apart=0.15, until=0.2)
    assert found.count(PING_KIND) == 8
    assert GOAWAY_KIND not in found
    assert GOAWAY_KIND in await frames(engine, pings=8, apart=0.01, until=0.2)


async def test_an_old_connection_ends(make_engine: MakeEngine) -> None:
    assert GOAWAY_KIND in await frames(make_engine(connection_age=1), pings=0, apart=0, until=5)
    assert GOAWAY_KIND not in await frames(make_engine(), pings=0, apart=0, until=2)
