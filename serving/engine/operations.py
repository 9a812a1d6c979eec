"""The table of the server's operations, for both transports: which method answers, in which forms."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from perturbscope import protocol
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


@dataclass(frozen=True)
class Operation:
    """One kind of request.

    Attributes
    ----------
    name
        ``embed``: the last part of the HTTP path.
    call
        Answers a decoded request.
    decode, encode
        Functions by media type; the first of `encode` is the default.
    """

    name: str
    call: Callable[[Engine, Any, Call], Awaitable[Any]]
    decode: Mapping[str, Callable[[bytes], Any]]
    encode: Mapping[str, Callable[[Any], bytes]]

    @property
    def path(self) -> str:
        """HTTP path of the operation."""
        return f"/v1/{self.name}"


@dataclass(frozen=True)
class RpcOperation(Operation):
    """An operation that gRPC offers too.

    Attributes
    ----------
    from_proto, to_proto
        Decode its request message, and encode its answer.
    """

    from_proto: Callable[[Any], Any]
    to_proto: Callable[[Any], Any]


async def _score(engine: Engine, request: protocol.ScoreRequest, call: Call) -> protocol.ScoreAnswer:
    return await engine.scores.score(request, call)


async def _compare(engine: Engine, request: protocol.CompareRequest, call: Call) -> protocol.CompareAnswer:
    return await engine.scores.compare(request, call)


async def _report(engine: Engine, request: ReportRequest, call: Call) -> ReportAnswer:
    return await engine.scores.report(request, call)


async def _columns(engine: Engine, columns: Columns, call: Call) -> Columns:
    """Everything is known once the file is read."""
    call.cells = columns.n_cells
    return columns


def _decoders(kind: type[Any]) -> Mapping[str, Callable[[bytes], Any]]:
    return {
        protocol.JSON: partial(protocol.request_from_json, kind),
        protocol.ARROW: partial(protocol.request_from_arrow, kind),
    }


_ENCODERS: Mapping[str, Callable[[Any], bytes]] = {
    protocol.JSON: protocol.answer_to_json,
    protocol.ARROW: protocol.answer_to_arrow,
}


EMBED = RpcOperation(
    "embed",
    Engine.embed,
    _decoders(protocol.EmbedRequest),
    _ENCODERS,
    partial(protocol.request_from_proto, protocol.EmbedRequest),
    protocol.answer_to_proto,
)
SCORE = RpcOperation(
    "score",
    _score,
    _decoders(protocol.ScoreRequest),
    _ENCODERS,
    partial(protocol.request_from_proto, protocol.ScoreRequest),
    protocol.answer_to_proto,
)
COMPARE = RpcOperation(
    "compare",
    _compare,
    _decoders(protocol.CompareRequest),
    _ENCODERS,
    partial(protocol.request_from_proto, protocol.CompareRequest),
    protocol.answer_to_proto,
)
REPORT = Operation(
    "report",
    _report,
    {protocol.JSON: report_request_from_json, protocol.ARROW: report_request_from_arrow},
    {HTML: report_answer_to_html},
)
COLUMNS = Operation("columns", _columns, {}, {protocol.JSON: columns_to_json})
