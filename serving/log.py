"""One line a request, on stderr: what was asked, how large it was, how long each stage took. Never the data."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.calls import Call

logger = logging.getLogger("perturbscope.serving")


def configure() -> None:
    """Send the server's log to stderr, and nowhere else; called once at start, not at import."""
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def write(call: Call, status: str | int, code: str = "ok") -> None:
    """The line of a finished request; `code` is the error's, if there was one."""
    stages = "".join(f" {stage}={seconds:.4f}" for stage, seconds in call.timings.items())
    logger.info(
        "request=%s route=%s caller=%s cells=%d status=%s code=%s total=%.4f%s",
        call.id,
        call.route,
        call.caller.name or "-",
        call.cells,
        status,
        code,
        time.perf_counter() - call.started,
        stages,
    )


def bug(call: Call) -> None:
    """The traceback of an unexpected exception; call it in an except block."""
    logger.exception("request=%s route=%s failed unexpectedly", call.id, call.route)
