"""Ports for servers of tests."""

from __future__ import annotations

import random
import socket
from contextlib import closing
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000


def free_ports(n: int) -> list[int]:
    """Return different ports of 127.0.0.1 on which nothing listens.

    They lie below those that the kernel hands out by itself: whatever connects, or asks for any port, between this call
    and the start of the server that gets the port cannot take it.
    """
    above = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    draws = random.SystemRandom()
    found: list[int] = []
    while len(found) < n:
        port = draws.randrange(_LOWEST, above) if above > _LOWEST + 1_000 else 0
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            port = int(probe.getsockname()[1])
            if port not in found:
                found.append(port)
    return found
