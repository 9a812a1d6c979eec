"""The smaller variants of a float32 graph: half precision, with attention for every GPU, and int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.files import is_large, write_graph
from export.forms import standard_attention

VariantName = Literal["fp16", "fp16-flash", "int8"]
_POOLING = "/pooling/"
"""Scope of the nodes that sum over tokens: those of the traced module's submodule ``pooling``."""
_INTEGERS = frozenset({
    "Shape", "Size", "NonZero", "ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And",
    "Or", "Not", "Xor", "IsNaN", "IsInf",
})  # fmt: skip
"""Operators whose outputs are whole numbers or truth values, whatever their inputs are."""


def half_precision(graph: ModelProto) -> ModelProto:
    """Return the graph in float16, with inputs and outputs as they are in float32.

    The nodes in the scope of a submodule ``pooling``, and all that depends on them, stay float32: a sum over tokens
    could overflow.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    nodes = list(graph.graph.node)
    is_wide = _wide(nodes)
    head = [node for node, wide in zip(nodes, is_wide, strict=True) if wide]
    body_nodes = [node for node, wide in zip(nodes, is_wide, strict=True) if not wide]
    in_head, in_body = ({name for node in part for name in node.input} for part in (head, body_nodes))
    made = {name for node in body_nodes for name in node.output} & _floats(graph)
    # Tensors that cross from half to single precision, each once, in the order of the graph.
    ends = [*(name for node in head for name in node.input), *(item.name for item in graph.graph.output)]
    crossing = dict.fromkeys(name for name in ends if name in made)
    body = ModelProto()
    body.CopyFrom(graph)
    _replace(body.graph.node, body_nodes)
    _replace(body.graph.output, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in crossing])
    _replace(body.graph.initializer, [item for item in graph.graph.initializer if item.name in in_body])
    inputs = [item.name for item in graph.graph.input]
    converted: ModelProto = convert_float_to_float16(body, keep_io_types=inputs, disable_shape_infer=is_large(graph))
    narrow = {name: f"{name}/float16" for name in crossing}
    for node in converted.graph.node:
        _replace(node.input, [narrow.get(name, name) for name in node.input])
        _replace(node.output, [narrow.get(name, name) for name in node.output])
    for name, half in narrow.items():
        converted.graph.node.append(helper.make_node("Cast", [half], [name], name=f"{half}/Cast", to=TensorProto.FLOAT))
    converted.graph.node.extend(head)
    converted.graph.initializer.extend(item for item in graph.graph.initializer if item.name in in_head - in_body)
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
    helper.set_model_props(prepared, {"onnx.quant.pre_process": "onnxruntime.quant"})
    large = is_large(prepared)
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        write_graph(prepared, source)
        del prepared
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            reduce_range=True,
            use_external_data_format=large,
            # ONNX does not know shapes inside the fused operators nor, without a default, their types.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
        return onnx.load(target)


VARIANTS: dict[str, Callable[[ModelProto], ModelProto]] = {
    "fp16": half_precision,
    "fp16-flash": lambda fp32: half_precision(standard_attention(fp32)),
    "int8": eight_bit,
}
"""Variants, with the functions that make them from the float32 graph."""


def _wide(nodes: list[NodeProto]) -> list[bool]:
    """Return which nodes sum over tokens, or depend on such a node."""
    reached: set[str] = set()
    found = []
    for node in nodes:
        found.append(node.name.startswith(_POOLING) or not reached.isdisjoint(node.input))
        if found[-1]:
            reached.update(node.output)
    return found


def _floats(graph: ModelProto) -> set[str]:
    """Return the names of the tensors of floating-point numbers; the nodes are in their order."""
    floats = {item.name for item in graph.graph.initializer if item.data_type == TensorProto.FLOAT}
    floats |= {item.name for item in graph.graph.input if item.type.tensor_type.elem_type == TensorProto.FLOAT}
    for node in graph.graph.node:
        attributes = {item.name: item for item in node.attribute}
        if node.op_type == "Cast":
            is_float = attributes["to"].i == TensorProto.FLOAT
        elif node.op_type == "Constant":
            value = attributes.get("value")
            is_float = value.t.data_type == TensorProto.FLOAT if value else "float" in next(iter(attributes), "")
        elif node.op_type == "ConstantOfShape":
            is_float = "value" not in attributes or attributes["value"].t.data_type == TensorProto.FLOAT
        else:
            is_float = node.op_type not in _INTEGERS and not floats.isdisjoint(node.input)
        if is_float:
            # What an operator returns beside its first output is counts, indices and statistics, or of no use here.
            floats.add(node.output[0])
    return floats


def _replace(field: Any, items: list[Any]) -> None:
    """Set a repeated protobuf field."""
    del field[:]
    field.extend(items)
