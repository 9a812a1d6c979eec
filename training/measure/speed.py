"""Speed of a configuration's training on this machine, and its share of the machine's ceiling.

The ceiling is the rate of a large matrix product in the same type. The share tells how well the training uses the
hardware, whatever else the machine is doing: on a CPU both rates are taken per second of processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perturbscope.cells.vocabulary import GeneVocabulary
from training import families
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.data.corpus import read_vocabulary
from training.families.rank.pooling import PooledEncoder
from training.loop.engine import DTYPES, PlainEngine
from training.loop.process import join, leave
from training.measure.cost import Speed
from training.measure.flops import model_size, stage_cost
from training.objectives.losses import ContrastiveModule

_WARM_UP = 2


def measure(
    config: PretrainConfig | ContrastiveConfig, *, steps: int, length: int | None = None, devices: int = 1
) -> Speed:
    """Train a new model of the configuration's size on random cells of one length.

    Parameters
    ----------
    config
        Configuration of either stage; its precision, micro-batch, device and threads are used.
    steps
        Number of timed steps, which follow a short warm-up.
    length
        Tokens of each cell; the corpus' longest by default.
    devices
        Number of devices whose speed is wanted; one is measured, and they are assumed to scale.
    """
    loop = replace(config.loop, deepspeed=None, accumulation=1)
    length = min(length or config.corpus.max_length, config.corpus.max_length)
    process = join(loop)
    try:
        device = process.device
        vocabulary = read_vocabulary(config.corpus.vocabulary)
        module, batch = _stage(config, vocabulary, length)
        engine = PlainEngine(module, loop, config.optimizer, device)
        for _ in range(_WARM_UP):
            engine.micro_step(batch, lr=1e-5, last=True)

        def work() -> None:
            for _ in range(steps):
                engine.micro_step(batch, lr=1e-5, last=True)

        wall, busy = _timed(work, device)
        ceiling = _ceiling(device, DTYPES[loop.precision])
    finally:
        leave()
    cells = len(batch["input_ids"])
    masked_share = float((batch["labels"] >= 0).float().mean()) if "labels" in batch else None
    size = replace(model_size(config), vocabulary=len(vocabulary))
    cost = stage_cost(config, length, size=size, masked_share=masked_share)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    scaled = f", times {devices} devices (assumed to scale)" if devices > 1 else ""
    return Speed(
        cells_per_second=cells * steps / wall * devices,
        origin=f"measured: {steps} steps of {cells} cells x {length} tokens on {name}, {loop.precision}{scaled}; "
        f"{cells * steps * cost.training / busy / ceiling:.1%} of the matrix-product rate of {ceiling / 1e12:.3g} "
        "TFLOP/s",
    )


def _stage(
    config: PretrainConfig | ContrastiveConfig, vocabulary: GeneVocabulary, length: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the module of the stage, and a batch of random cells for it."""
    family = families.load(config.corpus.family)
    size = model_size(config)
    options: dict[str, Any] = {"max_length": max(length, config.corpus.max_length)}
    options |= {"layers": size.layers, "hidden": size.hidden, "feed_forward": size.feed_forward}
    if isinstance(config, PretrainConfig):
        options |= config.model
    generator = torch.Generator().manual_seed(config.loop.seed)
    torch.manual_seed(config.loop.seed)
    model = family.build_model(family.parse_config(options), vocabulary)
    genes = torch.tensor(vocabulary.tokens, dtype=torch.int64)
    shape = (config.loop.micro_batch * (1 if isinstance(config, PretrainConfig) else 2), length)
    ids = genes[torch.randint(len(genes), shape, generator=generator)]
    batch = {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}
    if isinstance(config, PretrainConfig):
        batch["input_ids"], batch["labels"] = family.mask_batch(
            **batch, vocabulary=vocabulary, generator=generator, probability=config.mask_probability
        )
        return family.masked_lm(model), batch
    batch["similar"] = torch.zeros(config.loop.micro_batch)
    encoder: Any = PooledEncoder(model)  # type: ignore[arg-type]
    return ContrastiveModule(encoder, config.loss), batch


def _timed(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return the seconds by the wall clock, and those that the device was busy (on a CPU, of one thread)."""
    _wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return wall, wall if device.type == "cuda" else processor / torch.get_num_threads()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of a large matrix product in FLOP/s, the best of three."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    repeats = 20 if device.type == "cuda" else 4

    def work() -> None:
        for _ in range(repeats):
            torch.matmul(a, b)

    work()
    return max(repeats * 2 * n**3 / _timed(work, device)[1] for _ in range(3))
