"""``python -m serving healthcheck``: exit 0 if the server of this machine is ready; for containers.

It asks over HTTP, or HTTPS if TLS is set. It does not check the server's certificate: the server is this machine. If
clients must show a certificate, it shows the server's own, which the clients' authority must then have signed; if that
is not so, use another probe (TCP, or gRPC's health service with a certificate of its own).
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

TIMEOUT = 4.0
"""Seconds; the image allows 5."""


def main(environ: Mapping[str, str] | None = None) -> int:
    """Ask once. Returns 0, or 1 and writes the reason to stderr."""
    variables = {name: value for name, value in (os.environ if environ is None else environ).items() if value}
    host = variables.get("PERTURBSCOPE_HOST", "127.0.0.1")
    try:
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        host = f"[{address}]" if address.version == 6 else str(address)
    except ValueError:
        pass  # a name
    certificate, context = variables.get("PERTURBSCOPE_TLS_CERTIFICATE"), None
    try:
        if certificate:
            context = ssl._create_unverified_context()  # noqa: S323  see above
            if variables.get("PERTURBSCOPE_TLS_CLIENT_CA"):
                context.load_cert_chain(certificate, variables.get("PERTURBSCOPE_TLS_KEY"))
        port = variables.get("PERTURBSCOPE_HTTP_PORT", "")
        port = port if port.isdigit() else "3000"  # or what Kubernetes sets, see serving.settings
        url = f"{'https' if certificate else 'http'}://{host}:{port}/readyz"
        # Without a proxy, whatever the environment says.
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
        with urllib.request.build_opener(*handlers).open(url, timeout=TIMEOUT):
            return 0
    except (OSError, ValueError) as error:
        sys.stderr.write(f"not ready: {error}\n")
        return 1
