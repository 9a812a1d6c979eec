"""The graph with attention as the standard operator of ONNX, for GPUs.

The fused form (:func:`export.graph.build_graph`) has ONNX Runtime's own operator Attention, with one length for each
cell. On NVIDIA GPUs it runs the flash attention of cuDNN from Hopper on; before, it runs kernels of TensorRT for heads
of 32 and 64. The standard operator (opset 24) takes the lengths as well, and runs FlashAttention-2 on every GPU from
Ampere on and for every head size up to 256. It also runs on the CPU, where both forms are compared.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export import GraphError

_OPSET = 24
_IR_VERSION = 11
_LENGTHS = "attention_lengths"


def standard_attention(graph: ModelProto) -> ModelProto:
    """Return the float32 graph with each fused Attention as three matrix products and the standard operator.

    Two of the three biases of attention need no operator. With q, k, v without bias, scores of a query i are
    (q_i + b_q) . k_j + (q_i + b_q) . b_k; the second term is the same for every key j and cancels in the softmax. The
    weights of a query sum to 1, so b_v passes through attention unchanged, and b_v W_o is added to the bias of the
    output product. The single token type of cells becomes part of the positions: without the nodes that compute its
    shape, all kernels run on the GPU and can be captured as one graph.

    Parameters
    ----------
    graph
        Graph that :func:`export.graph.build_graph` fused.

    Raises
    ------
    GraphError
        Attention is not fused, or no product and normalisation with a bias follow it.
    """
    standard = ModelProto()
    standard.CopyFrom(graph)
    weights = {item.name: item for item in standard.graph.initializer}
    nodes: list[NodeProto] = []
    fused = False
    for node in standard.graph.node:
        if node.op_type != "Attention":
            nodes.append(node)
            continue
        if not any(_LENGTHS in item.output for item in nodes):
            nodes.append(helper.make_node("Cast", [node.input[3]], [_LENGTHS], name=_LENGTHS, to=TensorProto.INT64))
        W_qkv, b_qkv = (numpy_helper.to_array(weights[name]) for name in node.input[1:3])
        b_q, _, b_v = np.split(b_qkv, 3)
        added, new = _attention(node, np.split(W_qkv, 3, axis=1), b_q)
        nodes += added
        standard.graph.initializer.extend(new)
        _add_to_output_bias(standard, weights, node.output[0], b_v)
        fused = True
    if not fused:
        raise GraphError("The graph has no fused attention. Export without fp16-flash.")
    _add_types_to_positions(nodes, weights)
    _keep(standard, nodes)
    for domain in standard.opset_import:
        if domain.domain in ("", "ai.onnx"):
            domain.version = _OPSET
    standard.ir_version = max(standard.ir_version, _IR_VERSION)
    onnx.checker.check_model(standard)
    return standard


def _attention(
    node: NodeProto, matrices: list[NDArray[np.float32]], b_q: NDArray[np.float32]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Make nodes and weights of the attention of one block."""
    heads = next(item.i for item in node.attribute if item.name == "num_heads")
    name = node.name
    weights = [
        numpy_helper.from_array(np.ascontiguousarray(matrix), f"{name}_{letter}_weight")
        for matrix, letter in zip(matrices, "qkv", strict=True)
    ]
    weights.append(numpy_helper.from_array(b_q, f"{name}_q_bias"))
    nodes = [
        helper.make_node(
            "MatMul", [node.input[0], f"{name}_{letter}_weight"], [f"{name}_{letter}"], name=f"{name}_{letter}_MatMul"
        )
        for letter in "qkv"
    ]
    nodes += [
        helper.make_node("Add", [f"{name}_q", f"{name}_q_bias"], [f"{name}_query"], name=f"{name}_q_Add"),
        helper.make_node(
            "Attention",
            [f"{name}_query", f"{name}_k", f"{name}_v", "", "", "", _LENGTHS],
            [node.output[0]],
            name=name,
            q_num_heads=heads,
            kv_num_heads=heads,
        ),
    ]
    return nodes, weights


def _add_to_output_bias(
    graph: ModelProto, weights: dict[str, TensorProto], attended: str, b_v: NDArray[np.float32]
) -> None:
    """Add b_v W_o to the bias of the normalisation that follows the output product."""
    products = [node for node in graph.graph.node if node.op_type == "MatMul" and node.input[0] == attended]
    norms = [
        node
        for node in graph.graph.node
        for product in products
        if node.op_type == "SkipLayerNormalization" and product.output[0] in node.input[:2] and len(node.input) > 4
    ]
    if len(products) != 1 or len(norms) != 1:
        raise GraphError("Attention is not followed by one matrix product and a normalisation that adds its bias.")
    W_o, bias = (numpy_helper.to_array(weights[name]) for name in (products[0].input[1], norms[0].input[4]))
    total = bias + (b_v.astype(np.float64) @ W_o.astype(np.float64)).astype(np.float32)
    weights[norms[0].input[4]].CopyFrom(numpy_helper.from_array(total, norms[0].input[4]))


def _add_types_to_positions(nodes: list[NodeProto], weights: dict[str, TensorProto]) -> None:
    """Add the first token type, which all tokens have, to every position, and remove the types."""
    (embedding,) = (node for node in nodes if node.op_type == "EmbedLayerNormalization")
    positions, types = (numpy_helper.to_array(weights[name]) for name in embedding.input[3:5])
    weights[embedding.input[3]].CopyFrom(numpy_helper.from_array(positions + types[0], embedding.input[3]))
    embedding.input[1] = embedding.input[4] = ""


def _keep(graph: ModelProto, nodes: list[NodeProto]) -> None:
    """Put `nodes` into the graph, without nodes and weights on which no output depends."""
    wanted = {item.name for item in graph.graph.output}
    needed = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            needed.append(node)
    used = [item for item in graph.graph.initializer if item.name in wanted]
    del graph.graph.node[:]
    graph.graph.node.extend(reversed(needed))
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(used)
