"""What the server can be asked, once for both transports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from perturbscope import protocol
from perturbscope.errors import InvalidInputError, LimitExceededError, PerturbScopeError, UnknownModelError
from perturbscope.tasks.trained_on import Seen
from serving.call import Call
from serving.engine.columns import Columns, columns_to_json
from serving.engine.engine import Engine
from serving.engine.reports import (
    HTML,
    ReportAnswer,
    ReportRequest,
    report_answer_to_html,
    report_request_from_arrow,
    report_request_from_json,
)
from serving.engine.status import internal
from serving.telemetry import log


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
        By media type; the first of `encode` is the default.
    """

    name: str
    call: Callable[[Engine, Any, Call], Awaitable[Any]]
    decode: Mapping[str, Callable[[bytes], Any]]
    encode: Mapping[str, Callable[[Any], bytes]]

    @property
    def path(self) -> str:
        """The HTTP path."""
        return f"/v1/{self.name}"


@dataclass(frozen=True)
class RpcRoute(Route):
    """One that gRPC answers too.

    Attributes
    ----------
    from_proto, to_proto
        Its messages, decoded and encoded.
    """

    from_proto: Callable[[Any], Any]
    to_proto: Callable[[Any], Any]


EMBED = RpcRoute(
    "embed",
    Engine.embed,
    {protocol.JSON: protocol.embed_request_from_json, protocol.ARROW: protocol.embed_request_from_arrow},
    {protocol.JSON: protocol.embed_answer_to_json, protocol.ARROW: protocol.embed_answer_to_arrow},
    protocol.embed_request_from_proto,
    protocol.embed_answer_to_proto,
)
SCORE = RpcRoute(
    "score",
    Engine.score,
    {protocol.JSON: protocol.score_request_from_json, protocol.ARROW: protocol.score_request_from_arrow},
    {protocol.JSON: protocol.score_answer_to_json, protocol.ARROW: protocol.score_answer_to_arrow},
    protocol.score_request_from_proto,
    protocol.score_answer_to_proto,
)
COMPARE = RpcRoute(
    "compare",
    Engine.compare,
    {protocol.JSON: protocol.compare_request_from_json, protocol.ARROW: protocol.compare_request_from_arrow},
    {protocol.JSON: protocol.compare_answer_to_json, protocol.ARROW: protocol.compare_answer_to_arrow},
    protocol.compare_request_from_proto,
    protocol.compare_answer_to_proto,
)
REPORT = Route(
    "report",
    Engine.report,
    {protocol.JSON: report_request_from_json, protocol.ARROW: report_request_from_arrow},
    {HTML: report_answer_to_html},
)
COLUMNS = Route("columns", Engine.columns, {}, {protocol.JSON: columns_to_json})


def add_warnings(answer: Any, warnings: list[str]) -> Any:
    """An answer with more warnings."""
    if not warnings:
        return answer
    if isinstance(answer, ReportAnswer):
        scores = answer.report.scores
        scores = replace(scores, warnings=scores.warnings + warnings)
        return replace(answer, report=replace(answer.report, scores=scores))
    return replace(answer, result=replace(answer.result, warnings=answer.result.warnings + warnings))


def add_seen(answer: Any, seen: Seen | None) -> Any:
    """An answer that says first that its model was trained on the cells."""
    if seen is None:
        return answer
    if isinstance(answer, ReportAnswer):
        return replace(answer, report=replace(answer.report, scores=seen.add_to(answer.report.scores)))
    return replace(answer, result=seen.add_to(answer.result))


def describe(call: Call, message: Any) -> None:
    """Note the size of a request, and take it from the caller's share.

    Raises
    ------
    RateLimitedError, LimitExceededError
        The request has more cells than the caller's share.
    """
    match message:
        case protocol.EmbedRequest():
            call.take(len(message.cells))
        case protocol.ScoreRequest() | protocol.CompareRequest():
            call.take(len(message.perturbations))
        case ReportRequest():
            call.take(len(message.score.perturbations))
        case Columns():
            call.cells = message.n_cells
        case _:
            pass


def explain(error: Exception, call: Call) -> PerturbScopeError:
    """What a caller is told of `error`; called in an except block.

    An error of the tree speaks for itself. Anything else is a bug of ours: its traceback goes to the log, and the
    caller gets the number under which it stands there.
    """
    if isinstance(error, PerturbScopeError):
        # Other messages quote what the caller sent, which is none of the log's business.
        if not isinstance(error, (InvalidInputError, LimitExceededError, UnknownModelError)):
            call.message = error.message
        return error
    log.bug(call)
    return internal(call.id)
