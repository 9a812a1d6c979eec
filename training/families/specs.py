"""What the torch half of a family says about its models: sizes, and how a model becomes a graph. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from perturbscope.families.outputs import OutputSpec
from perturbscope.families.tokens import InputSpec

if TYPE_CHECKING:
    from torch import nn

Task = Literal["embedding", "cell_classification", "gene_classification"]
"""What a model was trained for, as a manifest has it."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Sizes of a transformer that decide the cost of a cell; the defaults are those of the rank model."""

    layers: int = 6
    hidden: int = 256
    feed_forward: int = 512
    vocabulary: int = 25_426
    embedding_layers: int | None = None
    """Blocks that an embedding needs; all but the last by default."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The cell embedding of a model, in words for manifests and model cards."""

    layer: str
    """Layer whose states are pooled."""
    pooling: str
    """How the states of the tokens become one vector."""
    untrained: str
    """Parts of the model that fine-tuning on the embedding leaves as they are."""


@dataclass(frozen=True, kw_only=True)
class BertFusion:
    """The fusion of ONNX Runtime for BERT applies: blocks of post-LN attention, one embedding layer."""

    heads: int
    hidden: int
    blocks: int
    """Blocks that the traced module has."""


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """All that an exporter needs to make a graph of a model, whatever its family."""

    inputs: tuple[InputSpec, ...]
    """Inputs of the graph, in order; ``attention_mask`` follows them."""
    outputs: tuple[OutputSpec, ...]
    """Outputs of the graph, in order; the first is the cell embedding."""
    task: Task
    """What the model was trained for."""
    embedding: Embedding
    """The cell embedding in words."""
    module: Callable[[nn.Module], nn.Module]
    """Returns the module to trace. It is called with the inputs in order and the attention mask, or with all by name,
    and returns one tensor if there is one output, else a tuple in the order of `outputs`."""
    reference: Callable[[nn.Module], nn.Module]
    """Returns a module of the same outputs (always a tuple) by their definition, which shares as little code with
    `module` as possible: what the graph is compared with."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Options of the model's configuration with which the model for `module` is to be built."""
    fusion: BertFusion | None = None
    """Fusion that applies to the traced graph; None: no fusion."""
