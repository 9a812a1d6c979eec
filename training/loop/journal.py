"""Reports of a run: a progress bar, ``log.jsonl`` with every step, and a picture of the losses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from perturbscope.cells.files import atomic
from training import console

_SMOOTHING = 0.95
_EVERY = 30.0
"""Seconds between two lines where no terminal shows a bar."""


class Journal:
    """The log of one run. Use :func:`open_journal`."""

    def __init__(self, file: Any, bars: Progress, task: TaskID, total: int) -> None:
        self._file = file
        self._bars = bars
        self._task = task
        self._total = total
        self._loss: float | None = None
        self._told: tuple[float, int] | None = None
        self._tokens = 0

    def step(self, values: dict[str, Any]) -> None:
        """Log one optimiser step."""
        self._write(values)
        loss = values["loss"]
        self._loss = loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        seconds = max(values["seconds"], 1e-9)
        speed = f"{values['tokens'] / seconds:,.0f} tokens/s {values['cells'] / seconds:,.1f} cells/s"
        self._bars.update(self._task, completed=values["step"], loss=f"{self._loss:.4f}", speed=speed)
        self._tell(values)

    def _tell(self, values: dict[str, Any]) -> None:
        """Print a line after half a minute where nobody sees the bar: in the log of a job."""
        if self._bars.console.is_terminal:
            return
        now, step = time.monotonic(), values["step"]
        self._tokens += values["tokens"]
        if self._told is None:
            self._told = now, step
            self._tokens = 0
            return
        since, first = self._told
        if now - since < _EVERY:
            return
        pace = (now - since) / (step - first)
        left = timedelta(seconds=round(pace * (self._total - step)))
        self.say(
            f"step {step:,} of {self._total:,}: loss {self._loss:.4f}, lr {values['lr']:.3g}, "
            f"{self._tokens / (now - since):,.0f} tokens/s, {left} left"
        )
        self._told, self._tokens = (now, step), 0

    def validation(self, values: dict[str, Any]) -> None:
        """Log one validation."""
        self._write(values)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != "step")
        self._bars.console.print(f"step {values['step']:,}: {shown}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bars.console.print(text)

    def _write(self, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(valid(values), allow_nan=False) + "\n")
            self._file.flush()


@contextmanager
def open_journal(path: Path, *, name: str, done: int, total: int, writes: bool) -> Iterator[Journal]:
    """Open the log at step `done`; lines of later steps, which an interrupted run left, are removed.

    Parameters
    ----------
    path
        JSONL file of the log.
    name
        Title of the bar.
    done, total
        Optimiser steps that are done, and all of them.
    writes
        Whether this process writes the log.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
    )  # fmt: skip
    file = None
    if writes:
        _cut(path, done)
        file = path.open("a", encoding="utf-8")
    try:
        with Progress(*columns, console=console.stderr()) as bars:
            task = bars.add_task(name, total=total, completed=done, loss="-", speed="")
            yield Journal(file, bars, task, total)
    finally:
        if file is not None:
            file.close()


def valid(values: Any) -> Any:
    """Return plain values with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(values, Mapping):
        return {name: valid(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [valid(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a log; the last one may be cut off by a kill."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def draw_curve(log: Path, picture: Path) -> bool:
    """Draw the losses of a log, if matplotlib is installed. Returns whether it is."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib.figure import Figure

    lines = read_log(log)
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimiser step", ylabel="loss")
    if steps:
        losses = np.array([line["loss"] for line in steps])
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot([line["step"] for line in steps], losses, alpha=0.25, linewidth=0.8, label="each step")
        axes.plot([line["step"] for line in steps][window - 1 :], smooth, label=f"mean of {window}")
    if checks:
        axes.plot(
            [line["step"] for line in checks], [line["validation_loss"] for line in checks], "o-", label="validation"
        )
    if steps or checks:
        axes.legend()
    figure.savefig(picture, dpi=120)
    return True


def _cut(path: Path, done: int) -> None:
    kept = [line for line in read_log(path) if line["step"] <= done]
    with atomic(path) as staging:
        staging.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
