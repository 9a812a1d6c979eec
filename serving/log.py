"""One line a request, on stderr: what was asked, how large it was, how long each stage took. Never the data."""

from __future__ import annotations

import logging
import sys
import time
import uuid
from dataclasses import dataclass, field

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


@dataclass
class RequestLog:
    """What is known of one request."""

    route: str
    """``/v1/embed`` or ``perturbscope.v1/Embed``."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    cells: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def write(self, status: str | int, code: str = "ok") -> None:
        """The line; `code` is the error's, if there was one."""
        stages = "".join(f" {stage}={seconds:.4f}" for stage, seconds in self.timings.items())
        logger.info(
            "request=%s route=%s cells=%d status=%s code=%s total=%.4f%s",
            self.id,
            self.route,
            self.cells,
            status,
            code,
            time.perf_counter() - self.started,
            stages,
        )

    def bug(self) -> None:
        """The traceback of an unexpected exception; call it in an except block."""
        logger.exception("request=%s route=%s failed unexpectedly", self.id, self.route)
