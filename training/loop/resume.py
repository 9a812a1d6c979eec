"""States from which an interrupted run goes on exactly where it stopped.

A state is written under a temporary name and renamed, so a kill at any moment leaves the state before it. Order, masks
and dropout are functions of (seed, position), so only the position is stored for them. The sizes and digests of its
files are stored too: a state that was damaged later is passed over, and the one before it is taken.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perturbscope.errors import InvalidParameterError, UnreadableFileError
from perturbscope.inference.bundle import sha256
from training.errors import NonFiniteLossError, NotWrittenError
from training.loop.engine import Engine
from training.loop.journal import valid
from training.loop.process import Process

_POSITION = "position.json"
_SHOWN = 5
"""Most fields that are named where two configurations differ."""


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
    extended: list[dict[str, Any]] = field(default_factory=list)
    """Steps at which the run was made longer than its configuration had said, with what was changed."""


class States:
    """The states of one run.

    Parameters
    ----------
    directory
        Directory of the states.
    identity
        All that decides the losses, as plain values; a state of another run is refused.
    process
        This process.
    keep
        Number of states to keep.
    may_differ
        Fields of `identity`, with dots, in which a state may differ because the run is extended on purpose.
    """

    def __init__(
        self,
        directory: Path,
        *,
        identity: Mapping[str, Any],
        process: Process,
        keep: int,
        may_differ: frozenset[str] = frozenset(),
    ) -> None:
        self._directory = directory
        self._identity = json.loads(json.dumps(dict(identity), sort_keys=True, default=str))
        self._process = process
        self._keep = keep
        self._may_differ = may_differ

    def newest(self) -> str:
        """Return words for the newest state, for messages."""
        complete = self._complete()
        return f"its newest state is {complete[-1]}" if complete else "it had not saved a state yet"

    def save(self, engine: Engine, position: Position) -> None:
        """Write a state; every process must call it.

        Raises
        ------
        NonFiniteLossError
            A weight is NaN or infinite.
        NotWrittenError
            The disk is full, or takes no files.
        """
        if self._process.any(int(not engine.is_finite())):
            raise NonFiniteLossError(
                f"A weight is not a finite number after step {position.step}. The run stopped, and this state is not "
                f"kept; {self.newest()}. Lower optimizer.base_lr, or use fp32 or bf16."
            )
        name = f"step-{position.step:09d}"
        staging = self._directory / f".{name}"
        try:
            if self._process.is_first:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            self._process.barrier()
            engine.save(staging)
            self._process.barrier()
            if self._process.is_first:
                facts = {
                    "identity": self._identity,
                    "world_size": self._process.world_size,
                    "files": dict(_contents(staging)),
                    "position": vars(position),
                }
                (staging / _POSITION).write_text(json.dumps(valid(facts), allow_nan=False), encoding="utf-8")
                shutil.rmtree(self._directory / name, ignore_errors=True)
                staging.rename(self._directory / name)
                self.prune(self._keep)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(staging, ignore_errors=True)
            raise NotWrittenError(
                f"The state of step {position.step} could not be written to {self._directory}: {_first_line(error)}. "
                f"The run stopped; {self.newest()}. Make room there, or lower loop.keep_states, and run the same "
                "command again."
            ) from error
        self._process.barrier()

    def resume(self, engine: Engine, say: Callable[[str], None]) -> Position:
        """Load the newest undamaged state into the engine.

        Parameters
        ----------
        engine
            Engine of the run.
        say
            Called with a sentence for each state that is passed over.

        Returns
        -------
        Position of the state; a new one if there is no state.

        Raises
        ------
        InvalidParameterError
            The state belongs to another configuration or number of processes; the message names what differs.
        UnreadableFileError
            Every state is damaged.
        """
        complete = self._complete()
        if not complete:
            return Position()
        # One process looks at the files, and all take the state that it has found whole.
        place = self._process.any(self._newest_whole(complete, say) if self._process.is_first else 0)
        if not place:
            raise UnreadableFileError(
                f"All {len(complete)} states in {self._directory} are damaged. Start anew with --overwrite.",
                field="output",
            )
        found = complete[place - 1]
        facts: dict[str, Any] = json.loads((found / _POSITION).read_text(encoding="utf-8"))
        position = Position(**facts["position"])
        self._check_identity(found, facts.get("identity", {}), position)
        if facts["world_size"] != self._process.world_size:
            raise InvalidParameterError(
                f"{found} was written by {facts['world_size']} processes, and this run has "
                f"{self._process.world_size}. Resume with as many, or start anew with --overwrite.",
                field="output",
            )
        engine.load(found)
        return position

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` states, and the remains of interrupted writes."""
        for old in self._complete()[:-keep]:
            shutil.rmtree(old)
        for left in self._directory.glob(".step-*"):
            shutil.rmtree(left)

    def _newest_whole(self, complete: list[Path], say: Callable[[str], None]) -> int:
        """Return the place, counted from 1, of the newest state without damage; 0 if there is none."""
        for place in range(len(complete), 0, -1):
            damage = _damage(complete[place - 1])
            if damage is None:
                return place
            say(f"{complete[place - 1]} is damaged ({damage}); the state before it is taken.")
        return 0

    def _check_identity(self, found: Path, earlier: Mapping[str, Any], position: Position) -> None:
        before, now = dict(_flat(earlier)), dict(_flat(self._identity))
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        refused = [name for name in names if name not in self._may_differ]
        if refused:
            listed = "; ".join(
                f"{name} was {_short(before, name)}, is {_short(now, name)}" for name in refused[:_SHOWN]
            )
            more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
            raise InvalidParameterError(
                f"{found} is the state of a run with another configuration or other data: {listed}{more}. Resume with "
                "that one, start anew with --overwrite, or give another output. (--extend allows another loop.epochs "
                "and loop.max_steps.)",
                field="output",
            )
        if names:
            changed = {name: [before.get(name), now.get(name)] for name in names}
            position.extended.append({"step": position.step, "changed": changed})

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self._directory.glob(f"step-*/{_POSITION}"))


def _contents(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield size and digest of each file below a directory, by its path there."""
    for path in sorted(item for item in directory.rglob("*") if item.is_file()):
        yield path.relative_to(directory).as_posix(), {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _damage(state: Path) -> str | None:
    """Return what is wrong with a state; None if nothing is."""
    try:
        facts = json.loads((state / _POSITION).read_text(encoding="utf-8"))
        Position(**facts["position"])
        files: dict[str, dict[str, Any]] = facts["files"]
        for name, expected in files.items():
            path = state / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes of {expected['bytes']:,}"
            if sha256(path) != expected["sha256"]:
                return f"{name} was changed"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{_POSITION} cannot be read: {_first_line(error)}"
    return None


def _flat(values: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with their names joined by dots."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _flat(value, f"{above}.{name}" if above else str(name))
    else:
        yield above, values


def _short(values: Mapping[str, Any], name: str) -> str:
    text = json.dumps(values[name]) if name in values else "not set"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
