"""Connections without a request, and clients that do not read, are ended; all others are left alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from serving.http import gate
from serving.http.gate import GuardedProtocol

LARGE = 64 * 2**20
"""More than the kernel takes of an answer that nobody reads."""


class Quick(GuardedProtocol):
    """The protocol with a short head timeout."""

    head_timeout = 0.3


async def application(scope: Any, receive: Any, send: Any) -> None:
    """``/slow`` works for longer than the patience lasts; ``/large`` has a large answer."""
    if scope["path"] == "/slow":
        await asyncio.sleep(1.0)
    body = bytes(LARGE if scope["path"] == "/large" else 2)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(gate, "TICK", 0.05)
    monkeypatch.setattr(gate, "WINDOW", 0.5)
    config = uvicorn.Config(application, port=0, http=Quick, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    config.load()
    running = asyncio.ensure_future(server._serve())
    async with asyncio.timeout(30):
        while not server.started:
            await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await running


@pytest.mark.parametrize("first", [b"", b"GET / HTT"], ids=["nothing", "part of a head"])
async def test_a_connection_that_does_not_ask_ends(port: int, first: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)
    async with asyncio.timeout(30):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    writer.close()


async def test_one_that_trickles_after_an_answer_ends(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await reader.readuntil(b"\0\0")).startswith(b"HTTP/1.1 200")

    async def trickle() -> None:
        while True:
            writer.write(b"G")
            await writer.drain()
            await asyncio.sleep(0.02)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(trickle(), 30)
    writer.close()


async def test_work_takes_as_long_as_it_takes(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(30):
        assert (await reader.readuntil(b"\0\0")).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_an_answer_that_nobody_reads_is_dropped(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(2)
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    async with asyncio.timeout(30):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(LARGE)
    writer.close()


async def test_an_answer_that_is_read_comes_whole(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2 * LARGE)
    writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(60):
        await reader.readuntil(b"\r\n\r\n")
        assert len(await reader.readexactly(LARGE)) == LARGE
    writer.close()
