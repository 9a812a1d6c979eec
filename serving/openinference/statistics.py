"""Counters of requests over the protocol since the server started, in the protocol's form."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from perturbscope.protocol.messages import ModelInfo

STAGES = ("queue", "compute_infer")
"""The protocol's names of the stages."""


@dataclass
class _Duration:
    """A number of events and the time that they took."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds

    def told(self) -> dict[str, int]:
        return {"count": self.count, "ns": int(self.seconds * 1e9)}


@dataclass
class _Counted:
    """Counters of one version of a model."""

    last: int = 0
    cells: int = 0
    success: _Duration = field(default_factory=_Duration)
    fail: _Duration = field(default_factory=_Duration)
    queue: _Duration = field(default_factory=_Duration)
    compute_infer: _Duration = field(default_factory=_Duration)


class Statistics:
    """Counts the requests of every model; used on one event loop."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], _Counted] = {}

    def succeeded(self, info: ModelInfo, n_cells: int, seconds: float, timings: dict[str, float]) -> None:
        """Count a request that was answered after `seconds`; `timings` are those of the dispatcher."""
        counted = self._of(info)
        counted.last = int(time.time() * 1000)
        counted.cells += n_cells
        counted.success.add(seconds)
        counted.queue.add(timings.get("queue", 0.0))
        counted.compute_infer.add(timings.get("inference", 0.0))

    def failed(self, info: ModelInfo, seconds: float) -> None:
        """Count a request that was refused, or failed, after `seconds`."""
        self._of(info).fail.add(seconds)

    def told(self, infos: tuple[ModelInfo, ...]) -> dict[str, Any]:
        """Return ``{"model_stats": [...]}`` of these models."""
        return {"model_stats": [self._told(info) for info in infos]}

    def _of(self, info: ModelInfo) -> _Counted:
        return self._models.setdefault((info.name, info.version), _Counted())

    def _told(self, info: ModelInfo) -> dict[str, Any]:
        counted = self._models.get((info.name, info.version), _Counted())
        return {
            "name": info.name,
            "version": info.version,
            "last_inference": counted.last,
            "inference_count": counted.cells,
            "execution_count": counted.success.count,
            "inference_stats": {name: getattr(counted, name).told() for name in ("success", "fail", *STAGES)},
        }
