"""Fine-tuning on mixed batches: the expression geometry is kept while perturbations are pushed apart."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perturbscope.errors import InvalidParameterError
from training.checkpoint import Checkpoint
from training.config.stages import ContrastiveConfig, MixedConfig, PanelConfig
from training.data.augment import check_hiding, hide_genes
from training.data.batches import padded, stacked
from training.data.shards import Corpus
from training.data.sources import expression_of, open_source
from training.data.splits import DataSplit
from training.loop.loop import Evaluate, derive_seed
from training.loop.process import Process
from training.objectives.geometry import fit_geometry
from training.objectives.groups import FinetuningTask
from training.objectives.mixed_sampler import UNLABELLED, MixedSampler, Pool
from training.objectives.mixed_terms import MixedModule

_BATCHES, _VALIDATION, _HEAD, _VIEW = 51, 52, 53, 54


class MixedTask(FinetuningTask):
    """The objective of mixed batches on perturbation data sets. See :class:`FinetuningTask`; needs ``config.mixed``."""

    def __init__(
        self,
        config: ContrastiveConfig,
        corpus: Corpus,
        splits: Sequence[DataSplit],
        checkpoint: Checkpoint,
        process: Process,
    ) -> None:
        if config.mixed is None:
            raise InvalidParameterError("Mixed batches need the section 'mixed'.", field="mixed")
        self._mixed: MixedConfig = config.mixed
        for key in ("weights", "expressions", "panels"):
            unknown = set(getattr(self._mixed, key)) - {split.name for split in splits}
            if unknown:
                names = ", ".join(split.name for split in splits)
                raise InvalidParameterError(
                    f"mixed.{key} names {min(unknown)!r}; the data sets are {names}.", field=f"mixed.{key}"
                )
        for name, panel in (("panel", self._mixed.panel), *self._mixed.panels.items()):
            where = "mixed.panel.share" if name == "panel" else f"mixed.panels.{name}.share"
            check_hiding(panel, corpus.family, field=where)
        super().__init__(config, corpus, splits, checkpoint, process)
        self._pools = make_pools(config, corpus, splits)
        batch = config.loop.micro_batch
        self._train = MixedSampler(
            [train for train, _ in self._pools],
            batch=batch,
            weights=self._mixed.weights,
            world_size=process.world_size,
            seed=derive_seed(config.loop.seed, _BATCHES),
        )
        n_classes = 1 + max(int(train.classes.max()) for train, _ in self._pools)
        torch.manual_seed(derive_seed(config.loop.seed, _HEAD))
        self.module: nn.Module = MixedModule(self._encoder, self._mixed, width=self._width, n_classes=max(n_classes, 1))
        # The loop prepares the next batch in another thread: at the end of an epoch two epochs are asked for at once.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(self._train.batches, rank=process.rank))

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one process in an epoch."""
        return len(self._train)

    def batch(self, epoch: int, index: int, seed: int) -> dict[str, Tensor]:
        """Return cells of one data set; see :meth:`training.objectives.mixed_terms.MixedModule.forward`."""
        number, places = self._order(epoch)[index]
        return self._tensors(self._pools[number][0], places, seed)

    def kind(self, epoch: int, index: int) -> str:
        """Return the name of the batch's data set."""
        return self._pools[self._order(epoch)[index][0]][0].name

    def begin(self, evaluate: Evaluate) -> dict[str, float]:
        """Measure the validation before any training."""
        return self.validate(evaluate)

    def validate(self, evaluate: Evaluate) -> dict[str, float]:
        """Measure the mean loss over validation cells, in the same batches of whole cells each time, and the median z.

        The classes of validation cells are unknown to the model, so terms that need known classes are left out.
        """
        losses: dict[str, float] = {}
        for _, pool in self._pools:
            if pool is None:
                continue
            size = min(self._config.loop.micro_batch, len(pool.cells))
            order = np.random.default_rng(derive_seed(self._config.loop.seed, _VALIDATION)).permutation(len(pool.cells))
            batches = [order[at : at + size] for at in range(0, len(order) - size + 1, size)]
            batch_losses = [float(evaluate(self._tensors(pool, batch, None))) for batch in batches]
            losses[pool.name] = float(np.mean(batch_losses))
        if not losses:
            return {}
        measured = {f"validation_loss_{name}": value for name, value in losses.items()}
        measured["validation_loss"] = float(np.mean(list(losses.values())))
        return measured | self._validation_z(evaluate)

    def _tensors(self, pool: Pool, places: NDArray[np.int64], seed: int | None) -> dict[str, Tensor]:
        """Make a batch; without a seed, of whole cells of unknown classes."""
        batch = padded(self._corpus, pool.cells[places])
        views: list[int | None] = [seed]
        if self._mixed.info_nce:
            views.append(None if seed is None else derive_seed(seed, _VIEW))
        panel = self._mixed.panels.get(pool.name, self._mixed.panel)
        batch = stacked([self._view(batch, panel, view) for view in views], self._corpus.family.inputs)
        classes = pool.classes[places] if seed is not None else np.full(len(places), UNLABELLED)
        batch["classes"] = torch.from_numpy(classes.astype(np.int64))
        batch["contexts"] = torch.from_numpy(pool.contexts[places])
        batch["is_control"] = torch.from_numpy(pool.is_control[places])
        batch["geometry"] = torch.from_numpy(pool.geometry[places])
        return batch

    def _view(self, batch: Mapping[str, Tensor], panel: PanelConfig, seed: int | None) -> Mapping[str, Tensor]:
        if seed is None or not panel.share:
            return batch
        return hide_genes(batch, self._corpus.family, panel, seed=seed)


