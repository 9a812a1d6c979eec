"""Contrastive fine-tuning: perturbed cells apart from controls, controls together (Zhao et al. 2025).

``python -m training finetune CONFIG`` on one process;
``torchrun --nproc-per-node 4 -m training finetune CONFIG`` or
``deepspeed --num_gpus 4 --module training finetune CONFIG`` on several, with ``loop.deepspeed`` set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from training.checkpoint import Checkpoint
from training.config.stages import ContrastiveConfig
from training.data.batches import padded
from training.data.shards import Corpus
from training.data.splits import DataSplit
from training.families.rank.pooling import PooledEncoder
from training.loop.loop import Evaluate, derive_seed
from training.loop.process import Process
from training.objectives.groups import groups_of, median_z
from training.objectives.losses import ContrastiveModule, squared_distances
from training.objectives.pair_sampler import PairBatch, PairSampler

_PAIRS, _VALIDATION = 21, 22
_LOGGED_BATCHES = 20
"""Batches whose distances are measured before training."""


class ContrastiveTask:
    """The contrastive objective on perturbation data sets. See :class:`training.loop.loop.Task`.

    Parameters
    ----------
    config
        The stage's configuration.
    corpus
        The tokenized cells.
    splits
        Their split.
    checkpoint
        The pre-trained model.
    process
        This process.
    """

    name = "fine-tuning"

    def __init__(
        self,
        config: ContrastiveConfig,
        corpus: Corpus,
        splits: Sequence[DataSplit],
        checkpoint: Checkpoint,
        process: Process,
    ) -> None:
        self._config = config
        self._corpus = corpus
        self._process = process
        self.family_config: dict[str, Any] = checkpoint.family_config
        self.model_config: Any = checkpoint.model_config
        self.model: nn.Module = checkpoint.model().train()
        self.module: nn.Module = ContrastiveModule(PooledEncoder(cast("BertForMaskedLM", self.model)), config.loss)
        self._groups = {part: groups_of(config, corpus, splits, part) for part in ("train", "validation")}
        self._train = PairSampler(
            self._groups["train"],
            batch=config.loop.micro_batch,
            world_size=process.world_size,
            redraw=config.pairs.redraw,
            seed=derive_seed(config.loop.seed, _PAIRS),
        )
        self._validation = (
            PairSampler(
                self._groups["validation"],
                batch=config.loop.micro_batch,
                seed=derive_seed(config.loop.seed, _VALIDATION),
            )
            if self._groups["validation"]
            else None
        )
        self._epoch = -1
        self._order: list[PairBatch] = []

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one process in an epoch."""
        return len(self._train)

    def batch(self, epoch: int, index: int, seed: int) -> dict[str, Tensor]:
        """Pairs: inputs of 2P cells, first those of each pair and then its second, and ``similar`` [P]."""
        if epoch != self._epoch:
            self._order = self._train.batches(epoch, rank=self._process.rank)
            self._epoch = epoch
        return self._tensors(self._order[index])

    def kind(self, epoch: int, index: int) -> str:
        """Batches alternate, and an epoch has as many of one kind as of the other."""
        return "similar" if index % 2 else "dissimilar"

    def begin(self, evaluate: Evaluate) -> dict[str, float]:
        """Quantiles of the distances within pairs, and the validation, before any training.

        They tell whether the margin suits the model: a margin far above the distances of dissimilar pairs pushes
        everything apart, one far below pushes nothing.
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
        """Mean loss over pairs of the validation targets and controls, the same pairs each time; and the median z."""
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
        if self._config.validation_z:
            measured["validation_median_z"] = median_z(
                self._groups["validation"],
                self._corpus,
                evaluate,
                micro_batch=self._config.loop.micro_batch,
                seed=self._config.loop.seed,
            )
        return measured

    def _tensors(self, pairs: PairBatch) -> dict[str, Tensor]:
        batch = padded(self._corpus, np.concatenate([pairs.first, pairs.second]))
        batch["similar"] = torch.full((len(pairs.first),), float(pairs.similar))
        return batch
