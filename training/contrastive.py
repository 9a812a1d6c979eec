"""Contrastive fine-tuning: perturbed cells apart from controls, controls together (Zhao et al. 2025).

``python -m training.contrastive CONFIG`` on one process;
``torchrun --nproc-per-node 4 -m training.contrastive CONFIG`` or
``deepspeed --num_gpus 4 --module training.contrastive CONFIG`` on several, with ``loop.deepspeed`` set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from perturbscope.cells.genes import GeneVocabulary
from perturbscope.errors import InvalidParameterError
from training import commands, strict
from training.batches import padded
from training.checkpoint import Checkpoint, load_checkpoint
from training.config import ContrastiveConfig, CorpusConfig
from training.corpus import build_corpus, name_of
from training.heldout import write_heldout
from training.loop import Evaluate, derive_seed
from training.losses import ContrastiveModule, squared_distances
from training.mixed import MixedTask
from training.pairs import PairBatch, PairSampler
from training.pooling import PooledEncoder
from training.process import Process
from training.runs import StageTask, run_stage
from training.screens import groups_of, median_z
from training.shards import Corpus
from training.splits import DataSplit, load_splits, make_splits, save_splits
from training.strict import plain

SPLITS = "splits.json"
HELDOUT = "heldout.h5ad"
_PAIRS, _VALIDATION = 21, 22
_LOGGED_BATCHES = 20
"""Batches whose distances are measured before training."""


class ContrastiveTask:
    """The contrastive objective on perturbation data sets. See :class:`training.loop.Task`.

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


def finetune(config: ContrastiveConfig, *, overwrite: bool = False) -> Path | None:
    """Run the stage; the checkpoint's path (None in other processes than the first).

    Beside the checkpoint it leaves ``splits.json``, ``metrics.json`` and, for each data set, the held-out cells:
    ``heldout.h5ad``, or ``heldout-<name>.h5ad`` where there are several.

    Raises
    ------
    PerturbScopeError
        As :func:`training.corpus.build_corpus`, :func:`training.splits.make_splits`, :func:`training.loop.train` and
        :func:`training.checkpoint.save_checkpoint`.
    """
    output = Path(config.output)
    checkpoint = load_checkpoint(config.checkpoint)
    cells = _completed(config, checkpoint)

    def prepare() -> None:
        with commands.cell_progress() as progress:
            corpus = build_corpus(cells, vocabulary=checkpoint.vocabulary, overwrite=overwrite, progress=progress)
        commands.show_corpus(corpus)
        output.mkdir(parents=True, exist_ok=True)
        fingerprint = _split_fingerprint(config, corpus)
        if load_splits(output / SPLITS, fingerprint=fingerprint) is None:
            with commands.cell_progress() as progress:
                splits = make_splits(corpus, cells.sources, config.degs, config.split, progress=progress)
            save_splits(output / SPLITS, splits, fingerprint=fingerprint)

    def make(process: Process) -> tuple[StageTask, Corpus, dict[str, Any]]:
        corpus = Corpus(cells.path)
        splits = load_splits(output / SPLITS, fingerprint=_split_fingerprint(config, corpus)) or []
        for split in splits:
            listed = (f"{part}: {', '.join(split.targets[part]) or 'none'}" for part in ("train", "validation", "test"))
            commands.console().print(f"{split.name}: {'; '.join(listed)}")
        objective = ContrastiveTask if config.mixed is None else MixedTask
        task: StageTask = objective(replace(config, corpus=cells), corpus, splits, checkpoint, process)
        return task, corpus, _facts(splits, checkpoint)

    path = run_stage(
        "margin contrastive loss on pairs of cells" if config.mixed is None else "mixed batches",
        config,
        prepare=prepare,
        make=make,
        overwrite=overwrite,
        select_best=config.select == "best",
    )
    if path is not None:
        corpus = Corpus(cells.path)
        splits = load_splits(output / SPLITS, fingerprint=_split_fingerprint(config, corpus)) or []
        alone = sum(not source.unlabelled for source in cells.sources) == 1
        for number, (source, split) in enumerate(zip(cells.sources, splits, strict=True)):
            if source.unlabelled:
                continue
            target = output / (HELDOUT if alone else f"heldout-{split.name}.h5ad")
            found = write_heldout(target, corpus, number, source, split, score_ineligible=config.split.score_ineligible)
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.items())
            commands.console().print(f"{target}: {kinds} cells")
    return path


def corpus_config(config: ContrastiveConfig) -> tuple[CorpusConfig, GeneVocabulary]:
    """The corpus of the stage, with the checkpoint's vocabulary. Raises as :func:`finetune`."""
    checkpoint = load_checkpoint(config.checkpoint)
    return _completed(config, checkpoint), checkpoint.vocabulary


def _completed(config: ContrastiveConfig, checkpoint: Checkpoint) -> CorpusConfig:
    """The corpus' configuration with what the checkpoint decides, and all labels that are needed.

    Raises
    ------
    InvalidParameterError
        Family or length do not suit the checkpoint, or two data sets have one name.
    """
    cells = config.corpus
    if cells.family != checkpoint.family:
        raise InvalidParameterError(
            f"The checkpoint is of the family {checkpoint.family}, the corpus of {cells.family}.", field="corpus.family"
        )
    longest = int(checkpoint.model_config["max_length"])
    if cells.max_length > longest:
        raise InvalidParameterError(
            f"corpus.max_length is {cells.max_length}, but the checkpoint's model takes {longest} tokens. Lower it.",
            field="corpus.max_length",
        )
    contexts = (source.context_key for source in cells.sources if source.context_key is not None)
    labels = dict.fromkeys((*cells.labels, *(source.perturbation_key for source in cells.sources), *contexts))
    named = tuple(replace(source, name=name_of(source)) for source in cells.sources)
    return replace(cells, labels=tuple(labels), sources=named)


def _split_fingerprint(config: ContrastiveConfig, corpus: Corpus) -> str:
    values = [plain(config.degs), plain(config.split), corpus.manifest["fingerprint"]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _facts(splits: Sequence[DataSplit], checkpoint: Checkpoint) -> dict[str, Any]:
    """What the provenance says beyond data and hyper-parameters."""
    return {
        "split": {
            split.name: {
                "targets": split.targets,
                "controls": {part: len(rows) for part, rows in split.controls.items()},
                "degs": split.degs,
            }
            for split in splits
        },
        "untrained": "the last block and the language-model head: the embedding is taken before them",
        "parent": {"path": str(checkpoint.path), **checkpoint.provenance},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = commands.parser("Fine-tune a pre-trained model on perturbation screens.").parse_args(arguments)

    def train() -> None:
        finetune(strict.read(ContrastiveConfig, options.config, options.set), overwrite=options.overwrite)

    return commands.run(train)


if __name__ == "__main__":
    raise SystemExit(main())
