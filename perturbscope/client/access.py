"""Credentials of a client: its API key, the authorities that it trusts, and its own certificate.

======================================  ================================================================
variable                                value, if the argument is left out
======================================  ================================================================
``PERTURBSCOPE_API_KEY``                the API key
``PERTURBSCOPE_API_KEY_FILE``           a file that holds nothing but the API key
``PERTURBSCOPE_CA``                     file of the authorities (PEM) that are trusted, in place of the system's
``PERTURBSCOPE_CLIENT_CERTIFICATE``     file of the client's own certificate (PEM), for mutual TLS
``PERTURBSCOPE_CLIENT_KEY``             file of its private key (PEM)
======================================  ================================================================
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from perturbscope.errors import InvalidParameterError, near

if TYPE_CHECKING:
    import grpc

KEY, KEY_FILE = "PERTURBSCOPE_API_KEY", "PERTURBSCOPE_API_KEY_FILE"
CA = "PERTURBSCOPE_CA"
CERTIFICATE, PRIVATE_KEY = "PERTURBSCOPE_CLIENT_CERTIFICATE", "PERTURBSCOPE_CLIENT_KEY"
VARIABLES = (KEY, KEY_FILE, CA, CERTIFICATE, PRIVATE_KEY, "PERTURBSCOPE_BUNDLE", "PERTURBSCOPE_DEBUG")
"""The variables above, and those of the command line."""
_PREFIX = "PERTURBSCOPE_"
Files = str | Path
_LONGEST_KEY = 1024
_LOOPBACK = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
_NUMBERS = re.compile(r"(0x[0-9a-f]+|[0-9]+)(\.(0x[0-9a-f]+|[0-9]+)){0,3}", re.ASCII)

_log = logging.getLogger("perturbscope")


def check_names(environ: Mapping[str, str]) -> None:
    """Refuse variables whose names are nearly those of a variable above, and those of the command line.

    Raises
    ------
    InvalidParameterError
        The message says which variable is meant, and never a value.
    """
    for variable, value in environ.items():
        name = variable.removeprefix(_PREFIX)
        if not value or name == variable or variable in VARIABLES:
            continue
        close = near(name, [other.removeprefix(_PREFIX) for other in VARIABLES], 1, cutoff=0.8)
        if close:
            raise InvalidParameterError(
                f"The environment variable {variable} is not known. Is {_PREFIX}{close[0]} meant? Correct its name, or "
                "unset it.",
                field=name.lower(),
            )


def key_headers(api_key: str | None, host: str, *, encrypted: bool) -> dict[str, str]:
    """Return the header, or gRPC metadata, that carries the API key; empty if there is no key.

    A key that goes to another machine without TLS can be read on the way, so a warning is logged.

    Parameters
    ----------
    api_key
        The key; None: the key of the environment; empty: none.
    host
        Host name or address of the server.
    encrypted
        Whether the server is reached over TLS.

    Raises
    ------
    InvalidParameterError
        The text cannot be a key, or its file cannot be read. The message never holds the key.
    """
    key = _from_environment() if api_key is None else api_key
    if not key:
        return {}
    if len(key) > _LONGEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidParameterError(
            f"The API key is not valid: it has more than {_LONGEST_KEY} characters, or blanks, line breaks or letters "
            "outside of ASCII.",
            field="api_key",
        )
    if not encrypted and not is_loopback(host):
        _log.warning(f"The API key goes to {host} unencrypted; use https:// or grpcs://.")
    return {"authorization": f"Bearer {key}"}


def _from_environment() -> str:
    check_names(os.environ)
    if os.environ.get(KEY):
        return os.environ[KEY].strip()
    path = os.environ.get(KEY_FILE)
    return "" if not path else read_text(path, "api_key").strip()


def is_loopback(host: str) -> bool:
    """Return whether an address or name is one of this machine alone, however it is written."""
    bare = _bare(host)
    if bare in _LOOPBACK or bare.endswith(".localhost"):
        return True
    address = _address(bare)
    return address is not None and address.is_loopback


def without_userinfo(address: str) -> str:
    """Return an address for messages: what stands before its last @ may be a name and a password, and is left out."""
    before, at, rest = address.rpartition("@")
    if not at:
        return address
    scheme, mark, _ = before.partition("://")
    return f"{scheme}://***@{rest}" if mark else f"***@{rest}"


def leads_here(host: str) -> bool:
    """Return whether connecting to an address or name stays on this machine: loopback, and 0.0.0.0 or [::]."""
    address = _address(_bare(host))
    return is_loopback(host) or (address is not None and address.is_unspecified)


def _bare(host: str) -> str:
    return host.strip("[]").partition("%")[0].rstrip(".").lower()


def _address(bare: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        # 127.1, 0x7f000001 and 2130706433 are addresses to whatever connects.
        if not _NUMBERS.fullmatch(bare):
            return None
        try:
            return ipaddress.IPv4Address(socket.inet_aton(bare))
        except OSError:
            return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def tls_context(ca: Files | None, cert: tuple[Files, Files] | None) -> ssl.SSLContext | None:
    """TLS settings of an HTTP client; None (the system's authorities) if no file is given here or in the environment.

    Raises
    ------
    InvalidParameterError
        A file is missing, or does not hold a certificate or key.
    """
    ca, cert = files_of(ca, cert)
    if ca is None and cert is None:
        return None
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
        if cert is not None:
            context.load_cert_chain(str(cert[0]), str(cert[1]), password=_no_password)
    except (OSError, ValueError) as error:
        raise InvalidParameterError(
            f"TLS cannot be set up with ca={_shown(ca)}, cert={_shown(cert and cert[0])}: {error}. "
            "Give files in PEM, the key without a password.",
            field="ca" if cert is None else "cert",
        ) from error
    return context


def grpc_credentials(ca: Files | None, cert: tuple[Files, Files] | None) -> grpc.ChannelCredentials:
    """TLS credentials of a gRPC client. Raises as :func:`tls_context`, which checks the files; grpc does not."""
    import grpc

    tls_context(ca, cert)
    ca, cert = files_of(ca, cert)
    return grpc.ssl_channel_credentials(
        None if ca is None else Path(ca).read_bytes(),
        None if cert is None else Path(cert[1]).read_bytes(),
        None if cert is None else Path(cert[0]).read_bytes(),
    )


def files_of(ca: Files | None, cert: tuple[Files, Files] | None) -> tuple[Files | None, tuple[Files, Files] | None]:
    """Return the files that were given, or those that the environment names."""
    environ = os.environ
    check_names(environ)
    if cert is None and environ.get(CERTIFICATE):
        cert = environ[CERTIFICATE], environ.get(PRIVATE_KEY) or environ[CERTIFICATE]
    return ca or environ.get(CA) or None, cert


def read_text(path: Files, field: str) -> str:
    """Read a small ASCII file. Raises InvalidParameterError."""
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise InvalidParameterError(f"{path} cannot be read: {reason}.", field=field) from None


def _shown(path: Files | None) -> str:
    return "none" if path is None else str(path)


def _no_password() -> str:
    raise ValueError("the private key has a password")
