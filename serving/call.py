"""One request as data: who asks, what was asked, how long each part took. It imports nothing else of the server.

:class:`serving.access.front.Front` begins a call, admits it and finishes it; everything between may read and fill it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from perturbscope.inference.embedder import Embedder

Transport = Literal["http", "grpc"]
Right = Literal["infer", "admin", "metrics"]
REQUEST_ID, TIMEOUT = "x-request-id", "x-request-timeout"
"""Headers (gRPC: metadata) with the caller's name for the request, and with the seconds that it will wait."""
SECONDS = r"(?:0\.(?:00[1-9]|0[1-9]|[1-9])[0-9]{0,6}|[1-9][0-9]{0,8}(?:\.[0-9]{1,9})?)"
"""Pattern of the seconds that a caller may say it will wait: a millisecond at least, in plain decimals."""
GROWTH = 2
"""Memory for decoding a binary body, beside the body, as a multiple of it; also that of a binary answer, as a multiple
of its vectors."""
JSON_GROWTH = 8
"""Memory of an answer in JSON, as a multiple of its vectors."""


class Part(NamedTuple):
    """A part of a request's time, in readings of ``time.perf_counter``."""

    name: str
    started: float
    ended: float


class Spans(Protocol):
    """The trace of a request, or of some of its cells; see :mod:`serving.telemetry.tracing`."""

    def parts(self, parts: Sequence[Part], *, failed: bool) -> None:
        """Make spans of parts that followed each other, the last of which `failed` or not."""
        ...


class RequestSpans(Spans, Protocol):
    """The trace of a whole request."""

    def turn(self) -> Spans:
        """Return the trace of cells that go to the model together."""
        ...


class Memory(Protocol):
    """The memory that a request holds; see :class:`serving.access.limits.Held`."""

    n_bytes: int
    n_received: int

    def reserve(self, n_bytes: int, remedy: str | None = None) -> None:
        """Hold more bytes."""
        ...

    def release_reserved(self, n_bytes: int | None = None) -> None:
        """Give bytes back."""
        ...


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes
    ----------
    name
        Name of the API key, never the key; empty if the server asks for none.
    rights
        Kinds of requests that the caller may make.
    requests_per_minute, cells_per_minute
        The caller's share; None: no limit.
    """

    name: str = ""
    rights: frozenset[Right] = frozenset({"infer"})
    requests_per_minute: int | None = None
    cells_per_minute: int | None = None


ANYONE = Caller(rights=frozenset({"infer", "metrics"}))
"""The caller of a server without keys."""


@dataclass(eq=False)
class Call:
    """The facts about one request.

    Attributes
    ----------
    route
        ``/v1/embed`` or ``perturbscope.v1.PerturbScope/Embed``.
    transport
        ``http`` or ``grpc``.
    headers
        Headers or metadata of the request, names in lower case. Never logged.
    peer
        Address of the sender.
    id
        The caller's own id (``x-request-id``) if it is harmless, else a new one; sent back and logged.
    caller
        The sender, once it is known.
    deadline
        Time on ``time.monotonic`` after which nobody waits for the answer; None: never.
    cells, tokens, n_bytes
        Size of the request, once it is known.
    model_id
        The model that answered, once it is known.
    method
        HTTP method of the request.
    not_logged
        Refusals of the same kind that were not logged before this one.
    message
        Message of the error, if it quotes nothing that the caller sent.
    trace_id
        Trace that the request belongs to, here or at the caller's; empty if there is none.
    trace
        Spans of the request, if it is traced here.
    timings
        Seconds by stage.
    started
        Arrival, on ``time.perf_counter``.
    held
        Memory that the request holds; set when the call is admitted.
    growth
        Memory of the encoded answer, as a multiple of its vectors.
    charge
        Takes cells, and seconds of score work, from the caller's share; None if it has no share.
    model
        The model that embedded the cells, once it is known: the request stays with it, whatever is loaded later.
    at
        The stage that it is in, and the share of it that is done.
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
    not_logged: int = 0
    message: str = ""
    trace_id: str = ""
    trace: RequestSpans | None = field(default=None, repr=False)
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    held: Memory | None = field(default=None, repr=False)
    growth: int = GROWTH
    charge: Callable[..., None] | None = field(default=None, repr=False)
    model: Embedder | None = field(default=None, repr=False)
    at: tuple[str, float] = ("receive", 0.0)

    def remaining(self) -> float | None:
        """Seconds that the caller still waits; None: without end."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def take(self, cells: int) -> None:
        """Count cells, once their number is known and before they cost anything.

        Raises
        ------
        RateLimitedError, LimitExceededError
            They are more than the caller's share.
        """
        if self.charge is not None:
            self.charge(cells)
        self.cells += cells

    def take_work(self, seconds: float) -> None:
        """Count the estimated seconds of one core of a score, before it begins. Raises as :meth:`take`."""
        if self.charge is not None:
            self.charge(0, seconds)

    def reserve(self, n_bytes: int, remedy: str | None = None) -> None:
        """Hold memory that the call will need. Raises as :meth:`serving.access.limits.Held.reserve`."""
        if self.held is not None:
            self.held.reserve(n_bytes, remedy)

    def stage(self, name: str, turn: Spans | None = None) -> Stage:
        """Return a context that times its body as the stage `name`; stages of one name add up.

        Parameters
        ----------
        name
            Name of the stage.
        turn
            Trace of the cells that the stage is about; default: the trace of the whole request.
        """
        return Stage(self, name, turn)

    def spent(self, parts: Sequence[Part], turn: Spans | None = None, *, failed: bool = False) -> None:
        """Note stages that followed each other, and whether the last of them failed."""
        for name, started, ended in parts:
            self.timings[name] = self.timings.get(name, 0.0) + ended - started
        if self.trace is not None:
            (turn or self.trace).parts(parts, failed=failed)


class Stage:
    """A part of a request that is timed; see :meth:`Call.stage`."""

    __slots__ = ("_call", "_name", "_next", "_started", "_turn")

    def __init__(self, call: Call, name: str, turn: Spans | None = None) -> None:
        self._call, self._name, self._turn = call, name, turn
        self._next: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._call.at = self._name, 0.0
        return self

    def ended_with(self, name: str, seconds: float) -> None:
        """Count the last `seconds`, up to now, as another stage."""
        self._next = name, max(seconds, 0.0)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        ended, failed = time.perf_counter(), kind is not None
        name, seconds = self._next or (self._name, 0.0)
        middle = max(ended - seconds, self._started)
        parts = [Part(self._name, self._started, middle)]
        if self._next is not None:
            parts.append(Part(name, middle, ended))
        self._call.spent(parts, self._turn, failed=failed)
