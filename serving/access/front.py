"""The front door: one request from its arrival to its answer, over either transport.

A transport begins a :class:`Call`, enters :meth:`Front.admitted` before it reads the body, and finishes the call with
the status that it sends. Here stands once what every request must pass: who sent it, is there room, how long may it
take. Here, too, telemetry is told of its beginning and its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from perturbscope.errors import DeadlineExceededError, InvalidParameterError, OverloadedError, PermissionDeniedError
from serving.access.limits import Admission, Held
from serving.access.rates import RateLimiter, network_of
from serving.call import ANYONE, REQUEST_ID, SECONDS, TIMEOUT, Call, Caller, Right, Transport
from serving.telemetry import log, metrics, tracing
from serving.telemetry.brake import Brake
from serving.telemetry.metrics import OTHER

_BRAKED = frozenset({"unauthenticated", "permission_denied", "rate_limited", "overloaded"})
"""Codes of refusals that cost their sender next to nothing; so do paths that do not exist."""
_brake = Brake()
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class Doorkeeper(Protocol):
    """Tells callers apart."""

    def caller(self, headers: Mapping[str, str], peer: str = "") -> Caller:
        """Return the caller that sent these headers from the address `peer`. Raises UnauthenticatedError."""
        ...


class OpenDoor:
    """The doorkeeper of a server without keys."""

    def caller(self, headers: Mapping[str, str], peer: str = "") -> Caller:
        """Let everyone in, under no name."""
        return ANYONE


class Front:
    """The checks that every request passes before it costs anything.

    Parameters
    ----------
    admission
        Counts requests and bytes in progress.
    doorkeeper
        Tells callers apart; default: everyone may come in.
    rates
        Counts the requests and cells of each caller.
    """

    def __init__(
        self, admission: Admission, doorkeeper: Doorkeeper | None = None, rates: RateLimiter | None = None
    ) -> None:
        self._admission = admission
        self.doorkeeper: Doorkeeper = doorkeeper or OpenDoor()
        self._rates = rates or RateLimiter()
        self._open: set[asyncio.Timeout] = set()
        self._calls: dict[tuple[str, str], Call] = {}
        self._stopped = False

    @property
    def leaving(self) -> bool:
        """Whether the server is about to stop, so that clients should connect elsewhere."""
        return self._admission.closed or self._admission.leaving

    @staticmethod
    def begin(
        route: str,
        transport: Transport,
        headers: Mapping[str, str],
        *,
        peer: str = "",
        method: str = "POST",
        remaining: float | None = None,
    ) -> Call:
        """Return the call of a request that has just arrived, and open its trace. Never raises.

        Parameters
        ----------
        route, transport, headers, peer, method
            See :class:`Call`.
        remaining
            Seconds that the caller waits, if the transport (gRPC) says so.
        """
        call = Call(route, transport, headers, peer, method=method)
        if remaining is not None:
            call.deadline = time.monotonic() + remaining
        sent_id = headers.get(REQUEST_ID, "")
        if _ID.fullmatch(sent_id) and "psk_" not in sent_id:  # a key in the wrong place would go to the log
            call.id = sent_id
        if tracing.State.tracer is not None or "traceparent" in headers:
            tracing.begin(call)
        return call

    @staticmethod
    def finish(call: Call, status: str | int, code: str = "ok") -> None:
        """Count, trace and log a call that is answered with `status`; `code` is that of its error.

        Refusals are all counted; of one sender and code, only some a minute are logged, and the next line says how many
        were not.
        """
        metrics.finished(call, status, code)
        if call.trace is not None:
            tracing.finished(call, status, code)
        if code in _BRAKED or call.route == OTHER:
            left_out = _brake.left_out(code, call.caller.name or network_of(call.peer))
            if left_out is None:
                return
            call.not_logged = left_out
        log.write(call, status, code)

    @contextlib.asynccontextmanager
    async def admitted(self, call: Call, right: Right = "infer") -> AsyncIterator[Held]:
        """Let a request in; entered before its body is read. The body of the context ends at the caller's deadline.

        Yields
        ------
        The memory that the request holds, called with the number of bytes of its body as they arrive.

        Raises
        ------
        UnauthenticatedError, PermissionDeniedError
            The caller is not known, or may not do this.
        OverloadedError
            No room; or, as RateLimitedError, this caller has had its share.
        DeadlineExceededError
            The caller's time is over.
        InvalidParameterError
            The header ``x-request-timeout`` is no number of seconds.
        """
        call.caller = self.doorkeeper.caller(call.headers, call.peer)
        if right not in call.caller.rights:
            raise PermissionDeniedError(
                f"The API key {call.caller.name!r} does not have the right {right!r}."
                if call.caller.name
                else f"This needs an API key with the right {right!r}, and this server has no keys."
            )
        _read_timeout(call)
        if call.caller.requests_per_minute is not None or call.caller.cells_per_minute is not None:
            self._rates.take(call.caller, requests=1)
            call.charge = functools.partial(self._rates.take, call.caller)
        try:
            with self._admission.admit(call.caller.name) as hold:
                call.held = hold
                timeout = asyncio.timeout(call.remaining())
                try:
                    async with timeout:
                        self._open.add(timeout)
                        self._calls[call.caller.name, call.id] = call
                        yield hold
                finally:
                    self._open.discard(timeout)
                    if self._calls.get((call.caller.name, call.id)) is call:
                        del self._calls[call.caller.name, call.id]
                    call.n_bytes = hold.n_received
        except TimeoutError as error:
            if self._stopped:
                raise OverloadedError(
                    "The server is shutting down, and this request was not done in time. Send it to another server.",
                    retry_after=5.0,
                ) from error
            remaining = call.remaining()
            if remaining is None or remaining > 0:
                raise  # a bug inside, not the caller's clock
            raise DeadlineExceededError(
                "The time that the caller allowed is over. Allow more, or send fewer cells at a time."
            ) from error

    def call_of(self, caller: str, call_id: str) -> Call | None:
        """Return the request in progress that a caller gave this id; None if it has none. Ids are the callers' own."""
        return self._calls.get((caller, call_id))

    def stop(self) -> None:
        """End the requests in progress, at shutdown; their callers are told that the server stops."""
        self._stopped = True
        for timeout in self._open:
            timeout.reschedule(asyncio.get_running_loop().time())


def _read_timeout(call: Call) -> None:
    text = call.headers.get(TIMEOUT)
    if text is None:
        return
    if not re.fullmatch(SECONDS, text):
        raise InvalidParameterError(
            f"The header {TIMEOUT} is {text[:40]!r}; give seconds such as 30 or 0.5, from 0.001 on.", field=TIMEOUT
        )
    seconds = float(text)
    deadline = time.monotonic() + seconds
    call.deadline = deadline if call.deadline is None else min(call.deadline, deadline)
