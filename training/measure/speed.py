"""Speed of a configuration's training on this machine, and its share of the machine's ceiling.

The ceiling is the rate of a large matrix product in the same type. The share tells how well the training uses the
hardware, whatever else the machine is doing: on a CPU both rates are taken per second of processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families import load_family
from perturbscope.families.tokens import pad
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.loop.engine import DTYPES, PlainEngine
from training.loop.process import join, leave
from training.measure.cost import Speed
from training.measure.flops import model_of, stage_cost
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
        module, batch = _stage(config, length)
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
    cells = len(batch["attention_mask"])
    half, _, _ = model_of(config)
    masked_share = half.n_targets(batch) / int(batch["attention_mask"].sum()) if "similar" not in batch else None
    cost = stage_cost(config, length, masked_share=masked_share)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    scaled = f", times {devices} devices (assumed to scale)" if devices > 1 else ""
    return Speed(
        cells_per_second=cells * steps / wall * devices,
        origin=f"measured: {steps} steps of {cells} cells x {length} tokens on {name}, {loop.precision}{scaled}; "
        f"{cells * steps * cost.training / busy / ceiling:.1%} of the matrix-product rate of {ceiling / 1e12:.3g} "
        "TFLOP/s",
    )


def _stage(config: PretrainConfig | ContrastiveConfig, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the module of the stage over a new model, and a batch of random cells for it."""
    half, network, vocabulary = model_of(config)
    options = {**config.corpus.family_config, "max_length": length}
    family = load_family(config.corpus.family, options, vocabulary)
    torch.manual_seed(config.loop.seed)
    model = half.build_model(network, vocabulary)
    n_cells = config.loop.micro_batch * (1 if isinstance(config, PretrainConfig) else 2)
    cells = family.tokenize(_random_cells(vocabulary, n_cells, length, seed=config.loop.seed))
    batch = {name: torch.from_numpy(array) for name, array in pad(cells, np.arange(n_cells), family.inputs).items()}
    if isinstance(config, PretrainConfig):
        generator = torch.Generator().manual_seed(config.loop.seed)
        batch = half.mask(batch, family=family, generator=generator, probability=config.mask_probability)
        return half.pretraining(model), batch
    batch["similar"] = torch.zeros(config.loop.micro_batch)
    return ContrastiveModule(half.encoder(model, network, family=family), config.loss), batch


def _random_cells(vocabulary: GeneVocabulary, n_cells: int, length: int, *, seed: int) -> CountMatrix:
    """Make counts of cells that each express `length` genes, or all of them."""
    rng = np.random.default_rng(seed)
    n_genes = len(vocabulary.gene_ids)
    counts = np.zeros((n_cells, n_genes), dtype=np.int32)
    for cell in counts:
        expressed = rng.choice(n_genes, min(length, n_genes), replace=False)
        cell[expressed] = rng.integers(1, 100, size=len(expressed))
    return CountMatrix.from_matrix(counts, vocabulary.gene_ids)


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
