"""TLS and mutual TLS: with our own server over gRPC, and with our clients over both."""

from __future__ import annotations

import datetime
import http.server
import logging
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from perturbscope import protocol
from perturbscope.client import AsyncClient, AsyncGrpcClient, Client, RetryPolicy
from perturbscope.errors import InvalidParameterError, ServerUnreachableError
from serving.access import tls
from serving.access.keys import keys_to_json, make_key
from serving.commands import safety
from serving.commands import serve as entry
from serving.settings import Settings
from serving.telemetry.log import logger
from tests.apps import grpc_server_of
from tests.unit.serving.conftest import MakeEngine

ONCE = RetryPolicy(attempts=1)
EXPIRED = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


class Certificates:
    """Files of an authority, a server, a client of that authority, and of strangers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, stranger = trustme.CA(), trustme.CA()
        self.ca, self.other_ca = str(folder / "ca.pem"), str(folder / "other-ca.pem")
        self.authority.cert_pem.write_to_path(self.ca)
        stranger.cert_pem.write_to_path(self.other_ca)
        self.server = self.issue("server", self.authority)
        self.client = self.issue("client", self.authority)
        self.stranger = self.issue("stranger", stranger)

    def issue(self, name: str, authority: trustme.CA, **options: Any) -> tuple[str, str]:
        """Files of a certificate for this machine, and of its key."""
        made = authority.issue_cert("127.0.0.1", "localhost", common_name=name, **options)
        files = str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key")
        made.cert_chain_pems[0].write_to_path(files[0])
        made.private_key_pem.write_to_path(files[1])
        return files

    def settings(self, *, mutual: bool = False) -> dict[str, Any]:
        certificate, key = self.server
        return {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": self.ca if mutual else ""}


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@asynccontextmanager
async def serving(make_engine: MakeEngine, settings: dict[str, str]) -> AsyncIterator[str]:
    server = grpc_server_of(make_engine(**settings))
    port = await server.start()
    try:
        yield f"grpcs://127.0.0.1:{port}"
    finally:
        await server.stop()


async def models(target: str, **options: Any) -> int:
    async with AsyncGrpcClient(target, retries=ONCE, timeout=20, **options) as client:
        return len(await client.models())


async def test_grpc_over_tls(make_engine: MakeEngine, certificates: Certificates) -> None:
    async with serving(make_engine, certificates.settings()) as target:
        assert await models(target, ca=certificates.ca) == 1
        assert await models(target.removeprefix("grpcs://"), ca=certificates.ca) == 1
        with pytest.raises(ServerUnreachableError):
            await models(target, ca=certificates.other_ca)
        with pytest.raises(ServerUnreachableError):
            await models(target)  # the system's authorities do not know this one
        with pytest.raises(ServerUnreachableError):
            await models(target.replace("grpcs", "grpc"))  # without TLS


async def test_grpc_over_mutual_tls(make_engine: MakeEngine, certificates: Certificates) -> None:
    expired = certificates.issue("expired", certificates.authority, not_after=EXPIRED)
    async with serving(make_engine, certificates.settings(mutual=True)) as target:
        assert await models(target, ca=certificates.ca, cert=certificates.client) == 1
        for cert in (None, certificates.stranger, expired):
            with pytest.raises(ServerUnreachableError):
                await models(target, ca=certificates.ca, cert=cert)
        assert await models(target, ca=certificates.ca, cert=certificates.client) == 1


async def test_a_key_is_asked_for_beside_the_certificate(
    make_engine: MakeEngine, certificates: Certificates, tmp_path: Path
) -> None:
    key, text = make_key("pipeline")
    (tmp_path / "keys.json").write_bytes(keys_to_json((key,)))
    settings = {**certificates.settings(mutual=True), "keys": str(tmp_path / "keys.json")}
    async with serving(make_engine, settings) as target:
        assert await models(target, ca=certificates.ca, cert=certificates.client, api_key=text) == 1
        with pytest.raises(Exception, match="wants a valid API key"):
            await models(target, ca=certificates.ca, cert=certificates.client)


async def test_an_expired_server_is_not_trusted(make_engine: MakeEngine, certificates: Certificates) -> None:
    certificates.server = certificates.issue("server", certificates.authority, not_after=EXPIRED)
    async with serving(make_engine, certificates.settings()) as target:
        with pytest.raises(ServerUnreachableError):
            await models(target, ca=certificates.ca)


async def test_a_renewed_certificate_counts_without_a_restart(
    make_engine: MakeEngine, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger=logger.name)
    try:
        async with serving(make_engine, certificates.settings()) as target:
            assert await models(target, ca=certificates.ca) == 1
            renewed = trustme.CA()
            certificates.issue("server", renewed)
            renewed.cert_pem.write_to_path(certificates.other_ca)
            assert await models(target, ca=certificates.other_ca) == 1
            assert "gRPC took the new certificate" in caplog.text
            Path(certificates.server[0]).write_text("half a certif")
            assert await models(target, ca=certificates.other_ca) == 1
            assert "goes on with those before" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: {"tls_certificate": str(c.folder / "none.pem")},
        lambda c: {"tls_key": c.client[1]},
        lambda c: {"tls_key": c.ca},
        lambda c: {"tls_client_ca": c.server[1]},
    ],
    ids=["missing", "of another certificate", "no key", "no authority"],
)
def test_a_server_does_not_start_with_bad_files(
    certificates: Certificates, spoil: Callable[[Certificates], dict[str, str]]
) -> None:
    safety.check(Settings(**certificates.settings(mutual=True)))
    with pytest.raises(InvalidParameterError, match="TLS cannot be served with"):
        safety.check(Settings(**{**certificates.settings(mutual=True), **spoil(certificates)}))


def test_half_a_setting_is_refused(certificates: Certificates) -> None:
    halves: list[dict[str, Any]] = [{"tls_certificate": "a"}, {"tls_key": "a"}, {"tls_client_ca": "a"}]
    for half in halves:
        with pytest.raises(InvalidParameterError, match="TLS needs both"):
            Settings(**half)


def test_bentoml_is_told_of_the_same_files(certificates: Certificates) -> None:
    assert tls.bentoml_options(Settings()) == []
    options = tls.bentoml_options(Settings(**certificates.settings(mutual=True)))
    assert dict(zip(options[::2], options[1::2], strict=True)) == {
        "--ssl-certfile": certificates.server[0],
        "--ssl-keyfile": certificates.server[1],
        "--ssl-ciphers": tls.CIPHERS,
        "--ssl-ca-certs": certificates.ca,
        "--ssl-cert-reqs": str(int(ssl.CERT_REQUIRED)),
    }


def test_bentoml_alone_does_not_serve_http_in_clear_text(certificates: Certificates) -> None:
    settings = Settings(**certificates.settings())
    safety.check_http(Settings(), ["bentoml", "serve"])
    safety.check_http(settings, ["bentoml", "serve", *tls.bentoml_options(settings)])
    with pytest.raises(
        InvalidParameterError, match=r"without it\. Start the server with python -m serving, or add: --ssl"
    ):
        safety.check_http(settings, ["bentoml", "serve"])


def test_files_are_named_from_where_the_server_is_started(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(certificates.folder)
    settings = entry._settings(["--tls-certificate", "server.pem", "--tls-key", "server.key"])
    assert (settings.tls_certificate, settings.tls_key, settings.tls_client_ca) == (*certificates.server, "")


def test_what_an_operator_is_warned_of(certificates: Certificates, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(keys_to_json(()))
    path.chmod(0o600)
    Path(certificates.server[1]).chmod(0o600)
    everywhere = "0.0.0.0"
    assert safety.warnings(Settings()) == []
    assert safety.warnings(Settings(host=everywhere, keys=str(path), **certificates.settings())) == []
    assert "no API keys are set" in safety.warnings(Settings(host=everywhere))[0]
    assert "travel unencrypted" in safety.warnings(Settings(host="10.0.0.1", keys=str(path)))[0]
    path.chmod(0o660)
    assert "chmod 600" in safety.warnings(Settings(keys=str(path)))[0]
    Path(certificates.server[1]).chmod(0o644)
    assert "chmod 600" in safety.warnings(Settings(**certificates.settings()))[0]


@contextmanager
def https(certificates: Certificates, *, mutual: bool = False) -> Iterator[str]:
    """A server of one answer, behind TLS."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = protocol.answer_to_json(protocol.ModelsAnswer(models=()))
            self.send_response(200)
            self.send_header("content-type", protocol.JSON)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Ignore the errors of handshakes, which are meant to fail."""

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.ca if mutual else None)
    context.load_cert_chain(*certificates.server)
    context.verify_mode = ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def test_http_clients_over_tls(certificates: Certificates) -> None:
    with https(certificates) as url:
        with Client(url, ca=certificates.ca) as client:
            assert client.models() == ()
        async with AsyncClient(url, ca=certificates.ca) as other:
            assert await other.models() == ()
        with (
            Client(url, ca=certificates.other_ca) as client,
            pytest.raises(ServerUnreachableError, match="not trusted"),
        ):
            client.models()  # and is not tried again: this takes no time


def test_http_clients_over_mutual_tls(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    with https(certificates, mutual=True) as url:
        with Client(url, ca=certificates.ca, cert=certificates.client) as client:
            assert client.models() == ()
        for cert in (None, certificates.stranger):
            client = Client(url, ca=certificates.ca, cert=cert, retries=ONCE)
            with client, pytest.raises(ServerUnreachableError):
                client.models()
        monkeypatch.setenv("PERTURBSCOPE_CA", certificates.ca)
        monkeypatch.setenv("PERTURBSCOPE_CLIENT_CERTIFICATE", certificates.client[0])
        monkeypatch.setenv("PERTURBSCOPE_CLIENT_KEY", certificates.client[1])
        with Client(url) as client:
            assert client.models() == ()
