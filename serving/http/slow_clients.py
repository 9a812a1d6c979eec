"""Slow HTTP clients: connections without a request, and those whose answers are not read, are ended.

uvicorn ends a connection that is idle after an answer, but waits for ever for the first request, for the rest of a
head, and for a client that does not read its answer, which stays in memory until then. So a few thousand idle sockets
would use up the files of the process, and a few slow readers its memory. (Bodies have a time limit of their own,
``body_timeout``; streams watch their readers themselves.)
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

LEAST_RATE = 1024
"""Least bytes a second that a client must read of a finished answer."""
WINDOW = 30.0
"""Seconds over which that rate is measured."""
TICK = 1.0
"""Seconds between two checks of a connection."""


class GuardedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type,unused-ignore]
    """uvicorn's HTTP protocol, which ends connections of slow clients."""

    head_timeout = 30.0
    """Seconds within which the head of a request must have arrived, once the connection is free for it."""

    def connection_made(self, transport: Any) -> None:
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._guarded: Any = transport
        self._clock = asyncio.get_running_loop()
        self._free_since = self._window_since = self._clock.time()
        self._window_bytes = 0
        self._next_look = self._clock.call_later(TICK, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """End the connection if its client took too long; else check again later."""
        now, unread = self._clock.time(), self._guarded.get_write_buffer_size()
        cycle: Any = self.cycle
        working = cycle is not None and not cycle.response_complete
        if working or unread:
            self._free_since = now
        if working or not unread or not self._window_bytes:
            # While an answer is made, its buffer is filled again as it empties.
            self._window_since, self._window_bytes = now, 0 if working else unread
        elif now - self._window_since >= WINDOW:
            if self._window_bytes - unread < min(LEAST_RATE * WINDOW, self._window_bytes):
                self._guarded.abort()
                return
            self._window_since, self._window_bytes = now, unread
        if now - self._free_since > self.head_timeout:
            self._guarded.abort()
            return
        self._next_look = self._clock.call_later(TICK, self._look)


def install(*, head_timeout: float) -> None:
    """Let every uvicorn server of this process use :class:`GuardedProtocol`; called before it is configured."""
    GuardedProtocol.head_timeout = head_timeout
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{GuardedProtocol.__name__}"
