"""The cost of a training run: operations, cells, hours.

It follows from the configuration and its corpus, or from a number of cells and their length if the corpus is not built.
The speed of the hardware is taken from the best source: a measurement; else the throughput that Zhao et al. 2025
report by their cells, days and GPUs, for the same stage and hardware; else a share of the hardware's peak, which is
an assumption. Each number has its origin. Money is left out: prices change, GPU hours do not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError, UnreadableFileError
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.data.shards import MANIFEST, Corpus
from training.loop.journal import read_log
from training.measure.flops import CellCost, stage_cost

_WEEK = 7 * 86_400
_WARM_UP = 3
"""Steps at the beginning of a log that are not counted."""
PASSES_PER_CELL = 4
"""Cells that fine-tuning computes for a perturbed cell in an epoch: a dissimilar and a similar pair."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of device.

    Attributes
    ----------
    name
        Name and type of the arithmetic.
    peak
        Rate of dense products in that type, FLOP/s, from the vendor's data sheet.
    published
        Cells per second of one device, by stage, as Zhao et al. 2025 report them.
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
"""Shares of the peak if nothing is measured: that of the published pre-training, and that of a well-fed model."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Cells per second of all devices together, and the origin of the number."""

    cells_per_second: float
    origin: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Cost of a run.

    Attributes
    ----------
    stage
        ``pretraining`` or ``fine-tuning``.
    cost
        Operations for one cell.
    passes
        Cells that go through the model: cells of the corpus, or four for each perturbed cell, times epochs.
    origin
        Origin of the numbers of cells and tokens.
    devices
        Number of devices.
    speeds
        Speeds that are known or assumed.
    """

    stage: str
    cost: CellCost
    passes: float
    origin: str
    devices: int
    speeds: tuple[Speed, ...]

    def hours(self, speed: Speed) -> float:
        """Return the hours by the wall clock at `speed`."""
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
    """Estimate the cost of a configuration.

    Parameters
    ----------
    config
        Configuration of either stage.
    hardware, devices
        Kind and number of devices; `hardware` is needed unless the speed is `measured`.
    cells, length
        Number of cells (for fine-tuning, of perturbed cells to train on) and tokens of each, in place of the corpus.
    measured
        Measured speed of all devices together.

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
    cost = stage_cost(config, lengths)
    stage, passes = "pretraining", float(cells * config.loop.epochs)
    if isinstance(config, ContrastiveConfig):
        stage, passes = "fine-tuning", passes * PASSES_PER_CELL
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


def _of_corpus(config: PretrainConfig | ContrastiveConfig) -> tuple[NDArray[np.integer], int]:
    """Return the lengths of the cells of a corpus, and the number of cells that are trained on."""
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
    """Return the median cells per second over the steps of a run, all processes together.

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
