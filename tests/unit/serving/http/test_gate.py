"""Connections without a request, and clients that do not read, are ended; all others are left alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import uvicorn

from serving.access import tls
from serving.http import gate
from serving.http.gate import GuardedProtocol
from serving.settings import Settings

LARGE = 64 * 2**20
"""More than the kernel takes of an answer that nobody reads."""


class Quick(GuardedProtocol):
    """The protocol with a short head timeout."""

    head_timeout = 0.3


async def application(scope: Any, receive: Any, send: Any) -> None:
    """``/slow`` works for longer than the patience lasts; ``/large`` has a large answer, ``/who`` the client."""
    if scope["path"] == "/slow":
        await asyncio.sleep(1.0)
    body = bytes(LARGE if scope["path"] == "/large" else 2)
    if scope["path"] == "/who":
        body = f"{scope['client'][0]} {scope['scheme']}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(gate, "TICK", 0.05)
    monkeypatch.setattr(gate, "WINDOW", 0.5)
    async with serving(Quick) as port:
        yield port


@contextlib.asynccontextmanager
async def serving(protocol: type[GuardedProtocol], **options: Any) -> AsyncIterator[int]:
    config = uvicorn.Config(application, port=0, http=protocol, lifespan="off", log_config=None, **options)
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


async def test_a_connection_with_many_short_requests_stays(port: int) -> None:
    assert len(await answers(port, 15, 0.1)) == 15


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


HEAD = "POST /who HTTP/1.1\r\nhost: x\r\n"
CHUNKED = "transfer-encoding: chunked\r\n"


@pytest.mark.parametrize(
    "head",
    [
        f"{HEAD}content-length: 4\r\n{CHUNKED}",
        f"{HEAD}{CHUNKED}Content-Length: 4\r\n",
        f"{HEAD}content-length: 4\r\ncontent-length: 4\r\n",
        f"{HEAD}content-length: 4\r\ncontent-length: 5\r\n",
        f"{HEAD}content-length: 4, 4\r\n",
        f"{HEAD}content-length: +4\r\n",
        f"{HEAD}content-length : 4\r\n",
        f"{HEAD}x: a\r\n content-length: 4\r\n",
        f"{HEAD}x: a\r\n\t{CHUNKED}",
        f"{HEAD}x: a\rcontent-length: 4\r\n",
        f"{HEAD}{CHUNKED}{CHUNKED}",
        f"{HEAD}transfer-encoding: gzip, chunked\r\n",
        f"{HEAD}transfer-encoding: \x0bchunked\r\n",
        f"{HEAD}transfer-encoding: identity\r\n",
        f"POST /who HTTP/1.0\r\nhost: x\r\n{CHUNKED}",
        f"{HEAD}host: y\r\n",
    ],
)
async def test_a_request_with_two_ends_is_refused_and_the_connection_ends(port: int, head: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}\r\n4\r\nGET \r\n0\r\n\r\nGET /who HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    async with asyncio.timeout(30):
        said = await reader.read()  # until it ends
    assert said.count(b"HTTP/1.1 ") == 1
    assert said.startswith(b"HTTP/1.1 400 ")
    writer.close()


async def test_bodies_of_one_kind_are_taken(port: int) -> None:
    for framing in ("content-length: 4\r\n\r\nabcd", f"{CHUNKED}\r\n4\r\nabcd\r\n0\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write((HEAD + framing).encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


async def answers(port: int, n: int, apart: float, *, headers: str = "") -> list[bytes]:
    """Heads and bodies of some requests over one connection, as far as it lasts."""
    found = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(n):
        writer.write(f"GET /who HTTP/1.1\r\nhost: x\r\n{headers}\r\n".encode())
        async with asyncio.timeout(30):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            found.append(head + await reader.readexactly(length))
            if b"connection: close" in head.lower():
                assert await reader.read() == b""
                break
        await asyncio.sleep(apart)
    writer.close()
    return found


async def test_an_old_connection_ends_with_an_answer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuardedProtocol, "connection_age", 0.5)
    assert 3 <= len(await answers(port, 50, 0.1)) <= 12
    monkeypatch.setattr(GuardedProtocol, "connection_age", 0.0)
    assert len(await answers(port, 8, 0.1)) == 8


@pytest.mark.parametrize(("proxies", "client"), [("", b"127.0.0.1 http"), ("10.0.0.0/8, 127.0.0.1", b"6.6.6.6 https")])
async def test_only_listed_proxies_say_who_their_client_is(
    monkeypatch: pytest.MonkeyPatch, proxies: str, client: bytes
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # the server's own setting counts
    monkeypatch.setattr(GuardedProtocol, "head_timeout", 30.0)
    monkeypatch.setattr(GuardedProtocol, "connection_age", 0.0)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "")
    gate.install(Settings(trusted_proxies=proxies))
    assert os.environ["FORWARDED_ALLOW_IPS"] != "*"
    headers = "x-forwarded-for: 7.7.7.7, 6.6.6.6, 10.1.2.3\r\nx-forwarded-proto: https\r\n"
    async with serving(GuardedProtocol) as port:
        assert (await answers(port, 1, 0, headers=headers))[0].endswith(client)


@pytest.mark.parametrize("kind", ["RSA", "ECDSA"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_clients_of_one_version_of_tls(tmp_path: Path, kind: str, version: str) -> None:
    authority = trustme.CA(key_type=trustme.KeyType[kind])
    made = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType[kind])
    files = str(tmp_path / "server.pem"), str(tmp_path / "server.key")
    made.cert_chain_pems[0].write_to_path(files[0])
    made.private_key_pem.write_to_path(files[1])
    options = tls.bentoml_options(Settings(tls_certificate=files[0], tls_key=files[1]))
    given = {
        name.removeprefix("--").replace("-", "_"): text for name, text in zip(options[::2], options[1::2], strict=True)
    }
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    async with serving(GuardedProtocol, **given) as port, httpx.AsyncClient(verify=context) as http:
        assert (await http.get(f"https://127.0.0.1:{port}/who")).text == "127.0.0.1 https"
