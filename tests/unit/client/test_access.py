"""Credentials of clients: API keys, authorities and certificates; no message shows a key."""

from __future__ import annotations

import base64
import contextlib
import inspect
import logging
import socket
import threading
import traceback
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest

import perturbscope as ps
from perturbscope.cli import app, console, options
from perturbscope.client import AsyncClient, AsyncGrpcClient, Client, GrpcClient, RetryPolicy, access
from perturbscope.errors import InvalidParameterError, PermissionDeniedError, PerturbScopeError, UnauthenticatedError
from serving.settings import Settings
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake_server import FakeServer

TEXT = "psk_0123abcd_" + "x" * 43


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (access.KEY, access.KEY_FILE, access.CA, access.CERTIFICATE, access.PRIVATE_KEY):
        monkeypatch.delenv(name, raising=False)


def shown(api_key: str | None = None, host: str = "localhost", *, encrypted: bool = True) -> dict[str, str]:
    return access.key_headers(api_key, host, encrypted=encrypted)


def test_where_the_key_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shown() == {}
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.setenv(access.KEY_FILE, str(tmp_path / "key"))
    assert shown() == {"authorization": "Bearer from-file"}
    monkeypatch.setenv(access.KEY, "from-environment")
    assert shown() == {"authorization": "Bearer from-environment"}
    assert shown("given") == {"authorization": "Bearer given"}
    assert shown("") == {}


@pytest.mark.parametrize("text", ["a b", "a\nb", "\u00fc", "x" * 1025, "a\r\nx-other: 1"])
def test_what_cannot_be_a_key_is_refused_without_saying_it(text: str) -> None:
    with pytest.raises(InvalidParameterError) as refused:
        shown(text)
    assert text not in refused.value.message


def test_a_file_that_is_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(access.KEY_FILE, str(tmp_path / "none"))
    with pytest.raises(InvalidParameterError, match="cannot be read: No such file"):
        shown()
    (tmp_path / "none").write_bytes(b"\xff")
    with pytest.raises(InvalidParameterError, match="not ASCII") as refused:
        shown()
    assert refused.value.__cause__ is None  # which would hold what was read


def test_a_key_in_clear_text_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="perturbscope"):
        for host in ("localhost", "127.0.0.1", "[::1]", "::1", "a.localhost"):
            shown(TEXT, host, encrypted=False)
        shown(TEXT, "10.0.0.1")
        assert caplog.text == ""
        shown(TEXT, "10.0.0.1", encrypted=False)
    assert "goes to 10.0.0.1 unencrypted" in caplog.text
    assert TEXT not in caplog.text


async def test_http_clients_send_the_key_and_hide_it(server: FakeServer) -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return server.http(request)

    with Client("http://localhost", api_key=TEXT, transport=httpx.MockTransport(answer)) as client:
        client.models()
        assert TEXT not in repr(client) + repr(client._http.headers) + str(client._http.headers)
    async with AsyncClient("http://localhost", api_key=TEXT, transport=httpx.MockTransport(answer)) as other:
        await other.models()
    with Client("http://localhost", transport=httpx.MockTransport(answer)) as client:
        client.models()
    assert seen == [f"Bearer {TEXT}"] * 2 + [None]


async def test_grpc_clients_send_the_key_and_hide_it(server: FakeServer, grpc_target: str) -> None:
    with GrpcClient(grpc_target, api_key=TEXT) as client:
        client.models()
        assert TEXT not in repr(client)
    assert ("authorization", f"Bearer {TEXT}") in server.metadata[-1]
    async with AsyncGrpcClient(f"grpc://{grpc_target}", api_key=TEXT) as other:
        await other.models()
    assert ("authorization", f"Bearer {TEXT}") in server.metadata[-1]


@pytest.mark.parametrize(
    ("status", "error"), [(401, UnauthenticatedError), (403, PermissionDeniedError)], ids=["401", "403"]
)
def test_a_proxy_that_wants_credentials(status: int, error: type[Exception]) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text="<html>no</html>"))
    with Client("http://localhost", transport=transport, retries=QUICK) as client, pytest.raises(error):
        client.models()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Client("http://localhost", ca="ca.pem"),
        lambda: Client("https://localhost", ca="none.pem"),
        lambda: Client("https://localhost", cert=("none.pem", "none.pem")),
        lambda: GrpcClient("grpc://localhost:1", ca="ca.pem"),
        lambda: GrpcClient("localhost:1", ca="none.pem"),
        lambda: ps.load("grpcs://localhost:1", ca="none.pem"),
        lambda: ps.load("bundle", api_key=TEXT),
    ],
)
def test_bad_files_and_addresses_are_said_at_once(make: Any) -> None:
    with pytest.raises(InvalidParameterError):
        make()


def test_the_command_line_takes_a_file_and_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (options.KEY_VARIABLE, options.KEY_FILE_VARIABLE, options.CA_VARIABLE) == (
        access.KEY,
        access.KEY_FILE,
        access.CA,
    )
    (tmp_path / "key").write_text(TEXT)
    monkeypatch.setenv(access.KEY, "another")
    monkeypatch.setenv(access.KEY_FILE, "")
    monkeypatch.setenv(access.CA, "")
    files = ["--api-key-file", str(tmp_path / "key"), "--ca", str(tmp_path / "ca.pem")]
    app.run([*files, "embed", "none.h5ad", "out.h5ad", "--server", "http://localhost"])
    assert shown() == {"authorization": f"Bearer {TEXT}"}
    assert access.files_of(None, None)[0] == str(tmp_path / "ca.pem")


