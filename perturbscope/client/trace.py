"""The trace of the caller is passed on to the server, so that one trace shows both sides."""

from __future__ import annotations

import sys


def trace_headers() -> dict[str, str]:
    """``traceparent`` and ``tracestate`` (W3C Trace Context) of the current span, as headers or metadata.

    They are empty unless the program has loaded OpenTelemetry and is in a span; it is not imported for this.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return {}
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    headers = {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"}
    state = context.trace_state.to_header()
    return {**headers, "tracestate": state} if state else headers
