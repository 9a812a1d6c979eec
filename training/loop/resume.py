"""States from which an interrupted run goes on exactly where it stopped.

A state is written under a temporary name and renamed, so a kill at any moment leaves the state before it. Order, masks
and dropout are functions of (seed, position), so only the position is stored for them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perturbscope.errors import InvalidParameterError
from training.loop.engine import Engine
from training.loop.process import Process

_POSITION = "position.json"


@dataclass
class Position:
    """Progress of a run."""

    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Time spent, over all resumptions."""
    tokens: int = 0
    """Tokens trained on, over all processes."""
    best: float | None = None
    """Lowest validation loss so far."""
    best_step: int = 0
    """Step of the lowest validation loss."""
    initial: dict[str, float] = field(default_factory=dict)
    """Measures before the first step."""
    validation: list[dict[str, float]] = field(default_factory=list)
    """Measures of every validation, with its step."""


class States:
    """The states of one run.

    Parameters
    ----------
    directory
        Directory of the states.
    fingerprint
        Digest of configuration and data; a state of another run is refused.
    process
        This process.
    keep
        Number of states to keep.
    """

    def __init__(self, directory: Path, *, fingerprint: str, process: Process, keep: int) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._process = process
        self._keep = keep

    def save(self, engine: Engine, position: Position) -> None:
        """Write a state; every process must call it."""
        name = f"step-{position.step:09d}"
        staging = self._directory / f".{name}"
        if self._process.is_first:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self._process.barrier()
        engine.save(staging)
        self._process.barrier()
        if self._process.is_first:
            facts = {"fingerprint": self._fingerprint, "world_size": self._process.world_size}
            (staging / _POSITION).write_text(json.dumps({**facts, "position": vars(position)}), encoding="utf-8")
            shutil.rmtree(self._directory / name, ignore_errors=True)
            staging.rename(self._directory / name)
            self.prune(self._keep)
        self._process.barrier()

    def resume(self, engine: Engine) -> Position:
        """Load the newest state into the engine. Returns its position; a new one if there is no state.

        Raises
        ------
        InvalidParameterError
            The state belongs to another configuration or number of processes.
        """
        complete = self._complete()
        if not complete:
            return Position()
        newest = complete[-1]
        facts: dict[str, Any] = json.loads((newest / _POSITION).read_text(encoding="utf-8"))
        if facts["fingerprint"] != self._fingerprint:
            raise InvalidParameterError(
                f"{newest} is the state of a run with another configuration or other data. Resume with that one, "
                "start anew with --overwrite, or give another output.",
                field="output",
            )
        if facts["world_size"] != self._process.world_size:
            raise InvalidParameterError(
                f"{newest} was written by {facts['world_size']} processes, and this run has "
                f"{self._process.world_size}. Resume with as many, or start anew with --overwrite.",
                field="output",
            )
        engine.load(newest)
        return Position(**facts["position"])

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` states, and the remains of interrupted writes."""
        for old in self._complete()[:-keep]:
            shutil.rmtree(old)
        for left in self._directory.glob(".step-*"):
            shutil.rmtree(left)

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self._directory.glob(f"step-*/{_POSITION}"))
