"""The real service behind API keys and mutual TLS: nobody gets in who lacks either, on any path."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme

import perturbscope as ps
from perturbscope.client import Client, GrpcClient, RetryPolicy
from perturbscope.errors import ServerUnreachableError, UnauthenticatedError
from serving.commands import keys as command
from tests.integration.server import ROOT, RunningServer

ONCE = RetryPolicy(attempts=1)


class SecureServer(RunningServer):
    """The service with keys and mutual TLS; ``files`` are those of clients."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.files = {}
        for name in ("server", "client"):
            made = authority.issue_cert("127.0.0.1", common_name=name)
            self.files[name] = folder / f"{name}.pem", folder / f"{name}.key"
            made.cert_chain_pems[0].write_to_path(str(self.files[name][0]))
            made.private_key_pem.write_to_path(str(self.files[name][1]))
        self.keys = folder / "keys.json"
        super().__init__(
            folder,
            bundle=bundle,
            keys=self.keys,
            tls_certificate=self.files["server"][0],
            tls_key=self.files["server"][1],
            tls_client_ca=self.ca,
        )
        self.url = self.url.replace("http://", "https://")
        self.target = f"grpcs://{self.target}"

    def context(self, *, certificate: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        if certificate:
            context.load_cert_chain(*self.files["client"])
        return context

    def answers(self, probe: str) -> bool:
        try:
            return httpx.get(self.url + probe, timeout=5, verify=self.context()).status_code == 200
        except httpx.TransportError:
            return False

    def trust(self, **options: Any) -> dict[str, Any]:
        """Options of a client that shows a certificate."""
        return {"ca": self.ca, "cert": self.files["client"], "retries": ONCE, **options}

    def health(self, **changes: str) -> subprocess.CompletedProcess[str]:
        """What the image's health check says."""
        return subprocess.run(
            [sys.executable, "-m", "serving", "healthcheck"],
            cwd=ROOT,
            env={**self._environment, **changes},
            capture_output=True,
            text=True,
            timeout=60,
        )


def make(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command.main(arguments) == 0
    return capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[SecureServer]:
    folder = tmp_path_factory.mktemp("secure")
    server = SecureServer(folder, tiny_bundle)
    assert command.main(["add", "--file", str(server.keys), "--name", "first"]) == 0
    with server:
        yield server


def test_without_a_key(service: SecureServer) -> None:
    with httpx.Client(base_url=service.url, verify=service.context()) as http:
        for path in ("/", "/healthz", "/livez", "/readyz"):
            assert http.get(path).status_code == 200, path
        for path in ("/metrics", "/docs.json", "/schema.json", "/docs", "/v1/models", "/v1/openapi.json", "/v2", "/no"):
            assert http.get(path).status_code == 401, path
    for client in (Client(service.url, **service.trust()), GrpcClient(service.target, **service.trust())):
        with client, pytest.raises(UnauthenticatedError):
            client.models()


def test_without_a_certificate(service: SecureServer) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(service.url + "/readyz", verify=service.context(certificate=False))
    with pytest.raises(httpx.TransportError):
        httpx.get(service.url.replace("https://", "http://") + "/readyz")
    channel = grpc.secure_channel(
        service.target.removeprefix("grpcs://"), grpc.ssl_channel_credentials(service.ca.read_bytes())
    )
    with pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(3)
    channel.close()
    with GrpcClient(service.target, ca=service.ca, retries=ONCE) as client, pytest.raises(ServerUnreachableError):
        client.models()


def test_with_both_and_a_rotated_key(service: SecureServer, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--file", str(service.keys)]
    text = make(capsys, "add", *file, "--name", "pipeline", "--right", "infer", "--right", "admin")
    for _ in range(2):
        with Client(service.url, **service.trust(api_key=text)) as client:
            assert client.models()
        with GrpcClient(service.target, **service.trust(api_key=text)) as client:
            assert client.models()
        old, text = text, make(capsys, "rotate", *file, "pipeline")
    make(capsys, "revoke", *file, old.split("_")[1])
    certificate = service.files["client"]
    with ps.load(service.url, api_key=text, ca=service.ca, cert=certificate) as model:
        assert model.model_id
    with GrpcClient(service.target, **service.trust(api_key=old)) as client, pytest.raises(UnauthenticatedError):
        client.models()
    scrape = make(capsys, "add", *file, "--name", "prometheus", "--right", "metrics")
    with httpx.Client(verify=service.context(), headers={"x-api-key": scrape}) as http:
        assert http.get(service.url + "/metrics").status_code == 200
        assert http.get(service.url + "/v1/models").status_code == 403
    written = service.log + service.output
    command_lines = " ".join(part for process in service.processes() for part in process.cmdline())
    for key in (text, old, scrape):
        assert key[13:] not in written + command_lines


def test_the_health_check_of_the_image(service: SecureServer) -> None:
    done = service.health()
    assert done.returncode == 0, done.stderr
    assert service.health(PERTURBSCOPE_HOST="0.0.0.0").returncode == 0
    done = service.health(PERTURBSCOPE_TLS_CERTIFICATE="")
    assert (done.returncode, "not ready" in done.stderr) == (1, True)


def test_endless_headers_end_the_connection_and_not_the_server(service: SecureServer) -> None:
    address = ("127.0.0.1", service.http_port)
    worker = service.worker()
    before = worker.memory_info().rss
    sent, plain = 0, socket.create_connection(address, timeout=30)
    with plain, service.context().wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-a: ")
        with contextlib.suppress(OSError):
            while sent < 64 * 2**20:
                sent += connection.send(b"a" * 2**16)
    assert sent < 64 * 2**20
    assert worker.memory_info().rss - before < 50 * 2**20
    assert service.answers("/readyz")


def test_no_secret_is_in_the_environment_of_the_service(service: SecureServer) -> None:
    """Keys and private keys are named there, as files; the values are not."""
    secret = service.files["server"][1].read_text().splitlines()[1]
    for process in service.processes():
        assert secret not in " ".join(process.environ().values())
    assert os.environ.get("PERTURBSCOPE_API_KEY") is None


def test_old_versions_of_tls_are_refused(service: SecureServer) -> None:
    for port in (service.http_port, service.grpc_port):
        for version, works in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
            context = service.context()
            if not works:
                context.set_ciphers("DEFAULT@SECLEVEL=0")  # or this side would refuse
            with pytest.warns(DeprecationWarning, match="TLSv1_1") if not works else contextlib.nullcontext():
                context.minimum_version = context.maximum_version = version
            context.set_alpn_protocols(["h2"] if port == service.grpc_port else ["http/1.1"])
            with socket.create_connection(("127.0.0.1", port), timeout=30) as plain:
                if works:
                    with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                        assert connection.version() == "TLSv1.2"
                        suite = (connection.cipher() or ("", "", 0))[0]
                        assert "ECDHE" in suite
                        assert "GCM" in suite or "CHACHA20" in suite
                else:
                    with pytest.raises(OSError, match=r"(?i)version|alert|eof|reset"):
                        context.wrap_socket(plain, server_hostname="127.0.0.1")
