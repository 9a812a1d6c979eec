"""Checks of keys and certificates before the server starts, and warnings of what it leaves open."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from perturbscope.client.access import is_loopback
from perturbscope.errors import InvalidParameterError
from serving.access import tls
from serving.access.keys import read_keys
from serving.settings import PREFIX, Settings


def check(settings: Settings) -> None:
    """Raise InvalidParameterError for keys and certificates that cannot be used."""
    if settings.keys:
        read_keys(Path(settings.keys))
    tls.check(settings)


def check_http(settings: Settings, command_line: Sequence[str]) -> None:
    """Refuse a ``bentoml serve`` that would answer HTTP in clear text beside gRPC with TLS.

    ``python -m serving`` gives BentoML the certificate; an operator who starts BentoML alone must do so too.

    Raises
    ------
    InvalidParameterError
        A certificate is set, and the command line of BentoML names none.
    """
    if settings.tls_certificate and not any(part.startswith("--ssl-certfile") for part in command_line):
        raise InvalidParameterError(
            f"{PREFIX}TLS_CERTIFICATE is set, but BentoML would serve HTTP without it. Start the server with python -m "
            f"serving, or add: {' '.join(tls.bentoml_options(settings))}.",
            field="tls_certificate",
        )


def warnings(settings: Settings) -> list[str]:
    """Return warnings of what the settings leave open, which the operator probably did not mean."""
    messages = []
    if not settings.keys and not is_loopback(settings.host):
        messages.append(
            f"Everyone who reaches {settings.host} may use this server: no API keys are set. Make some with python -m "
            f"serving keys add, and set {PREFIX}KEYS; or set {PREFIX}HOST=127.0.0.1."
        )
    if settings.keys and not settings.tls_certificate and not is_loopback(settings.host):
        messages.append(
            f"API keys travel unencrypted to {settings.host}: set {PREFIX}TLS_CERTIFICATE and {PREFIX}TLS_KEY, or let "
            "a proxy on this machine end TLS."
        )
    for name, path in (("KEYS", settings.keys), ("TLS_KEY", settings.tls_key)):
        if path and _mode(path) & (stat.S_IWGRP | stat.S_IWOTH | (stat.S_IROTH if name == "TLS_KEY" else 0)):
            messages.append(f"Others may change or read {path} ({PREFIX}{name}): chmod 600 {path}.")
    return messages


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode  # noqa: PTH116  a file of Kubernetes is a link that changes
    except OSError:
        return 0
