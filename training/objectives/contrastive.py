"""Contrastive fine-tuning on pairs: perturbed cells apart from controls, controls together (Zhao et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from training.checkpoint import Checkpoint
from training.config.stages import ContrastiveConfig
from training.data.batches import padded
from training.data.shards import Corpus
from training.data.splits import DataSplit
from training.loop.loop import Evaluate, derive_seed
from training.loop.process import Process
from training.objectives.groups import FinetuningTask, groups_of
from training.objectives.losses import ContrastiveModule, squared_distances
from training.objectives.pair_sampler import PairBatch, PairSampler

_PAIRS, _VALIDATION = 21, 22
_LOGGED_BATCHES = 20
"""Batches of each kind whose distances are measured before training."""


class ContrastiveTask(FinetuningTask):
    """The contrastive objective on pairs of cells of perturbation data sets. See :class:`FinetuningTask`."""

    def __init__(
        self,
        config: ContrastiveConfig,
        corpus: Corpus,
        splits: Sequence[DataSplit],
        checkpoint: Checkpoint,
        process: Process,
    ) -> None:
        super().__init__(config, corpus, splits, checkpoint, process)
        self.module: nn.Module = ContrastiveModule(self._encoder, config.loss)
        self._train = PairSampler(
            groups_of(config, corpus, splits, "train"),
            batch=config.loop.micro_batch,
            world_size=process.world_size,
            redraw=config.pairs.redraw,
            seed=derive_seed(config.loop.seed, _PAIRS),
        )
        self._validation = (
            PairSampler(
                self._validation_groups,
                batch=config.loop.micro_batch,
                seed=derive_seed(config.loop.seed, _VALIDATION),
            )
            if self._validation_groups
            else None
        )
        self._epoch = -1
        self._order: list[PairBatch] = []

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one process in an epoch."""
        return len(self._train)

    def batch(self, epoch: int, index: int, seed: int) -> dict[str, Tensor]:
        """Return P pairs: the inputs of 2P cells, the first of each pair before the second of each; ``similar`` [P]."""
        if epoch != self._epoch:
            self._order = self._train.batches(epoch, rank=self._process.rank)
            self._epoch = epoch
        return self._tensors(self._order[index])

    def kind(self, epoch: int, index: int) -> str:
        """Return "similar" or "dissimilar": batches alternate, and an epoch has as many of one kind as of the other."""
        return "similar" if index % 2 else "dissimilar"

    def begin(self, evaluate: Evaluate) -> dict[str, float]:
        """Measure quantiles of the distances within pairs, and the validation, before any training.

        They show whether the margin suits the model: a margin far above the distances of dissimilar pairs pushes
        everything apart, and a margin far below pushes nothing.
        """
        found: dict[str, list[Tensor]] = {"similar": [], "dissimilar": []}
        norms = []
        for pairs in self._train.batches(0)[: 2 * _LOGGED_BATCHES]:
            batch = self._tensors(pairs)
            batch.pop("similar")
            first, second = evaluate(batch).float().chunk(2)
            squared = squared_distances(first, second, normalize=self._config.loss.normalize)
            found["similar" if pairs.similar else "dissimilar"].append(squared.sqrt())
            norms.append(first.norm(dim=-1))
        measured = {"embedding_norm_median": float(torch.cat(norms).median())}
        for kind, values in found.items():
            quantiles = torch.quantile(torch.cat(values), torch.tensor([0.05, 0.5, 0.95], device=values[0].device))
            for name, value in zip(("q05", "median", "q95"), quantiles.tolist(), strict=True):
                measured[f"distance_{kind}_{name}"] = value
        return {**measured, **self.validate(evaluate)}

    def validate(self, evaluate: Evaluate) -> dict[str, float]:
        """Measure the mean loss over validation pairs, the same each time, and the median z of the targets."""
        if self._validation is None:
            return {}
        sums = {"similar": 0.0, "dissimilar": 0.0}
        counts = {"similar": 0.0, "dissimilar": 0.0}
        for number, pairs in enumerate(self._validation.batches(0)):
            if number // 2 % self._process.world_size == self._process.rank:
                kind = "similar" if pairs.similar else "dissimilar"
                sums[kind] += float(evaluate(self._tensors(pairs))) * len(pairs.first)
                counts[kind] += len(pairs.first)
        totals = self._process.mean([*sums.values(), *counts.values()])
        measured = {
            "validation_loss": (totals[0] + totals[1]) / (totals[2] + totals[3]),
            "validation_loss_similar": totals[0] / totals[2],
            "validation_loss_dissimilar": totals[1] / totals[3],
        }
        return measured | self._validation_z(evaluate)

    def _tensors(self, pairs: PairBatch) -> dict[str, Tensor]:
        batch = padded(self._corpus, np.concatenate([pairs.first, pairs.second]))
        batch["similar"] = torch.full((len(pairs.first),), float(pairs.similar))
        return batch