PASSWORD = "p%40ss/w0rd"


class Proxy:
    """A server that notes what it is asked to connect to, and refuses."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection:
                    self.asked.append(connection.recv(65536))
                    connection.sendall(b"HTTP/1.1 502 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy()
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{proxy.port}")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield proxy
    proxy.close()


async def done(result: Any) -> Any:
    """The result of a method of any client."""
    return await result if inspect.isawaitable(result) else result


async def ask(kind: Any, address: str, **options: Any) -> None:
    """Ask something of a client of an address; no try is made twice."""
    if kind is ps.load:
        with ps.load(address) as model:
            assert model.model_id
        return
    client = kind(address, timeout=5, retries=RetryPolicy(attempts=1), **options)
    try:
        await done(client.models())
    finally:
        await done(client.close())


@pytest.mark.parametrize("kind", [Client, AsyncClient, GrpcClient, AsyncGrpcClient])
async def test_this_machine_is_never_asked_through_a_proxy(proxy: Proxy, kind: Any) -> None:
    """However it is written; and the proxy is asked for other machines, so the test can fail."""
    scheme = "grpc" if "Grpc" in kind.__name__ else "http"
    for host in ("localhost", "LOCALHOST", "127.0.0.1", "127.1.2.3", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]"):
        with pytest.raises(PerturbScopeError):
            await ask(kind, f"{scheme}://{host}:1", api_key=TEXT)
        assert proxy.asked == [], host
    if scheme == "http":
        for address in ("https://localhost:1", "http://127.1:1", "http://localhost.:1", "http://a.localhost:1"):
            with pytest.raises(PerturbScopeError):
                await ask(kind, address, api_key=TEXT)
            assert proxy.asked == [], address
    with pytest.raises(PerturbScopeError):
        await ask(kind, f"{scheme}://cells.example.org:1")
    assert b"cells.example.org:1" in proxy.asked[0]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_name_and_password_of_an_address_are_sent_and_shown_nowhere(kind: Any, server: FakeServer) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return server.http(request)

    address = f"http://user:{PASSWORD.replace('/', '%2F')}@localhost:1"
    client = kind(address, api_key=TEXT, transport=httpx.MockTransport(answer))
    await done(client.models())
    (request,) = seen
    assert base64.b64decode(request.headers["authorization"].removeprefix("Basic ")) == b"user:p@ss/w0rd"
    assert request.headers["x-api-key"] == TEXT
    assert "user" not in str(request.url) + repr(vars(client)) + str(client._http.base_url)
    await done(client.close())


@pytest.mark.parametrize("kind", [Client, AsyncClient, GrpcClient, AsyncGrpcClient, ps.load])
@pytest.mark.parametrize(
    "address",
    [
        f"SCHEME://user:{PASSWORD}@localhost:1",
        "SCHEME://user:w0rd@localhost:1",
        "SCHEME://user:w0rd@local host:1",
        "SCHEME://user:w0rd@localhost:x1",
        "SCHEME://user:1?w0rd@localhost:1",
        "SCHEME://w0rd@localhost:1",
        "ftp://user:w0rd@localhost:1",
        "grpc://user:w0rd@localhost:1",
        "http+x://user:w0rd@localhost:1/@",
    ],
)
async def test_no_error_shows_name_and_password_of_an_address(
    address: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its message nor what it is chained to, which tracebacks show."""
    address = address.replace("SCHEME", "grpc" if "Grpc" in getattr(kind, "__name__", "") else "http")
    monkeypatch.setattr(RetryPolicy, "pause", lambda *_: None)
    with pytest.raises(PerturbScopeError) as failed:
        await ask(kind, address)
    error: BaseException | None = failed.value
    while error is not None:
        for text in (str(error), repr(error), repr(error.args), "".join(traceback.format_exception(error))):
            lines = [line for line in text.split("\n") if "address" not in line]  # this test's own source
            assert "w0rd" not in "".join(lines)
        error = error.__cause__ or error.__context__


def test_a_variable_nearly_like_one_of_the_clients_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, meant in (
        ("APIKEY", "API_KEY"),
        ("API_KEY_FIEL", "API_KEY_FILE"),
        ("CLIENT_CERTIFICAT", "CLIENT_CERTIFICATE"),
    ):
        monkeypatch.setenv(f"PERTURBSCOPE_{name}", TEXT)
        with pytest.raises(InvalidParameterError, match=f"Is PERTURBSCOPE_{meant} meant") as refused:
            Client("https://localhost:1")
        assert TEXT not in refused.value.message
        monkeypatch.delenv(f"PERTURBSCOPE_{name}")
    monkeypatch.setenv("PERTURBSCOPE_BUNDEL", "bundles/default")
    assert app.run(["operations"]) == console.EXIT_USAGE
    monkeypatch.delenv("PERTURBSCOPE_BUNDEL")
    access.check_names({f"PERTURBSCOPE_{item.name.upper()}": "x" for item in fields(Settings)})  # those of a server
