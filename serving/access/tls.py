"""TLS of both servers, and mutual TLS, which refuses clients without a certificate of the right authority.

gRPC checks the files at each handshake, so that a renewed certificate counts at once; existing connections keep the old
one. HTTP reads them when it starts.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc

from perturbscope.errors import InvalidParameterError
from serving.settings import PREFIX, Settings
from serving.telemetry.log import logger

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Suites of TLS 1.2 over HTTP, all with forward secrecy and authenticated encryption; those of TLS 1.3 have no choice.
BentoML's and uvicorn's own default leaves suites with CBC and SHA-1 alone, which TLS 1.2 clients of today refuse."""
_Files = tuple[bytes, bytes, bytes | None]


def check(settings: Settings) -> None:
    """Refuse certificates and keys that cannot be used, before the server starts.

    Raises
    ------
    InvalidParameterError
        A file is missing, or is no certificate or key, or the two do not belong together.
    """
    if not settings.tls_certificate:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=_no_password)
        if settings.tls_client_ca:
            context.load_verify_locations(settings.tls_client_ca)
    except (OSError, ValueError) as error:
        raise InvalidParameterError(
            f"TLS cannot be served with {PREFIX}TLS_CERTIFICATE={settings.tls_certificate}, {PREFIX}TLS_KEY="
            f"{settings.tls_key}, {PREFIX}TLS_CLIENT_CA={settings.tls_client_ca}: {error}. "
            "Give files in PEM, the key without a password.",
            field="tls_certificate",
        ) from error


def bentoml_options(settings: Settings) -> list[str]:
    """Return the options of ``bentoml serve`` for TLS over HTTP."""
    if not settings.tls_certificate:
        return []
    options = ["--ssl-certfile", settings.tls_certificate, "--ssl-keyfile", settings.tls_key]
    options += ["--ssl-ciphers", CIPHERS]
    if settings.tls_client_ca:
        options += ["--ssl-ca-certs", settings.tls_client_ca, "--ssl-cert-reqs", str(int(ssl.CERT_REQUIRED))]
    return options


def grpc_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Return credentials of the gRPC server that follow their files; None without TLS. Raises as :func:`check`."""
    if not settings.tls_certificate:
        return None
    check(settings)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(_read(settings)),
        cast("Any", _Renewed(settings)),  # None means no change, which gRPC's type stubs do not know
        require_client_authentication=bool(settings.tls_client_ca),
    )


class _Renewed:
    """Gives gRPC new files after they have changed; called at each handshake, on gRPC's own threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state = self._file_states()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new files, or None: the old ones stay. Never raises."""
        state = self._file_states()
        if state == self._state:
            return None
        self._state = state
        try:
            check(self._settings)
            configuration = _configuration(_read(self._settings))
        except (InvalidParameterError, OSError) as error:
            logger.error("the new files of TLS are not usable, gRPC goes on with those before: %s", error)
            return None
        logger.info("gRPC took the new certificate")
        return configuration

    def _file_states(self) -> list[tuple[int, int, int] | None]:
        return [_file_state(path) for path in _paths(self._settings)]


def _paths(settings: Settings) -> list[str]:
    return [path for path in (settings.tls_key, settings.tls_certificate, settings.tls_client_ca) if path]


def _file_state(path: str) -> tuple[int, int, int] | None:
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(settings: Settings) -> _Files:
    key, chain, *ca = [Path(path).read_bytes() for path in _paths(settings)]
    return key, chain, ca[0] if ca else None


def _configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
    key, chain, ca = files
    make: Callable[..., grpc.ServerCertificateConfiguration] = grpc.ssl_server_certificate_configuration
    return make([(key, chain)], root_certificates=ca)


def _no_password() -> str:
    raise ValueError("the private key has a password")
