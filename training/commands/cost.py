"""``python -m training cost CONFIG``: estimate what a training run costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from perturbscope.errors import InvalidParameterError
from training import console
from training.config import strict
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.measure.cost import HARDWARE, Estimate, Speed, estimate, speed_of_log


def render(found: Estimate, title: str) -> Table:
    """Return a table of every number and its origin."""
    table = Table("quantity", "value", "origin", title=title)
    cost = found.cost
    table.add_row("forward pass", f"{cost.forward / 1e9:.1f} GFLOP a cell", "computed from model and lengths")
    parts = (("dense layers", cost.linear), ("attention", cost.attention), ("head on masked tokens", cost.head))
    for name, value in parts:
        if value:
            table.add_row(f"  {name}", f"{value / 1e9:.1f} GFLOP", "computed")
    table.add_row("training", f"{cost.training / 1e9:.1f} GFLOP a cell", "computed: three forward passes")
    table.add_row("cells through the model", f"{found.passes:,.0f}", f"computed; {found.origin}")
    table.add_row("operations", f"{cost.training * found.passes:.2e} FLOP", "computed")
    for speed in found.speeds:
        hours = found.hours(speed)
        table.add_section()
        table.add_row(f"{found.devices} device(s)", f"{speed.cells_per_second:,.1f} cells/s", speed.origin)
        table.add_row("time", f"{hours:,.1f} h ({hours / 24:.1f} days)", "computed from the line above")
        table.add_row("device hours", f"{hours * found.devices:,.0f}", "computed")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    parser = console.parser("Estimate what a training run costs in operations and device hours.")
    parser.add_argument("--hardware", choices=sorted(HARDWARE), help="published or assumed speed of one device")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--throughput", type=float, metavar="CELLS_PER_S", help="measured, over all devices")
    speed.add_argument("--log", type=Path, metavar="LOG.jsonl", help="take the speed from the log of a run")
    speed.add_argument("--measure", type=int, metavar="STEPS", help="time so many training steps on this machine")
    parser.add_argument("--cells", type=int, help="cells of the corpus; perturbed cells to train on, for fine-tuning")
    parser.add_argument("--length", type=int, help="tokens of every cell")
    options = parser.parse_args(arguments)

    def show() -> None:
        for name in ("gpus", "throughput", "measure", "cells", "length"):
            value = getattr(options, name)
            if value is not None and value <= 0:
                raise InvalidParameterError(f"--{name} is {value}; it must be above 0.", field=name)
        config = read_stage(options.config, options.set)
        measured = None
        if options.throughput:
            measured = Speed(cells_per_second=options.throughput, origin="measured: given with --throughput")
        elif options.log:
            measured = speed_of_log(options.log)
        elif options.measure:
            from training.measure.speed import measure  # imports torch

            measured = measure(config, steps=options.measure, length=options.length, devices=options.gpus)
        found = estimate(
            config,
            hardware=HARDWARE[options.hardware] if options.hardware else None,
            devices=options.gpus,
            cells=options.cells,
            length=options.length,
            measured=measured,
        )
        Console(width=None if sys.stdout.isatty() else 140).print(render(found, str(options.config)))

    return console.run(show)


def read_stage(path: str, overrides: Sequence[str] = ()) -> PretrainConfig | ContrastiveConfig:
    """Read the configuration of either stage. Raises as :func:`training.config.strict.read`."""
    if strict.has_key(path, "checkpoint", overrides):
        return strict.read(ContrastiveConfig, path, overrides)
    return strict.read(PretrainConfig, path, overrides)
