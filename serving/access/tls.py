"""TLS for both servers, and mutual TLS: a client without a certificate of the right authority does not get in.

gRPC looks at the files at each handshake, so that a renewed certificate counts at once; connections that exist keep the
old one. HTTP reads them when it starts.
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

_Files = tuple[bytes, bytes, bytes | None]


def check(settings: Settings) -> None:
    """Refuse files that a server could not serve with; callable before there is one.

    Raises
    ------
    InvalidParameterError
        One is missing, or is no certificate or key, or the two do not belong together.
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
    """What ``bentoml serve`` is told for HTTP."""
    if not settings.tls_certificate:
        return []
    options = ["--ssl-certfile", settings.tls_certificate, "--ssl-keyfile", settings.tls_key]
    if settings.tls_client_ca:
        options += ["--ssl-ca-certs", settings.tls_client_ca, "--ssl-cert-reqs", str(int(ssl.CERT_REQUIRED))]
    return options


def grpc_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Of the gRPC server, which follow their files; None where no certificate is set. Raises as :func:`check`."""
    if not settings.tls_certificate:
        return None
    check(settings)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(_read(settings)),
        cast("Any", _Renewed(settings)),  # None means no change, which the stubs do not know
        require_client_authentication=bool(settings.tls_client_ca),
    )


class _Renewed:
    """Gives gRPC new files after they have changed; called at each handshake, on gRPC's own threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seen = self._look()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """The new files, or None: the old ones stay. Never raises."""
        seen = self._look()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            check(self._settings)
            configuration = _configuration(_read(self._settings))
        except (InvalidParameterError, OSError) as error:
            logger.error("the new files of TLS are not usable, gRPC goes on with those before: %s", error)
            return None
        logger.info("gRPC took the new certificate")
        return configuration

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_signature(path) for path in _paths(self._settings)]


def _paths(settings: Settings) -> list[str]:
    given = [settings.tls_key, settings.tls_certificate, settings.tls_client_ca]
    return [path for path in given if path]


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(settings: Settings) -> _Files:
    key, chain, *ca = [Path(path).read_bytes() for path in _paths(settings)]
    return key, chain, ca[0] if ca else None


def _configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
    key, chain, ca = files
    make: Callable[..., grpc.ServerCertificateConfiguration] = grpc.ssl_server_certificate_configuration
    return make([(key, chain)], root_certificates=ca)


def _no_password() -> str:
    raise ValueError("the private key has a password")
