"""The common half of the objectives of fine-tuning: groups of cells, and the z of the validation targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.results import ScoreOptions
from training import families
from training.checkpoint import Checkpoint
from training.config.stages import ContrastiveConfig
from training.data.batches import by_length, padded
from training.data.shards import Corpus
from training.data.splits import DataSplit
from training.loop.loop import Evaluate
from training.loop.process import Process
from training.objectives.pair_sampler import Group

_SCORED_CELLS = 300
"""Most cells of a target, and most controls, that are embedded to measure the validation z."""


class FinetuningTask:
    """Base of the objectives on perturbation data sets. See :class:`training.loop.loop.Task`.

    Parameters
    ----------
    config
        Configuration of the stage.
    corpus
        Tokenized cells.
    splits
        Split of each data set of the corpus.
    checkpoint
        Pre-trained model.
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
        half = families.load(checkpoint.family)
        network = half.parse_config(checkpoint.model_config)
        self._width = half.outputs(network)[0].width
        self._encoder = half.encoder(self.model, network, family=corpus.family)
        self._validation_groups = groups_of(config, corpus, splits, "validation")

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of cells of a batch: losses are means over cells, or over pairs of two cells each."""
        return len(batch["attention_mask"])

    def _validation_z(self, evaluate: Evaluate) -> dict[str, float]:
        """Measure :func:`median_z` of the validation targets, if the configuration asks for it and there are any."""
        if not self._config.validation_z or not self._validation_groups:
            return {}
        loop = self._config.loop
        z = median_z(self._validation_groups, self._corpus, evaluate, micro_batch=loop.micro_batch, seed=loop.seed)
        return {"validation_median_z": z}


def groups_of(config: ContrastiveConfig, corpus: Corpus, splits: Sequence[DataSplit], part: str) -> list[Group]:
    """Return the perturbed cells of one part of the split, with the controls of that part, by data set and target."""
    groups = []
    of_source, rows = corpus.per_cell("source"), corpus.per_cell("row")
    for number, (source, split) in enumerate(zip(config.corpus.sources, splits, strict=True)):
        if source.unlabelled:
            continue
        labels = corpus.labels(source.perturbation_key)
        inside = of_source == number
        is_control = inside & np.isin(labels, source.controls) & np.isin(rows, split.controls[part])
        for target in split.targets[part]:
            cells = np.flatnonzero(inside & (labels == target))
            if len(cells) >= 2:
                groups.append(Group(f"{split.name}/{target}", cells, np.flatnonzero(is_control)))
    return groups


def median_z(groups: Sequence[Group], corpus: Corpus, evaluate: Evaluate, *, micro_batch: int, seed: int) -> float:
    """Return the median over targets of the z of their E-distance from the controls; NaN if no group can be scored."""
    scores: list[float] = []
    for data_set in dict.fromkeys(_data_set(group) for group in groups):
        members = [group for group in groups if _data_set(group) == data_set]
        controls = members[0].controls
        if len(controls) < 2:
            continue
        # A file often has one batch after the other; cells are drawn from all of it.
        rng = np.random.default_rng(seed)
        sampled = [
            np.sort(rng.choice(cells, min(len(cells), _SCORED_CELLS), replace=False))
            for cells in (controls, *[group.cells for group in members])
        ]
        # The name of a group holds the data set, so no target can have the name of the controls.
        labels = ["control", *[group.name for group in members]]
        vectors = embed(np.concatenate(sampled), corpus, evaluate, micro_batch=micro_batch)
        table = score_perturbations(
            vectors,
            np.repeat(labels, [len(cells) for cells in sampled]).tolist(),
            control="control",
            options=ScoreOptions(permutations=1, min_cells=2, seed=seed),
        ).table
        scores.extend(table["z"].tolist())
    return float(np.nanmedian(scores)) if np.isfinite(scores).any() else float("nan")


def embed(
    numbers: NDArray[np.integer[Any]], corpus: Corpus, evaluate: Evaluate, *, micro_batch: int
) -> NDArray[np.float32]:
    """Embed cells; float32 [n, H]."""
    vectors: dict[int, NDArray[np.float32]] = {}
    for cells in by_length(corpus, np.unique(numbers), 2 * micro_batch):
        embedded = evaluate(padded(corpus, cells)).float().cpu().numpy()
        vectors.update(zip(cells.tolist(), embedded, strict=True))
    return np.stack([vectors[number] for number in numbers.tolist()])


def _data_set(group: Group) -> str:
    return group.name.rpartition("/")[0]
