"""What the server can be asked, once for both transports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from perturbscope import wire
from perturbscope.errors import PerturbScopeError
from serving.engine import Engine
from serving.log import RequestLog
from serving.status import internal


@dataclass(frozen=True)
class Route:
    """One kind of request.

    Attributes
    ----------
    name
        ``embed``: the last part of the HTTP path.
    call
        What answers it.
    decode, encode
        By media type.
    from_proto, to_proto
        The same for gRPC.
    """

    name: str
    call: Callable[[Engine, Any], Awaitable[Any]]
    decode: Mapping[str, Callable[[bytes], Any]]
    encode: Mapping[str, Callable[[Any], bytes]]
    from_proto: Callable[[Any], Any]
    to_proto: Callable[[Any], Any]

    @property
    def path(self) -> str:
        """The HTTP path."""
        return f"/v1/{self.name}"


EMBED = Route(
    "embed",
    Engine.embed,
    {wire.JSON: wire.embed_request_from_json, wire.ARROW: wire.embed_request_from_arrow},
    {wire.JSON: wire.embed_answer_to_json, wire.ARROW: wire.embed_answer_to_arrow},
    wire.embed_request_from_proto,
    wire.embed_answer_to_proto,
)
SCORE = Route(
    "score",
    Engine.score,
    {wire.JSON: wire.score_request_from_json, wire.ARROW: wire.score_request_from_arrow},
    {wire.JSON: wire.score_answer_to_json, wire.ARROW: wire.score_answer_to_arrow},
    wire.score_request_from_proto,
    wire.score_answer_to_proto,
)
COMPARE = Route(
    "compare",
    Engine.compare,
    {wire.JSON: wire.compare_request_from_json, wire.ARROW: wire.compare_request_from_arrow},
    {wire.JSON: wire.compare_answer_to_json, wire.ARROW: wire.compare_answer_to_arrow},
    wire.compare_request_from_proto,
    wire.compare_answer_to_proto,
)


def describe(log: RequestLog, message: wire.Request | wire.Answer) -> None:
    """Note the size of a request, or the timings of its answer."""
    match message:
        case wire.EmbedRequest():
            log.cells = len(message.cells)
        case wire.ScoreRequest() | wire.CompareRequest():
            log.cells = len(message.perturbations)
        case wire.EmbedAnswer():
            log.timings = message.timings
        case wire.ScoreAnswer() | wire.CompareAnswer():
            log.timings = message.meta.timings
        case _:
            pass


def explain(error: Exception, log: RequestLog) -> PerturbScopeError:
    """What a caller is told of `error`; called in an except block.

    An error of the tree speaks for itself. Anything else is a bug of ours: its traceback goes to the log, and the
    caller gets the number under which it stands there.
    """
    if isinstance(error, PerturbScopeError):
        return error
    log.bug()
    return internal(log.id)
