"""Rewriting of a bundle's graph into the form that ONNX Runtime runs fastest on a CPU.

An exported graph has the fused operators that every provider understands. Some of their kernels for the CPU are slower
than the same arithmetic in other operators, so the graph is changed when it is loaded; the file stays as it is, and
serves accelerators too. Results differ by the rounding of another order of sums (about 1e-6).

* ``SkipLayerNormalization`` and ``EmbedLayerNormalization`` take 5 ns an element; additions, look-ups and
  ``LayerNormalization`` together 1 ns.
* ``Attention`` writes all scores of a head to memory. ``MultiHeadAttention`` keeps a tile of them in the cache, but
  only without a mask; so it takes batches of long cells without padding, and ``Attention`` all others.

Nodes that do not have exactly the expected form are left alone. Weights in another file stay there: only the nodes
around them change, and the runtime is told where the file lies (:data:`FOLDER`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from google.protobuf.message import DecodeError

from perturbscope.inference.onnx_graph_pb2 import Attribute, Graph, Model, Node, OperatorSet, Tensor

MIN_FLASH_LENGTH = 256
"""Length from which a batch without padding runs faster with its scores in the cache."""
DISABLED_OPTIMIZERS = ("SkipLayerNormFusion", "EmbedLayerNormFusion")
"""Optimizers of ONNX Runtime that would put the slow operators back."""
FOLDER = "session.model_external_initializers_file_folder_path"
"""Option of a session whose graph is given as bytes: the folder of the files that the graph names."""
_MAX_BYTES = 2**30
"""Bytes of the largest graph that is rewritten: protobuf ends at 2 GiB, and the copy takes as much memory again."""
_CONTRIB = "com.microsoft"
_MIN_OPSET = 17
"""The first opset with LayerNormalization."""
_FLOAT, _INT32, _INT64 = 1, 6, 7
_TYPE_INT, _TYPE_GRAPH = 2, 5


def cpu_graph(path: Path) -> str | bytes:
    """Return the graph for a CPU session: the rewritten graph as bytes, or the path of one that stays as it is."""
    if path.stat().st_size > _MAX_BYTES:
        return str(path)
    changed = rewritten(path.read_bytes())
    return str(path) if changed is None else changed


def rewritten(graph: bytes) -> bytes | None:
    """Return a serialised model with faster operators for the CPU; None if there is nothing to change."""
    try:
        model = Model.FromString(graph)
    except DecodeError:
        return None
    opset = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)
    stored = model.graph.initializer
    if opset < _MIN_OPSET:
        return None
    change = _Rewriting(stored)
    nodes = [new for node in model.graph.node for new in change.of(node)]
    if not change.changed:
        return None
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    stored.extend(change.constants.values())
    if not any(item.domain == _CONTRIB for item in model.opset_import):
        model.opset_import.append(OperatorSet(domain=_CONTRIB, version=1))
    return model.SerializeToString()


class _Rewriting:
    """One pass over the nodes of a graph, in their order."""

    def __init__(self, stored: Iterable[Tensor]) -> None:
        self.changed = False
        self.constants: dict[str, Tensor] = {}
        self._stored = {item.name: item for item in stored}
        self._lengths: dict[str, str] = {}
        """Condition that no row is padded, by the name of each mask that holds one length a row."""

    def of(self, node: Node) -> list[Node]:
        """Return the nodes that replace a node."""
        change = {
            "SkipLayerNormalization": self._skip,
            "EmbedLayerNormalization": self._embed,
            "Attention": self._attention,
        }.get(node.op_type if node.domain == _CONTRIB else "")
        new = change(node) if change else None
        self.changed |= new is not None
        return [node] if new is None else new

    def _skip(self, node: Node) -> list[Node] | None:
        names = [*node.input, ""][:5]
        if len(node.output) != 1 or len(node.input) < 4 or not self._floats(names[2], names[3]):
            return None
        states, skip, gamma, beta, bias = names
        (out,) = node.output
        new = []
        if bias:
            new.append(_node("Add", [states, bias], f"{out}/biased"))
            states = f"{out}/biased"
        new.append(_node("Add", [states, skip], f"{out}/sum"))
        return [*new, self._norm(node, f"{out}/sum", gamma, beta, out)]

    def _embed(self, node: Node) -> list[Node] | None:
        if len(node.input) != 8 or len(node.output) != 2 or not all((*node.input, *node.output)):
            return None
        ids, segments, words, positions, types, gamma, beta, mask = node.input
        if not self._floats(words, positions, types, gamma, beta):
            return None
        out, lengths = node.output
        start, one, two = (self._constant(value) for value in (0, 1, 2))
        self._lengths[lengths] = f"{lengths}/flash"
        return [
            _node("Gather", [words, ids], f"{out}/words"),
            _node("Gather", [types, segments], f"{out}/types"),
            _node("Add", [f"{out}/words", f"{out}/types"], f"{out}/typed"),
            _node("Shape", [ids], f"{out}/shape"),
            _node("Slice", [f"{out}/shape", one, two], f"{out}/length"),
            _node("Slice", [positions, start, f"{out}/length"], f"{out}/positions"),
            _node("Add", [f"{out}/typed", f"{out}/positions"], f"{out}/sum"),
            self._norm(node, f"{out}/sum", gamma, beta, out),
            _node("ReduceSum", [mask, one], lengths, keepdims=0),
            # True if there is no padding, so that no mask is needed, and the cells are long.
            _node("ReduceMin", [lengths], f"{lengths}/least", keepdims=0),
            _node("Cast", [f"{out}/length"], f"{lengths}/longest", to=_INT32),
            _node("Equal", [f"{lengths}/least", f"{lengths}/longest"], f"{lengths}/full"),
            _node("GreaterOrEqual", [f"{out}/length", self._constant(MIN_FLASH_LENGTH)], f"{lengths}/long"),
            _node("And", [f"{lengths}/full", f"{lengths}/long"], f"{lengths}/flash"),
        ]

    def _attention(self, node: Node) -> list[Node] | None:
        if len(node.input) != 4 or len(node.output) != 1 or [item.name for item in node.attribute] != ["num_heads"]:
            return None
        states, weight, bias, lengths = node.input
        if lengths not in self._lengths or not self._floats(weight, bias):
            return None
        width = self._stored[weight].dims[1] // 3
        (out,) = node.output
        heads = node.attribute[0].i
        parts = [f"{out}/{part}" for part in ("query", "key", "value")]
        flash = [
            _node("MatMul", [states, weight], f"{out}/product"),
            _node("Add", [f"{out}/product", bias], f"{out}/projected"),
            _node("Split", [f"{out}/projected", self._constant(width, width, width)], *parts, axis=-1),
            _node("MultiHeadAttention", parts, f"{out}/flash", domain=_CONTRIB, num_heads=heads),
        ]
        masked = Node()
        masked.CopyFrom(node)
        masked.output[:] = [f"{out}/masked"]
        choice = _node("If", [self._lengths[lengths]], out)
        for name, nodes in (("then_branch", flash), ("else_branch", [masked])):
            branch = Graph(node=nodes, name=f"{out}/{name}")
            branch.output.add(name=nodes[-1].output[0]).type.tensor_type.elem_type = _FLOAT
            choice.attribute.append(Attribute(name=name, g=branch, type=_TYPE_GRAPH))
        return [choice]

    def _floats(self, *names: str) -> bool:
        """Return whether all tensors are stored as float32; other types have other kernels."""
        return all(name in self._stored and self._stored[name].data_type == _FLOAT for name in names)

    def _norm(self, old: Node, states: str, gamma: str, beta: str, out: str) -> Node:
        norm = _node("LayerNormalization", [states, gamma, beta], out, axis=-1)
        norm.attribute.extend(item for item in old.attribute if item.name == "epsilon")
        return norm

    def _constant(self, *values: int) -> str:
        """Return the name of a stored int64 vector."""
        name = "cpu_graph/" + "_".join(map(str, values))
        self.constants[name] = Tensor(
            name=name, dims=[len(values)], data_type=_INT64, raw_data=struct.pack(f"<{len(values)}q", *values)
        )
        return name


def _node(operator: str, inputs: Iterable[str], *outputs: str, domain: str = "", **attributes: int) -> Node:
    return Node(
        input=list(inputs),
        output=outputs,
        name=outputs[0],
        op_type=operator,
        domain=domain,
        attribute=[Attribute(name=name, i=value, type=_TYPE_INT) for name, value in attributes.items()],
    )
