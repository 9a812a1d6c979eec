"""The memory of messages that are still arriving.

gRPC gives a message to its reader when it is whole, and says nothing until then. But the kernel counts what each
connection has received, so the bytes that came while a connection has readers, and that no reader was given, are held
as those of an HTTP body are: while they arrive, and with what decoding takes, for gRPC itself copies a message twice
before it is given away. Readers of a caller for which there is no room are told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from perturbscope.errors import OverloadedError
from serving.access.limits import Admission
from serving.call import GROWTH

TICK = 0.02
"""Seconds between two looks at the connections whose messages are not there yet."""
_IGNORED = 2**20
"""Bytes of a connection that are not held: the window of a stream, and what belongs to no message."""
_FRAMES, _HEAD = 128, 1024
"""What is around a message: a part of its bytes, and the headers of its call."""
_NOWHERE = (-1, 0)
_RECEIVED = 128
"""Where ``tcpi_bytes_received`` stands in the kernel's ``struct tcp_info``."""


class Inflow:
    """Reads messages, and holds memory for those that take their time.

    Parameters
    ----------
    admission
        Counts the bytes of all requests.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._connections: dict[str, _Connection] = {}
        self._sockets: dict[str, tuple[int, int]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, context: Any, flow: str, patience: float | None = None) -> Any:
        """Read the next message of a call of grpc.aio.

        Parameters
        ----------
        context
            The call's context.
        flow
            Name of the caller's key.
        patience
            Seconds within which it must be there; None: however long it takes.

        Raises
        ------
        OverloadedError
            There is no room for what has arrived of this caller's messages.
        TimeoutError
            It did not arrive in time.
        """
        peer = unquote(context.peer() or "")
        connection = self._connections.get(peer)
        if connection is None:
            connection = self._connections[peer] = _Connection(self._received(peer))
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        read = _Read(flow, task)
        connection.reads[read] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK, self._look)
        size, cancelled = 0, task.cancelling()
        try:
            async with asyncio.timeout(patience):
                message = await context.read()
            size = len(message) if isinstance(message, bytes) else 0
        except asyncio.CancelledError:
            if read.refusal and task.uncancel() <= cancelled:
                raise OverloadedError(read.refusal) from None
            raise
        finally:
            del connection.reads[read]
            connection.given += size + size // _FRAMES + _HEAD
            if not connection.reads:
                self._hold(connection, 0)
                del self._connections[peer]
            elif connection.held:
                self._hold(connection, max(0, connection.held - (1 + GROWTH) * size))
            if size > _IGNORED:
                self._look()  # gRPC held the event loop up while it copied the message, and others went on sending
        return message

    def _look(self) -> None:
        """Hold what has arrived since the last time, and see again later, while there are readers."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for peer, connection in self._connections.items():
            received = self._received(peer)
            if received is None or connection.begun is None:
                continue
            arrived = received - connection.begun - connection.given
            if arrived < 0:
                connection.begun, connection.given, arrived = received, 0, 0
            try:
                self._hold(connection, (1 + GROWTH) * max(0, arrived - _IGNORED))
            except OverloadedError as error:
                connection.refuse(error.message)
                # What they sent goes with them.
                self._hold(connection, 0)
                connection.begun, connection.given = received, 0
        if self._connections:
            self._timer = asyncio.get_running_loop().call_later(TICK, self._look)

    def _hold(self, connection: _Connection, n_bytes: int) -> None:
        more = n_bytes - connection.held
        if more > 0:
            flow = connection.flow if connection.held else connection.busiest()
            self._admission.hold(more, flow, mine=connection.held)
            connection.flow = flow
        elif more < 0:
            self._admission.release(-more, connection.flow)
        connection.held = n_bytes

    def _received(self, peer: str) -> int | None:
        """Bytes that a connection has received; None if the system does not say."""
        for again in (False, True):
            if again:
                self._sockets = {peer: _NOWHERE, **dict(_sockets())}
            found = self._sockets.get(peer)
            if found == _NOWHERE:
                break
            if found is not None:
                number, inode = found
                with contextlib.suppress(OSError):
                    if os.fstat(number).st_ino == inode:
                        return _bytes_received(number)
        return None


class _Read:
    """A reader that waits for its message."""

    def __init__(self, flow: str, task: asyncio.Task[Any]) -> None:
        self.flow, self.task = flow, task
        self.refusal = ""


class _Connection:
    """A connection that has readers."""

    def __init__(self, begun: int | None) -> None:
        self.reads: dict[_Read, None] = {}
        self.begun = begun
        """Bytes that it had received when the first of them came; None if the system does not say."""
        self.given = 0
        """Bytes of messages that readers were given since."""
        self.held = 0
        self.flow = ""
        """Flow of which bytes are held."""

    def busiest(self) -> str:
        """Return the flow that most readers belong to: behind a proxy, callers share a connection."""
        flows = [read.flow for read in self.reads]
        return max(set(flows), key=flows.count, default="")

    def refuse(self, refusal: str) -> None:
        """End the readers of the flow that sent too much."""
        flow = self.flow if self.held else self.busiest()
        for read in self.reads:
            if read.flow == flow and not read.refusal:
                read.refusal = refusal
                read.task.cancel()


def _sockets() -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the peer, as gRPC writes it, the number and the inode of each connected socket of this process."""
    with contextlib.suppress(OSError):  # a system without /proc
        for path in Path("/proc/self/fd").iterdir():
            number = int(path.name)
            with contextlib.suppress(OSError):
                found = os.fstat(number)
                if stat.S_ISSOCK(found.st_mode):
                    yield _peer(number), (number, found.st_ino)


def _peer(number: int) -> str:
    opened = socket.socket(fileno=number)
    try:
        address = opened.getpeername()
        if opened.family == socket.AF_INET6 and not address[0].startswith("::ffff:"):
            return f"ipv6:[{address[0]}]:{address[1]}"
        if opened.family in (socket.AF_INET, socket.AF_INET6):
            return f"ipv4:{address[0].removeprefix('::ffff:')}:{address[1]}"
        return ""
    finally:
        opened.detach()  # it is gRPC's


def _bytes_received(number: int) -> int | None:
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=number)
    try:
        info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED + 8)
    finally:
        opened.detach()
    return struct.unpack_from("=Q", info, _RECEIVED)[0] if len(info) >= _RECEIVED + 8 else None
