"""How fast a configuration trains on this machine, and what share of its ceiling that is.

The ceiling is the rate of a large matrix product in the same type, so the share says how well the training uses the
hardware, whatever else the machine is doing: on a CPU both are taken per second of processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from perturbscope.cells.genes import GeneVocabulary
from training import families
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.data.corpus import read_vocabulary
from training.families.rank.pooling import PooledEncoder
from training.loop.engine import PlainEngine
from training.loop.process import join, leave
from training.measure.flops import ModelSize, cell_cost, model_size
from training.objectives.losses import ContrastiveModule

_WARM_UP = 2
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A short run.

    Attributes
    ----------
    cells_per_second
        Of one process, by the wall clock.
    share
        Of the ceiling.
    ceiling
        Rate of a matrix product, FLOP/s.
    steps, length, batch
        What was run: steps, tokens of each cell, cells of a step.
    device, precision
        On what, and in which type.
    """

    cells_per_second: float
    share: float
    ceiling: float
    steps: int
    length: int
    batch: int
    device: str
    precision: str

    def describe(self, devices: int = 1) -> str:
        """Where the number is from, in words."""
        many = f", times {devices} devices (assumed to scale)" if devices > 1 else ""
        return (
            f"measured: {self.steps} steps of {self.batch} cells x {self.length} tokens on {self.device}, "
            f"{self.precision}{many}; {self.share:.0%} of the matrix-product rate of {self.ceiling / 1e12:.3g} TFLOP/s"
        )


def measure(config: PretrainConfig | ContrastiveConfig, *, steps: int, length: int | None = None) -> Measured:
    """Train a new model of the configuration's size on random cells of one length.

    Parameters
    ----------
    config
        Of either stage; its precision, micro-batch, device and threads are used.
    steps
        Steps that are timed, after a short warm-up.
    length
        Tokens of each cell; the corpus' longest by default.
    """
    loop = replace(config.loop, deepspeed=None, accumulation=1)
    length = min(length or config.corpus.max_length, config.corpus.max_length)
    process = join(loop)
    try:
        device = process.device
        module, batch, size = _stage(config, length)
        engine = PlainEngine(module, loop, config.optimizer, device)
        for _ in range(_WARM_UP):
            engine.micro_step(batch, lr=1e-5, last=True)

        def work() -> None:
            for _ in range(steps):
                engine.micro_step(batch, lr=1e-5, last=True)

        wall, busy = _timed(work, device)
        ceiling = _ceiling(device, _TYPES[loop.precision])
    finally:
        leave()
    cells = len(batch["input_ids"])
    if isinstance(config, PretrainConfig):
        share_masked = float((batch["labels"] >= 0).sum()) / (cells * length)
        per_cell = cell_cost(size, length, masked_share=share_masked).training
    else:
        per_cell = cell_cost(size, length, layers=size.layers - 1).training
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return Measured(
        cells_per_second=cells * steps / wall,
        share=cells * steps * per_cell / busy / ceiling,
        ceiling=ceiling,
        steps=steps,
        length=length,
        batch=cells,
        device=name,
        precision=loop.precision,
    )


def _stage(config: PretrainConfig | ContrastiveConfig, length: int) -> tuple[nn.Module, dict[str, Tensor], ModelSize]:
    """The stage's module, and a batch of random cells for it."""
    family = families.load(config.corpus.family)
    vocabulary = read_vocabulary(config.corpus.vocabulary)
    size = model_size(config)
    options: dict[str, Any] = {"max_length": max(length, config.corpus.max_length)}
    options |= dict(config.model) if isinstance(config, PretrainConfig) else _options(size)
    generator = torch.Generator().manual_seed(config.loop.seed)
    torch.manual_seed(config.loop.seed)
    model = family.build_model(family.parse_config(options), vocabulary)
    size = replace(size, vocabulary=len(vocabulary))
    if isinstance(config, PretrainConfig):
        batch = _cells(config.loop.micro_batch, length, vocabulary, generator)
        batch["input_ids"], batch["labels"] = family.mask_batch(
            batch["input_ids"],
            batch["attention_mask"],
            vocabulary=vocabulary,
            generator=generator,
            probability=config.mask_probability,
        )
        return family.masked_lm(model), batch, size
    batch = _cells(2 * config.loop.micro_batch, length, vocabulary, generator)
    batch["similar"] = torch.zeros(config.loop.micro_batch)
    encoder: Any = PooledEncoder(model)  # type: ignore[arg-type]
    return ContrastiveModule(encoder, config.loss), batch, size


def _options(size: ModelSize) -> dict[str, Any]:
    return {"layers": size.layers, "hidden": size.hidden, "feed_forward": size.feed_forward}


def _cells(n_cells: int, length: int, vocabulary: GeneVocabulary, generator: torch.Generator) -> dict[str, Tensor]:
    genes = torch.tensor(vocabulary.tokens, dtype=torch.int64)
    drawn = torch.randint(len(genes), (n_cells, length), generator=generator)
    return {"input_ids": genes[drawn], "attention_mask": torch.ones(n_cells, length, dtype=torch.int64)}


def _timed(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds by the wall clock, and seconds that the device was busy: on a CPU, of one thread."""
    _wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return wall, wall if device.type == "cuda" else processor / torch.get_num_threads()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ceiling(device: torch.device, kind: torch.dtype) -> float:
    """Rate of a large matrix product, FLOP/s; the best of three."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(kind) for _ in range(2))
    repeats = 20 if device.type == "cuda" else 4

    def work() -> None:
        for _ in range(repeats):
            torch.matmul(a, b)

    work()
    return max(repeats * 2 * n**3 / _timed(work, device)[1] for _ in range(3))
