"""Pre-training: restore masked genes of a cell from the others (Devlin et al. 2019; Theodoris et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perturbscope.errors import InvalidParameterError
from training import families
from training.config.stages import PretrainConfig
from training.data import copies
from training.data.augment import check_hiding, hide_genes
from training.data.batches import by_length, padded
from training.data.length_sampler import LengthGroupedSampler
from training.data.shards import Corpus
from training.loop.loop import Evaluate, derive_seed
from training.loop.process import Process

_WEIGHTS, _SPLIT, _VALIDATION = 11, 12, 13


class MaskedTask:
    """The masked-language objective on a corpus. See :class:`training.loop.loop.Task`.

    Parameters
    ----------
    config
        Configuration of the stage.
    corpus
        Tokenized cells.
    process
        This process.
    """

    name = "pre-training"

    def __init__(self, config: PretrainConfig, corpus: Corpus, process: Process) -> None:
        self._config = config
        self._corpus = corpus
        self._process = process
        self._family = families.load(corpus.manifest["family"])
        options = {"max_length": corpus.family.max_length, **config.model}
        self.model_config: Any = self._family.parse_config(options)
        if self.model_config.max_length < corpus.family.max_length:
            raise InvalidParameterError(
                f"The model takes {self.model_config.max_length} tokens, but the corpus has cells of up to "
                f"{corpus.family.max_length}. Raise model.max_length or lower corpus.max_length.",
                field="model.max_length",
            )
        self.family_config: dict[str, Any] = corpus.manifest["family_config"]
        torch.manual_seed(derive_seed(config.loop.seed, _WEIGHTS))
        self.model: nn.Module = self._family.build_model(self.model_config, corpus.vocabulary)
        self.module: nn.Module = self._family.pretraining(self.model)
        check_hiding(config.panel, corpus.family)
        self.train_cells, self.validation_cells = split_cells(len(corpus), config)
        self.validation_cells = _independent(corpus, self.train_cells, self.validation_cells)
        self._sampler = LengthGroupedSampler(
            corpus.lengths[self.train_cells],
            batch=config.loop.micro_batch,
            world_size=process.world_size,
            megabatch=config.sampler.megabatch,
            seed=config.loop.seed,
        )
        self._epoch = -1
        self._order: list[NDArray[np.int64]] = []

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one process in an epoch."""
        return len(self._sampler)

    def batch(self, epoch: int, index: int, seed: int) -> dict[str, Tensor]:
        """Return corrupted cells with their targets; see :meth:`training.families.TrainingFamily.mask`."""
        if epoch != self._epoch:
            self._order = self._sampler.batches(epoch, rank=self._process.rank)
            self._epoch = epoch
        return self._masked(self.train_cells[self._order[index]], seed, training=True)

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of masked genes of a batch, over which its loss is a mean."""
        return self._family.n_targets(batch)

    def kind(self, epoch: int, index: int) -> str:
        """Return "": there is one kind of batch."""
        return ""

    def begin(self, evaluate: Evaluate) -> dict[str, float]:
        """Return {}: nothing is measured before the first step."""
        return {}

    def validate(self, evaluate: Evaluate) -> dict[str, float]:
        """Measure the mean loss over the targets of held-out cells, with the same masks each time."""
        total, n_masked = 0.0, 0
        batches = by_length(self._corpus, self.validation_cells, self._config.loop.micro_batch)
        for number in range(self._process.rank, len(batches), self._process.world_size):
            batch = self._masked(batches[number], derive_seed(self._config.loop.seed, _VALIDATION, number))
            n = self._family.n_targets(batch)
            total += float(evaluate(batch)) * n
            n_masked += n
        loss_sum, count = self._process.mean([total, float(n_masked)])
        if not count:
            return {}
        loss = loss_sum / count
        further = {f"validation_{name}": value for name, value in self._family.measures(loss).items()}
        return {"validation_loss": loss, **further}

    def _masked(self, numbers: NDArray[np.int64], seed: int, *, training: bool = False) -> dict[str, Tensor]:
        family, config = self._corpus.family, self._config
        batch: Mapping[str, Tensor] = padded(self._corpus, numbers, multiple=config.sampler.pad_multiple)
        if training and config.panel.share:
            batch = hide_genes(batch, family, config.panel, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        return self._family.mask(batch, family=family, generator=generator, probability=config.mask_probability)


def _independent(corpus: Corpus, trained: NDArray[np.int64], held: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the held-out cells that equal no cell that is trained on.

    Raises
    ------
    InvalidParameterError
        So many are equal that cells were given twice.
    """
    if not len(held):
        return held
    shared = copies.in_both(corpus.digests, held, trained)
    if shared.sum() > copies.MAX_COPIES * len(held):
        names = [source["name"] for source in corpus.manifest["sources"]]
        first, second = copies.shared_sources(corpus.digests, corpus.per_cell("source"), held, trained, names)
        where = f"{first} holds cells twice" if first == second else f"{first} and {second} hold the same cells"
        raise InvalidParameterError(
            f"{int(shared.sum()):,} of {len(held):,} cells to validate on are cells of training too (equal tokens in "
            f"equal order): {where}. Leave the copies out.",
            field="corpus.sources",
        )
    return held[~shared]


def split_cells(n_cells: int, config: PretrainConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the cells to train on and the cells to validate on, both ascending.

    Raises
    ------
    InvalidParameterError
        The corpus has too few cells to hold any out.
    """
    n_validation = min(round(n_cells * config.validation_share), config.validation_cells)
    if n_validation >= n_cells:
        raise InvalidParameterError(f"The corpus has {n_cells} cells, too few to hold some out.", field="corpus")
    order = np.random.default_rng([config.loop.seed, _SPLIT]).permutation(n_cells)
    return np.sort(order[n_validation:]), np.sort(order[:n_validation])
