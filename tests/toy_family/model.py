"""The torch half of the toy family; see :class:`training.families.TrainingFamily`.

Shapes: B cells, L tokens, H hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import UnsupportedBundleError
from perturbscope.families import Family
from perturbscope.families.outputs import OutputSpec, cell_embedding, selected
from training.config.strict import configuration, parse, within
from training.families import Batch
from training.families.specs import Embedding, ExportSpec, ModelSize


@configuration
class ToyConfig:
    """Size of the network."""

    hidden: Annotated[int, within(1, 1000)] = 8
    """Width of a token."""
    n_bins: Annotated[int, within(1, 1000)] = 8
    """Bins of the tokenizer."""
    max_length: Annotated[int, within(1)] = 64
    """Most tokens of a cell."""
    classes: tuple[str, ...] = ("resting", "cycling", "dying")
    """Names of the classes."""


class ToyBody(nn.Module):
    """Tokens that see their own gene, bin and cell, and the mean of the cell."""

    def __init__(self, config: ToyConfig, n_tokens: int) -> None:
        super().__init__()
        self.genes = nn.Embedding(n_tokens, config.hidden)
        self.bins = nn.Embedding(config.n_bins + 1, config.hidden)
        self.depth = nn.Linear(1, config.hidden)
        self.mixing = nn.Linear(2 * config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden)

    def forward(self, genes: Tensor, bins: Tensor, depth: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of the tokens, [B, L, H], and their mean over the cell, [B, H]."""
        tokens_BLH = self.genes(genes) + self.bins(bins) + self.depth(depth[:, None])[:, None]
        mean_B1H = mean(torch.relu(tokens_BLH), attention_mask)[:, None]
        both = torch.cat([tokens_BLH, mean_B1H.expand_as(tokens_BLH)], dim=-1)
        states_BLH = self.norm(tokens_BLH + self.mixing(both))
        return states_BLH, mean(states_BLH, attention_mask)


class ToyModel(nn.Module):
    """The body, a head that gives a value a gene, and one that gives logits a cell."""

    def __init__(self, config: ToyConfig, n_tokens: int) -> None:
        super().__init__()
        self.body = ToyBody(config, n_tokens)
        self.value = nn.Linear(config.hidden, 1)
        self.classes = nn.Linear(config.hidden, len(config.classes))


class Restoring(nn.Module):
    """Mean squared error of the bins of masked genes."""

    def __init__(self, model: ToyModel) -> None:
        super().__init__()
        self.body, self.value = model.body, model.value

    def forward(self, targets: Tensor, **inputs: Tensor) -> Tensor:
        """Return the loss; `targets` is -1 where there is none, [B, L]."""
        states_BLH, _ = self.body(**inputs)
        at = targets >= 0
        error: Tensor = (self.value(states_BLH).squeeze(-1)[at].float() - targets[at]).square().sum()
        return error / max(int(at.sum()), 1)


class Embedder(nn.Module):
    """The cell embedding alone."""

    def __init__(self, body: ToyBody) -> None:
        super().__init__()
        self.body = body

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return float32 [B, H]."""
        pooled: Tensor = self.body(**inputs)[1].float()
        return pooled


class All(nn.Module):
    """Some outputs, in order."""

    def __init__(self, model: ToyModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._names = tuple(names)

    def forward(self, genes: Tensor, bins: Tensor, depth: Tensor, attention_mask: Tensor) -> Any:
        """Return a tuple, or the tensor if there is one output."""
        states_BLH, pooled_BH = self.model.body(genes, bins, depth, attention_mask)
        values = {"cell_embedding": pooled_BH}
        if "gene_value" in self._names:
            values["gene_value"] = self.model.value(states_BLH)
        if "cell_logits" in self._names:
            values["cell_logits"] = self.model.classes(pooled_BH)
        found = tuple(values[name] for name in self._names)
        return found if len(found) > 1 else found[0]


class OneByOne(nn.Module):
    """The outputs of each cell alone, without padding."""

    def __init__(self, model: ToyModel, names: Sequence[str]) -> None:
        super().__init__()
        self._all = All(model, names)

    def forward(self, genes: Tensor, bins: Tensor, depth: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return a tuple; values of padding are 0."""
        cells = []
        for cell, length in enumerate(attention_mask.sum(dim=1).tolist()):
            some = slice(cell, cell + 1)
            ones = torch.ones(1, length, dtype=torch.int64)
            found = self._all(genes[some, :length], bins[some, :length], depth[some], ones)
            found = found if isinstance(found, tuple) else (found,)
            missing = genes.shape[1] - length
            cells.append([nn.functional.pad(v, (0, 0, 0, missing)) if v.ndim == 3 else v for v in found])
        return tuple(torch.cat(values) for values in zip(*cells, strict=True))


