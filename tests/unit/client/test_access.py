"""Credentials of clients: API keys, authorities and certificates; no message shows a key."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

import perturbscope as ps
from perturbscope.cli import app, options
from perturbscope.client import AsyncClient, AsyncGrpcClient, Client, GrpcClient, access
from perturbscope.errors import InvalidParameterError, PermissionDeniedError, UnauthenticatedError
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
