"""Graphs: the pooled encoder as ONNX, fused for ONNX Runtime, and its smaller variants.

The fused operators (Attention, EmbedLayerNormalization, SkipLayerNormalization) take the attention mask as one length
for each row, so cells must be padded on the right, as :func:`perturbscope.families.tokens.pad` does.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from onnx import ModelProto, TensorProto
from transformers import BertForMaskedLM

from export import GraphError
from perturbscope.families.outputs import CELL_EMBEDDING
from training.families.rank.pooling import PooledEncoder

INPUTS = ("input_ids", "attention_mask")
"""Inputs of the graph, both int64 [batch, length]."""
_OPSET = 17
"""Newest opset in which the fusion finds the attention that the tracing exporter writes."""
_POOLING = "/pooling/"
"""Scope of the nodes of the mean over tokens, from the name of the module in the pooled encoder."""


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


def build_graph(model: BertForMaskedLM, *, fuse: bool = True) -> ModelProto:
    """Build the graph of a model's cell embedding, float32.

    Parameters
    ----------
    model
        Model in evaluation mode, on the CPU, with eager attention (the fusion cannot look into fused kernels).
    fuse
        Whether to join the operators of each block into those that ONNX Runtime has kernels for.

    Raises
    ------
    GraphError
        The graph holds a block or a head that the embedding does not need, or could not be fused.
    """
    encoder = PooledEncoder(model).eval()
    graph = _trace(encoder)
    if fuse:
        graph = _fuse(graph, heads=model.config.num_attention_heads, hidden=model.config.hidden_size)
    wanted = sum(parameter.numel() for parameter in encoder.parameters() if parameter.ndim == 2)
    check_graph(graph, blocks=len(encoder.blocks), matrix_elements=wanted, fused=fuse)
    return graph


def half_precision(graph: ModelProto) -> ModelProto:
    """Return the graph in float16; the mean over tokens stays float32, as a sum could overflow."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    pooling = [node for node in graph.graph.node if node.name.startswith(_POOLING)]
    states = _pooled_states(pooling)
    body = ModelProto()
    body.CopyFrom(graph)
    _replace(body.graph.node, [node for node in graph.graph.node if not node.name.startswith(_POOLING)])
    _replace(body.graph.output, [onnx.helper.make_tensor_value_info(states, TensorProto.FLOAT, None)])
    converted: ModelProto = convert_float_to_float16(body)
    wide = f"{states}_float32"
    converted.graph.node.append(
        onnx.helper.make_node("Cast", [states], [wide], name="/pooling/CastStates", to=TensorProto.FLOAT)
    )
    for node in pooling:
        copy = converted.graph.node.add()
        copy.CopyFrom(node)
        _replace(copy.input, [wide if name == states else name for name in node.input])
    _replace(converted.graph.output, list(graph.graph.output))
    return converted


def eight_bit(graph: ModelProto) -> ModelProto:
    """Return the graph with int8 weights, one scale for each channel; activations are quantised at run time.

    Weights use 7 of the 8 bits: with 8, the 16-bit sums of processors with AVX2 but without VNNI would overflow, and
    the embedding would depend on the machine.
    """
    from onnxruntime.quantization import quantize_dynamic

    prepared = ModelProto()
    prepared.CopyFrom(graph)
    # The quantiser expects its own fusion first, and warns without this note; the graph is fused already.
    onnx.helper.set_model_props(prepared, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(prepared, source)
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            reduce_range=True,
            # ONNX does not know shapes inside the fused operators nor, without a default, their types.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
        return onnx.load(target)


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


def check_graph(graph: ModelProto, *, blocks: int, matrix_elements: int, fused: bool) -> None:
    """Check that a graph holds the parts that a cell embedding needs, and no others.

    Parameters
    ----------
    blocks
        Expected number of transformer blocks: all but the last.
    matrix_elements
        Elements of all matrices of the pooled encoder; a second embedding table, a language-model head or an unused
        block would exceed this number.
    fused
        Whether the graph should be fused.

    Raises
    ------
    GraphError
        The graph lacks a part, or has others.
    """
    facts = graph_facts(graph)
    if facts.blocks != blocks:
        raise GraphError(f"The graph has {facts.blocks} transformer blocks; the embedding needs {blocks}.")
    if facts.matrix_elements > matrix_elements:
        raise GraphError(
            f"The graph stores matrices of {facts.matrix_elements} elements; the embedding needs {matrix_elements}. "
            "A weight is stored twice, or belongs to an unused part."
        )
    if fused and not (
        facts.fused
        and facts.operators.get("EmbedLayerNormalization", 0) == 1
        and facts.operators.get("SkipLayerNormalization", 0) == 2 * blocks
    ):
        raise GraphError(
            f"The graph could not be fused; its operators are {facts.operators}. "
            "The versions of torch, transformers and onnxruntime must be those of the requirements."
        )


def _trace(encoder: PooledEncoder) -> ModelProto:
    """Trace the encoder as a plain graph with dynamic batch and length."""
    ids_BL = torch.full((2, 3), 2, dtype=torch.int64)
    mask_BL = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.int64)
    axes = {name: {0: "batch", 1: "length"} for name in INPUTS} | {CELL_EMBEDDING: {0: "batch"}}
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        # Only graphs of the tracing exporter can be fused. Its deprecation warnings, and the check of the mask's rank
        # in transformers (the same for all inputs), do not matter for this graph, which is compared with torch.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python boolean")
        warnings.filterwarnings("ignore", message="Exporting aten::index operator", category=UserWarning)
        torch.onnx.export(
            encoder,
            (ids_BL, mask_BL),
            Path(folder) / "traced.onnx",
            input_names=list(INPUTS),
            output_names=[CELL_EMBEDDING],
            dynamic_axes=axes,
            opset_version=_OPSET,
            dynamo=False,
        )
        return onnx.load(Path(folder) / "traced.onnx")


def _fuse(graph: ModelProto, *, heads: int, hidden: int) -> ModelProto:
    from onnxruntime.transformers.optimizer import optimize_model

    optimizer = optimize_model(graph, model_type="bert", num_heads=heads, hidden_size=hidden, opt_level=0)
    optimizer.topological_sort(is_deterministic=True)
    fused: ModelProto = optimizer.model
    fused.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return fused


def _pooled_states(pooling: list[onnx.NodeProto]) -> str:
    """Return the name of the last block's output, which the pooling multiplies with the mask."""
    inside = {name for node in pooling for name in node.output}
    (product,) = (node for node in pooling if node.op_type == "Mul")
    (states,) = (name for name in product.input if name not in inside)
    return states


def _replace(field: Any, items: list[Any]) -> None:
    """Set a repeated protobuf field."""
    del field[:]
    field.extend(items)
