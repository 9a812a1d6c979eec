"""Graphs: a model's outputs as ONNX, fused for ONNX Runtime where its family says that this is possible.

The fused operators (Attention, EmbedLayerNormalization, SkipLayerNormalization) take the attention mask as one length
for each row, so cells must be padded on the right, as :func:`perturbscope.families.tokens.pad` does.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from onnx import ModelProto
from torch import nn

from export import GraphError
from export.files import Batch
from training.families.specs import BertFusion, ExportSpec

MASK = "attention_mask"
"""Input that every graph takes behind those of its family, int64 [batch, length]."""
_OPSET = 17
"""Newest opset in which the fusion finds the attention that the tracing exporter writes."""


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """Contents of a graph.

    Attributes
    ----------
    blocks
        Number of transformer blocks, counted by their attention.
    fused
        Whether the attention of a block is one operator.
    matrix_elements
        Elements of all stored floating-point matrices (quantised ones included).
    operators
        Number of nodes of each operator.
    """

    blocks: int
    fused: bool
    matrix_elements: int
    operators: dict[str, int]


def build_graph(model: nn.Module, spec: ExportSpec, example: Batch, *, fuse: bool = True) -> ModelProto:
    """Build the graph of a model's outputs, float32.

    Parameters
    ----------
    model
        Model in evaluation mode, on the CPU, built with the overrides of `spec`.
    spec
        Inputs, outputs and module, from the model's family.
    example
        Padded batch of at least two cells and two tokens, one of them padding, to trace the module with.
    fuse
        Whether to join the operators of each block into those that ONNX Runtime has kernels for, if the family says
        that there are such blocks.

    Raises
    ------
    GraphError
        The graph holds a block or a head that the outputs do not need, or could not be fused.
    """
    module = spec.module(model).eval()
    graph = _trace(module, spec, example)
    fusion = spec.fusion if fuse else None
    if fusion is not None:
        graph = _fuse(graph, fusion)
    wanted = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
    check_graph(
        graph, blocks=spec.fusion.blocks if spec.fusion else None, matrix_elements=wanted, fused=fusion is not None
    )
    return graph


def graph_facts(graph: ModelProto) -> GraphFacts:
    """Count the contents of a graph."""
    operators = Counter(node.op_type for node in graph.graph.node)
    fused = operators["Attention"] + operators["QAttention"]
    matrices = [item for item in graph.graph.initializer if len(item.dims) == 2]
    return GraphFacts(
        blocks=fused or operators["Softmax"],
        fused=fused > 0,
        matrix_elements=sum(int(item.dims[0]) * int(item.dims[1]) for item in matrices),
        operators=dict(sorted(operators.items())),
    )


def check_graph(graph: ModelProto, *, blocks: int | None, matrix_elements: int, fused: bool) -> None:
    """Check that a graph holds the parts that its outputs need, and no others.

    Parameters
    ----------
    blocks
        Expected number of transformer blocks; None: the family does not say.
    matrix_elements
        Elements of all matrices of the traced module; a second embedding table, a head or a block that no output needs
        would exceed this number.
    fused
        Whether the graph should be fused.

    Raises
    ------
    GraphError
        The graph lacks a part, or has others.
    """
    facts = graph_facts(graph)
    if blocks is not None and facts.blocks != blocks:
        raise GraphError(f"The graph has {facts.blocks} transformer blocks; its outputs need {blocks}.")
    if facts.matrix_elements > matrix_elements:
        raise GraphError(
            f"The graph stores matrices of {facts.matrix_elements} elements; its outputs need {matrix_elements}. "
            "A weight is stored twice, or belongs to an unused part."
        )
    if fused and not (
        facts.fused
        and facts.operators.get("EmbedLayerNormalization", 0) == 1
        and facts.operators.get("SkipLayerNormalization", 0) == 2 * facts.blocks
    ):
        raise GraphError(
            f"The graph could not be fused; its operators are {facts.operators}. "
            "The versions of torch, transformers and onnxruntime must be those of the requirements."
        )


def _trace(module: nn.Module, spec: ExportSpec, example: Batch) -> ModelProto:
    """Trace the module as a plain graph with dynamic batch and length."""
    inputs = [item.name for item in spec.inputs] + [MASK]
    per = {
        **{item.name: item.per for item in spec.inputs},
        MASK: "token",
        **{item.name: item.per for item in spec.outputs},
    }
    dims = {"cell": {0: "batch"}, "token": {0: "batch", 1: "length"}}
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        # Only graphs of the tracing exporter can be fused. Its deprecation warnings, and the check of the mask's rank
        # in transformers (the same for all inputs), do not matter for this graph, which is compared with torch.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python boolean")
        warnings.filterwarnings("ignore", message="Exporting aten::index operator", category=UserWarning)
        torch.onnx.export(
            module,
            tuple(torch.from_numpy(example[name]) for name in inputs),
            Path(folder) / "traced.onnx",
            input_names=inputs,
            output_names=[item.name for item in spec.outputs],
            dynamic_axes={name: dims[kind] for name, kind in per.items()},
            opset_version=_OPSET,
            dynamo=False,
        )
        return onnx.load(Path(folder) / "traced.onnx")


def _fuse(graph: ModelProto, fusion: BertFusion) -> ModelProto:
    from onnxruntime.transformers.optimizer import optimize_model

    optimizer = optimize_model(graph, model_type="bert", num_heads=fusion.heads, hidden_size=fusion.hidden, opt_level=0)
    optimizer.topological_sort(is_deterministic=True)
    fused: ModelProto = optimizer.model
    fused.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return fused
