"""A run of three steps, each over the same 88 cells of mixed lengths, cut into micro-batches and processes as told.

``main([OUTPUT, MICRO_BATCH, ACCUMULATION, DEEPSPEED, POISON])``; an empty DEEPSPEED is plain torch. At step POISON
(from 0; none if negative) the loss is finite and its gradient is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families import load_family
from training.config.stages import LoopConfig, OptimizerConfig
from training.families.rank import family as rank
from training.families.rank.model import RankModelConfig
from training.loop.loop import Evaluate, train
from training.loop.process import Process, join, leave

CELLS = 88
GENES = 60
STEPS = 3
MODEL = RankModelConfig(
    layers=2, hidden=16, heads=2, feed_forward=24, max_length=40, dropout=0.0, attention_dropout=0.0, init_sd=0.3
)


class Steep(nn.Module):
    """A loss that gets an infinite slope in one step."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, poisoned: Tensor, **batch: Tensor) -> Tensor:
        loss: Tensor = self.loss(**batch)
        return loss + (next(self.parameters()).square().sum() * 0).sqrt() if bool(poisoned.any()) else loss


class PiecesTask:
    """Masked genes of cells that are the same in every step."""

    name = "pieces"

    def __init__(self, process: Process, micro_batch: int, poison: int) -> None:
        vocabulary = GeneVocabulary(
            gene_ids=tuple(f"ENSG{number:011d}" for number in range(GENES)),
            tokens=np.arange(2, GENES + 2, dtype=np.int32),
            medians=np.ones(GENES),
            special_tokens={"<pad>": 0, "<mask>": 1},
            source="made up for tests",
        )
        torch.manual_seed(0)
        model = rank.build_model(MODEL, vocabulary)
        self.model: nn.Module = model
        self.module: nn.Module = Steep(rank.pretraining(model))
        mask = (torch.arange(40)[None] < 1 + 37 * torch.arange(CELLS)[:, None] % 40).long()
        ids = (2 + torch.rand(CELLS, GENES).argsort(dim=1)[:, :40]) * mask
        family = load_family("rank", {"max_length": MODEL.max_length}, vocabulary)
        batch = {"input_ids": ids, "attention_mask": mask}
        self._whole = rank.mask(batch, family=family, generator=torch.Generator().manual_seed(1))
        self._process = process
        self._size = micro_batch
        self._poison = poison
        self.batches_per_epoch = CELLS // micro_batch // process.world_size

    def batch(self, epoch: int, index: int, seed: int) -> dict[str, Tensor]:
        start = (index * self._process.world_size + self._process.rank) * self._size
        cells = {name: tensor[start : start + self._size] for name, tensor in self._whole.items()}
        return {**cells, "poisoned": torch.full((self._size,), epoch == self._poison)}

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        return rank.n_targets(batch)

    def kind(self, epoch: int, index: int) -> str:
        return ""

    def begin(self, evaluate: Evaluate) -> dict[str, float]:
        return {}

    def validate(self, evaluate: Evaluate) -> dict[str, float]:
        return {}


def main(arguments: Sequence[str]) -> int:
    output, micro_batch, accumulation, deepspeed, poison = arguments
    loop = LoopConfig(
        epochs=STEPS,
        micro_batch=int(micro_batch),
        accumulation=int(accumulation),
        device="cpu",
        checkpoint_every=1,
        deepspeed=deepspeed or None,
        threads=1,
    )
    # With eps 1 a step is all but proportional to the gradient, so that weights show the gradient to its last digits.
    optimizer = OptimizerConfig(base_lr=0.1, schedule="constant", weight_decay=0.0, eps=1.0, clip=0.0)
    process = join(loop)
    try:
        task = PiecesTask(process, loop.micro_batch, int(poison))
        outcome = train(task, loop, optimizer, process, output=Path(output), identity={})
        if process.is_first:
            save_file({name: tensor.clone() for name, tensor in outcome.weights.items()}, Path(output) / "weights")
    finally:
        leave()
    return 0
