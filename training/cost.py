"""What a training run costs: operations, cells, hours.

``python -m training.cost CONFIG`` computes it from the configuration and its corpus, or from ``--cells`` and
``--length`` where the corpus is not built yet. How fast the hardware is comes from the best that is known of it:

* ``--throughput``: cells per second that you measured, over all processes; ``--log runs/.../log.jsonl`` takes it from
  the log of a run, ``--measure`` from some steps of this configuration's training on this machine;
* else the throughput that Zhao et al. 2025 give by their cells, days and GPUs, where it is the same stage and hardware;
* else a share of the hardware's peak, which is an assumption.

Each number is printed with where it is from. No money: prices change, GPU hours do not.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from perturbscope.errors import InvalidParameterError, UnreadableFileError
from training import commands, strict
from training.config import ContrastiveConfig, PretrainConfig
from training.flops import CellCost, ModelSize, cell_cost
from training.journal import read_log
from training.shards import MANIFEST, Corpus

_WEEK = 7 * 86_400
_WARM_UP = 3
"""Steps of a log, and of a measurement, that are not counted."""
_SIZES = ("layers", "hidden", "feed_forward")
PASSES_PER_CELL = 4
"""Fine-tuning: a perturbed cell brings a dissimilar and a similar pair, of two cells each, to an epoch."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device.

    Attributes
    ----------
    name
        What it is called.
    peak
        Dense products per second in the type that training uses, FLOP/s, from the vendor's data sheet.
    published
        Cells per second of one device by stage, from what Zhao et al. 2025 report.
    """

    name: str
    peak: float
    published: Mapping[str, float]


HARDWARE = {
    # 33 million cells, 3 epochs, 7 days, 4 devices; and 1,541 targets of which 80 % are trained on, a median of 200
    # cells each, 4 passes a cell, 10 epochs, 7 days, one device.
    "a10g": Hardware(name="NVIDIA A10G, bf16", peak=70e12, published={"pretraining": 33e6 * 3 / (4 * _WEEK)}),
    "t4": Hardware(
        name="NVIDIA T4, fp16", peak=65e12, published={"fine-tuning": 0.8 * 1541 * 200 * PASSES_PER_CELL * 10 / _WEEK}
    ),
    "h100": Hardware(name="NVIDIA H100 SXM, bf16", peak=989e12, published={}),
}
ASSUMED_SHARES = (0.075, 0.25)
"""Shares of the peak where nothing is measured: what the published pre-training reached, and a well-fed model."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Cells per second of all devices, and where that is from."""

    cells_per_second: float
    origin: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run costs.

    Attributes
    ----------
    stage
        ``pretraining`` or ``fine-tuning``.
    cost
        Of one cell.
    passes
        Cells that go through the model: cells of the corpus, or four for each perturbed cell, times epochs.
    origin
        Where cells and lengths are from.
    devices
        How many.
    speeds
        One for each way to know it.
    """

    stage: str
    cost: CellCost
    passes: float
    origin: str
    devices: int
    speeds: tuple[Speed, ...]

    def hours(self, speed: Speed) -> float:
        """Wall-clock hours."""
        return self.passes / speed.cells_per_second / 3600


def estimate(
    config: PretrainConfig | ContrastiveConfig,
    *,
    hardware: Hardware | None = None,
    devices: int = 1,
    cells: int | None = None,
    length: int | None = None,
    measured: Speed | None = None,
) -> Estimate:
    """The cost of a configuration.

    Parameters
    ----------
    config
        Of either stage.
    hardware, devices
        What it runs on, and how many; needed unless the speed is `measured`.
    cells, length
        Cells of the corpus (perturbed cells to train on, for fine-tuning) and tokens of each, in place of the corpus'.
    measured
        The speed of all devices together.

    Raises
    ------
    InvalidParameterError
        There is no corpus and no `cells`; or neither hardware nor a measured speed.
    """
    lengths: NDArray[np.integer] | int
    if cells is not None:
        lengths = length or config.corpus.max_length
        of_length = f"of {length} tokens, given" if length else f"of {lengths} tokens: an upper bound"
        origin = f"cells given; every cell {of_length}"
    else:
        lengths, cells = _of_corpus(config)
        origin = f"corpus {config.corpus.path}"
        if length is not None:
            lengths = length
    size = model_size(config)
    if isinstance(config, PretrainConfig):
        cost = cell_cost(size, lengths, masked_share=config.mask_probability)
        stage, passes = "pretraining", float(cells * config.loop.epochs)
    else:
        cost = cell_cost(size, lengths, layers=size.layers - 1)
        stage, passes = "fine-tuning", float(cells * PASSES_PER_CELL * config.loop.epochs)
    return Estimate(
        stage=stage,
        cost=cost,
        passes=passes,
        origin=origin,
        devices=devices,
        speeds=_speeds(stage, cost, hardware, devices, measured),
    )


def _speeds(
    stage: str, cost: CellCost, hardware: Hardware | None, devices: int, measured: Speed | None
) -> tuple[Speed, ...]:
    if measured is not None:
        return (measured,)
    if hardware is None:
        raise InvalidParameterError(
            f"How fast is it? Give --throughput, --log, --measure, or --hardware, one of {', '.join(HARDWARE)}.",
            field="hardware",
        )
    if stage in hardware.published:
        rate = hardware.published[stage]
        return (
            Speed(
                cells_per_second=rate * devices,
                origin=f"published: {rate:.1f} cells/s a device, from Zhao et al. 2025: "
                f"{rate * cost.training / hardware.peak:.1%} of peak",
            ),
        )
    return tuple(
        Speed(
            cells_per_second=share * hardware.peak * devices / cost.training,
            origin=f"assumed: {share:.1%} of the peak of {hardware.peak / 1e12:,.0f} TFLOP/s a device",
        )
        for share in ASSUMED_SHARES
    )


def model_size(config: PretrainConfig | ContrastiveConfig) -> ModelSize:
    """Size of the model, from the configuration or from the checkpoint that it starts from."""
    if isinstance(config, PretrainConfig):
        return ModelSize(**{name: int(config.model[name]) for name in _SIZES if name in config.model})
    if not Path(config.checkpoint).exists():
        return ModelSize()
    from training.checkpoint import load_checkpoint  # imports torch

    saved = load_checkpoint(config.checkpoint).model_config
    return ModelSize(**{name: int(saved[name]) for name in _SIZES})


def _of_corpus(config: PretrainConfig | ContrastiveConfig) -> tuple[NDArray[np.integer], int]:
    """Lengths of the cells of a corpus, and how many are trained on."""
    if not (Path(config.corpus.path) / MANIFEST).is_file():
        raise InvalidParameterError(
            f"The corpus {config.corpus.path} is not built yet. Give --cells"
            + ("." if isinstance(config, PretrainConfig) else " (perturbed cells to train on)."),
            field="corpus.path",
        )
    corpus = Corpus(config.corpus.path)
    if isinstance(config, PretrainConfig):
        held_out = min(round(len(corpus) * config.validation_share), config.validation_cells)
        return corpus.lengths, len(corpus) - held_out
    try:
        stored = json.loads((Path(config.output) / "splits.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidParameterError(
            f"{config.output} has no splits.json yet, so the targets to train on are not known. Give --cells "
            "(perturbed cells to train on).",
            field="output",
        ) from error
    of_source, trained = corpus.per_cell("source"), np.zeros(len(corpus), dtype=bool)
    for number, (source, split) in enumerate(zip(config.corpus.sources, stored["data_sets"], strict=True)):
        labels = corpus.labels(source.perturbation_key).astype(str)
        trained |= (of_source == number) & np.isin(labels, split["targets"]["train"])
    return corpus.lengths[trained], int(trained.sum())


def speed_of_log(path: Path) -> Speed:
    """Median cells per second of the steps of a run, all processes together.

    Raises
    ------
    UnreadableFileError
        There is no log, or it has too few steps.
    """
    steps = [line for line in read_log(path) if "cells" in line and line.get("seconds", 0) > 0][_WARM_UP:]
    if not steps:
        raise UnreadableFileError(f"{path} has no more than {_WARM_UP} steps; let the run go on.", field="log")
    rate = statistics.median(line["cells"] / line["seconds"] for line in steps)
    return Speed(cells_per_second=rate, origin=f"measured: median of {len(steps):,} steps in {path}")


def render(found: Estimate, title: str) -> Table:
    """A table of every number and its origin."""
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
    """The command line."""
    parser = commands.parser("Estimate what a training run costs in operations and device hours.")
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
            from training.speed import measure  # imports torch

            result = measure(config, steps=options.measure, length=options.length)
            measured = Speed(
                cells_per_second=result.cells_per_second * options.gpus, origin=result.describe(options.gpus)
            )
        found = estimate(
            config,
            hardware=HARDWARE[options.hardware] if options.hardware else None,
            devices=options.gpus,
            cells=options.cells,
            length=options.length,
            measured=measured,
        )
        Console(width=None if sys.stdout.isatty() else 140).print(render(found, str(options.config)))

    return commands.run(show)


def read_stage(path: str, overrides: Sequence[str] = ()) -> PretrainConfig | ContrastiveConfig:
    """The configuration of either stage. Raises as :func:`training.strict.read`."""
    if strict.has_key(path, "checkpoint", overrides):
        return strict.read(ContrastiveConfig, path, overrides)
    return strict.read(PretrainConfig, path, overrides)


if __name__ == "__main__":
    raise SystemExit(main())