def mean(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean of [B, L, H] over real tokens, [B, H]."""
    weights = attention_mask.to(values.dtype)[:, :, None]
    return (values * weights).sum(dim=1) / weights.sum(dim=1)


def parse_config(options: Mapping[str, Any]) -> ToyConfig:
    """See :class:`training.families.TrainingFamily`, here and below."""
    return parse(ToyConfig, options, where="model")


def build_model(config: ToyConfig, vocabulary: GeneVocabulary) -> ToyModel:
    """Make a new model."""
    return ToyModel(config, len(vocabulary))


def mask(batch: Batch, *, family: Family, generator: torch.Generator, probability: float = 0.15) -> dict[str, Tensor]:
    """Hide the bins of some genes."""
    (n_bins,) = (spec.n_values for spec in family.inputs if spec.name == "bins")
    assert n_bins is not None
    drawn_BL = torch.rand(batch["bins"].shape, generator=generator)
    selected_BL = (drawn_BL < probability) & batch["attention_mask"].bool()
    return {
        **batch,
        "bins": batch["bins"].masked_fill(selected_BL, n_bins),
        "targets": batch["bins"].masked_fill(~selected_BL, -1),
    }


def n_targets(batch: Batch) -> int:
    """Count the hidden bins."""
    return int((batch["targets"] >= 0).sum())


def measures(loss: float) -> dict[str, float]:
    """Return the root of the mean squared error."""
    return {"error": loss**0.5}


def pretraining(model: ToyModel) -> Restoring:
    """Return the loss."""
    return Restoring(model)


def encoder(model: ToyModel, config: ToyConfig, *, family: Family) -> Embedder:
    """Return the body."""
    return Embedder(model.body)


def restorer(model: ToyModel, *, family: Family) -> Any:
    """Refuse: the model restores bins, not genes."""
    raise UnsupportedBundleError("The toy family does not restore genes.", field="family")


def outputs(config: ToyConfig) -> tuple[OutputSpec, ...]:
    """Return one output of each kind."""
    return _specs(config)


def _specs(config: ToyConfig) -> tuple[OutputSpec, ...]:
    return (
        cell_embedding(config.hidden),
        OutputSpec(name="gene_value", per="token", width=1, meaning="value"),
        OutputSpec(name="cell_logits", per="cell", width=len(config.classes), meaning="logits", names=config.classes),
    )


def embedding(config: ToyConfig) -> Embedding:
    """Describe the embedding."""
    return Embedding(layer="the only layer", pooling="mean over genes", untrained="the heads")


def size(config: ToyConfig, vocabulary: GeneVocabulary) -> ModelSize:
    """Return the sizes, with the mixing as a feed-forward layer."""
    return ModelSize(layers=1, hidden=config.hidden, feed_forward=config.hidden, vocabulary=1, embedding_layers=1)


def export_spec(config: ToyConfig, *, family: Family, outputs: Sequence[str] | None = None) -> ExportSpec:
    """Return a graph without fusion."""
    every = _specs(config)
    specs = every if outputs is None else selected(every, outputs)
    names = [spec.name for spec in specs]

    def module(model: Any) -> nn.Module:
        return All(model, names)

    def reference(model: Any) -> nn.Module:
        return OneByOne(model, names)

    return ExportSpec(
        inputs=family.inputs,
        outputs=specs,
        task="cell_classification",
        embedding=embedding(config),
        module=module,
        reference=reference,
    )