def make_pools(
    config: ContrastiveConfig, corpus: Corpus, splits: Sequence[DataSplit]
) -> list[tuple[Pool, Pool | None]]:
    """Return training and validation cells of each data set, with the geometry that the training cells define.

    The validation cells are None if a data set has fewer than two.
    """
    if config.mixed is None:
        raise InvalidParameterError("Mixed batches need the section 'mixed'.", field="mixed")
    of_source, rows = corpus.per_cell("source"), corpus.per_cell("row")
    pools: list[tuple[Pool, Pool | None]] = []
    n_classes = 0
    for number, (source, split) in enumerate(zip(config.corpus.sources, splits, strict=True)):
        inside = of_source == number
        labels = corpus.labels(source.perturbation_key).astype(str)
        contexts = np.zeros(len(labels), dtype=np.int64)
        if source.context_key is not None:
            names = corpus.labels(source.context_key).astype(str)
            contexts = np.unique(names, return_inverse=True)[1].astype(np.int64)
        is_control = inside & np.isin(labels, source.controls)
        labels[is_control] = source.controls[0]  # one class
        parts = {}
        for part in ("train", "validation"):
            in_part = inside & (
                np.isin(labels, split.targets[part]) | (is_control & np.isin(rows, split.controls[part]))
            )
            parts[part] = np.flatnonzero(inside if source.unlabelled and part == "train" else in_part)
        train = parts["train"]
        classes = np.full(len(labels), UNLABELLED, dtype=np.int64)
        if not source.unlabelled:
            named = np.char.add(np.char.add(labels[train], "\t"), contexts[train].astype(str))
            classes[train] = n_classes + np.unique(named, return_inverse=True)[1]
            n_classes = 1 + int(classes.max())
        coordinates: list[NDArray[np.float32]] = []
        with open_source(source) as opened:
            expression = expression_of(opened, rows[train])
            shape = config.mixed.expressions.get(split.name, config.mixed.expression)
            labelled = None if source.unlabelled else classes[train]
            geometry = fit_geometry(expression, labelled, shape, seed=config.loop.seed)
            coordinates.append(geometry.apply(expression))
            if len(parts["validation"]) > 1:
                coordinates.append(geometry.apply(expression_of(opened, rows[parts["validation"]])))
        pair = [
            Pool(split.name, cells, classes[cells], contexts[cells], is_control[cells], of_cells)
            for cells, of_cells in zip(parts.values(), coordinates, strict=False)
        ]
        pools.append((pair[0], pair[1] if len(pair) > 1 else None))
    return pools
