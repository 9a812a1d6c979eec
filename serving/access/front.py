"""One request from its arrival to its answer, whatever it came over.

A transport begins a :class:`Call`, enters :meth:`Front.admitted` before it reads the body, and finishes the call with
the status that it sends. What every request must pass stands here once: who is it, is there room, how long may it take.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, Self

from perturbscope.errors import DeadlineExceededError, InvalidParameterError, OverloadedError, PermissionDeniedError
from serving.access.limits import FEWER, GROWTH, Admission, Held
from serving.access.rates import RateLimiter
from serving.telemetry import log, metrics, tracing

if TYPE_CHECKING:
    from perturbscope.inference.embedder import Embedder

Transport = Literal["http", "grpc"]
Right = Literal["infer", "admin", "metrics"]
REQUEST_ID, TIMEOUT = "x-request-id", "x-request-timeout"
"""Header, or metadata, with the caller's name for the request, and with the seconds that it will wait."""
SECONDS = r"(?:0\.(?:00[1-9]|0[1-9]|[1-9])[0-9]{0,6}|[1-9][0-9]{0,8}(?:\.[0-9]{1,9})?)"
"""Pattern of the seconds that a caller may say it will wait: a millisecond at least, in plain decimals."""
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes
    ----------
    name
        Of the API key, never the key; empty where the server asks for none.
    rights
        What the caller may do.
    requests_per_minute, cells_per_minute
        Its share; None: no limit.
    """

    name: str = ""
    rights: frozenset[Right] = frozenset({"infer"})
    requests_per_minute: int | None = None
    cells_per_minute: int | None = None


ANYONE = Caller()


class Doorkeeper(Protocol):
    """Knows the callers."""

    def caller(self, headers: Mapping[str, str], peer: str = "") -> Caller:
        """Who sent these headers, from the address `peer`. Raises UnauthenticatedError."""
        ...


class OpenDoor:
    """Lets everyone in."""

    def caller(self, headers: Mapping[str, str], peer: str = "") -> Caller:
        """Anyone."""
        return ANYONE


@dataclass(eq=False)
class Call:
    """What is known of one request.

    Attributes
    ----------
    route
        ``/v1/embed`` or ``perturbscope.v1.PerturbScope/Embed``.
    transport
        What it came over.
    headers
        Its headers or metadata, names in lower case. Never logged.
    peer
        The address that it came from.
    id
        The caller's own (``x-request-id``) if it is harmless, else a new one; sent back and logged.
    caller
        Who asks, once that is known.
    deadline
        When nobody waits for the answer any more, in the time of ``time.monotonic``; None: never.
    cells, tokens, n_bytes
        What was asked for, once that is known.
    model_id
        What answered, once that is known.
    method
        Of HTTP.
    message
        Of the error, where it quotes nothing that the caller sent.
    trace_id
        Of the trace that it belongs to, here or at the caller's; empty: of none.
    trace
        Its spans, if it is traced here.
    timings
        Seconds by stage.
    model
        What embedded its cells, once that is known: whatever is loaded later, the request has met no other.
    """

    route: str
    transport: Transport
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    peer: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    caller: Caller = ANYONE
    deadline: float | None = None
    cells: int = 0
    tokens: int = 0
    n_bytes: int = 0
    model_id: str = ""
    method: str = "POST"
    message: str = ""
    trace_id: str = ""
    trace: tracing.Trace | None = field(default=None, repr=False)
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    held: Held | None = field(default=None, repr=False)
    """What it holds of the memory for all requests; set where the call is let in."""
    growth: int = GROWTH
    """Times its vectors that its answer will take, encoded."""
    charge: Callable[[int], None] = field(default=lambda _: None, repr=False)
    """Takes cells from the caller's share; set where the call is let in."""
    model: Embedder | None = field(default=None, repr=False)

    @classmethod
    def begin(
        cls,
        route: str,
        transport: Transport,
        headers: Mapping[str, str],
        *,
        peer: str = "",
        method: str = "POST",
        remaining: float | None = None,
    ) -> Call:
        """A request that has just arrived; `remaining` seconds are known to gRPC. Never raises."""
        call = cls(route, transport, headers, peer, method=method)
        if remaining is not None:
            call.deadline = time.monotonic() + remaining
        given = headers.get(REQUEST_ID, "")
        if _ID.fullmatch(given) and "psk_" not in given:  # a key in the wrong place would go to the log
            call.id = given
        tracing.begin(call)
        return call

    def remaining(self) -> float | None:
        """Seconds that the caller still waits; None: without end."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def take(self, cells: int) -> None:
        """Count cells that are asked for, once their number is known and before they cost anything.

        Raises
        ------
        RateLimitedError, LimitExceededError
            They are more than the caller's share.
        """
        self.charge(cells)
        self.cells += cells

    def reserve(self, n_bytes: int, remedy: str = FEWER) -> None:
        """Hold memory that the call will need. Raises as :meth:`serving.access.limits.Held.reserve`."""
        if self.held is not None:
            self.held.reserve(n_bytes, remedy)

    def stage(self, name: str, turn: tracing.Turn | None = None) -> Stage:
        """A context in which what runs is timed as the stage `name`; stages of one name add up.

        Parameters
        ----------
        name
            Of the stage.
        turn
            Has its spans, where they are more than one for the whole.
        """
        return Stage(self, name, turn)

    def spent(self, parts: Sequence[tracing.Part], turn: tracing.Turn | None = None, *, failed: bool = False) -> None:
        """Note stages that followed each other, and whether the last of them failed."""
        for name, started, ended in parts:
            self.timings[name] = self.timings.get(name, 0.0) + ended - started
        if self.trace is not None:
            (turn or self.trace).parts(parts, failed=failed)

    def finish(self, status: str | int, code: str = "ok") -> None:
        """The request is answered with `status`; `code` is that of its error. Counted, traced and logged."""
        metrics.finished(self, status, code)
        tracing.finished(self, status, code)
        log.write(self, status, code)


class Stage:
    """A part of a request that is timed; see :meth:`Call.stage`.

    Parameters
    ----------
    call
        The request.
    name
        Of the part.
    turn
        Has its spans.
    """

    __slots__ = ("_call", "_name", "_next", "_started", "_turn")

    def __init__(self, call: Call, name: str, turn: tracing.Turn | None = None) -> None:
        self._call, self._name, self._turn = call, name, turn
        self._next: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def ended_with(self, name: str, seconds: float) -> None:
        """The last `seconds`, up to now, were another stage."""
        self._next = name, max(seconds, 0.0)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        ended, failed = time.perf_counter(), kind is not None
        name, seconds = self._next or (self._name, 0.0)
        middle = max(ended - seconds, self._started)
        parts = [tracing.Part(self._name, self._started, middle)]
        if self._next is not None:
            parts.append(tracing.Part(name, middle, ended))
        self._call.spent(parts, self._turn, failed=failed)


class Front:
    """What every request passes before it costs anything.

    Parameters
    ----------
    admission
        Counts requests and bytes in progress.
    doorkeeper
        Knows the callers.
    rates
        Counts what each caller asks for.
    """

    def __init__(
        self, admission: Admission, doorkeeper: Doorkeeper | None = None, rates: RateLimiter | None = None
    ) -> None:
        self._admission = admission
        self.doorkeeper: Doorkeeper = doorkeeper or OpenDoor()
        self._rates = rates or RateLimiter()
        self._open: set[asyncio.Timeout] = set()
        self._stopped = False

    @contextlib.asynccontextmanager
    async def admitted(self, call: Call, right: Right = "infer") -> AsyncIterator[Held]:
        """Let a request in; entered before its body is read. What runs inside is cancelled at the caller's deadline.

        Yields
        ------
        To be told of the bytes of the body as they arrive, and of what of it is done with.

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
        self._rates.take(call.caller, requests=1)
        call.charge = functools.partial(self._rates.take, call.caller)
        try:
            with self._admission.admit(call.caller.name) as hold:
                call.held = hold
                timeout = asyncio.timeout(call.remaining())
                try:
                    async with timeout:
                        self._open.add(timeout)
                        yield hold
                finally:
                    self._open.discard(timeout)
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

    def stop(self) -> None:
        """End what is still in progress, at shutdown; its callers are told that the server stops."""
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
