"""Forms of the graph for a GPU: their operators, the kernels that CUDA runs for them, and their cost at best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.performance.embedding.models import BUILT, paper_weights
from benchmarks.performance.harness import Options, table
from perturbscope.families.outputs import CELL_EMBEDDING, cell_embedding
from perturbscope.inference.bundle import VOCABULARY, Bundle, Variant
from training.measure.flops import ModelSize, cell_cost

if TYPE_CHECKING:
    from onnx import ModelProto

FORMS: dict[str, str] = {
    "fp16": "fused, Attention of ONNX Runtime with one length a cell",
    "fp16-flash": "fused, standard Attention (opset 24) with one length a cell",
    "fp16-packed": "as fp16, padding removed (RemovePadding, PackedAttention); CUDA only",
    "fp16-plain": "not fused, float32 weights, for TensorRT, which computes in float16",
}
"""Variants of the benchmark's bundle. The first two are the exporter's; the others are made here, to be measured."""
LAUNCHED = {"Constant", "Shape", "Reshape", "Unsqueeze", "Squeeze", "Identity"}
"""Operators that launch no kernel on a GPU."""
_CPU = {"Shape", "Slice", "Concat", "Gather", "Where", "Equal", "ConstantOfShape"}
"""Operators with which ONNX Runtime computes shapes, on the CPU, from the output of Shape."""

H100_FLOPS, H100_BYTES = 989e12, 3.35e12
"""The vendor's peaks of an H100 SXM: dense bf16 or fp16 products, FLOP/s, and memory, byte/s."""
PRODUCTS, FLASH, MEMORY = 0.70, 0.35, 0.85
"""Assumed shares of the peaks: of dense products; of FlashAttention-2 (Shah et al. 2024 give 35 % on an H100); of
memory."""
LENGTHS = (256, 512, 1024, 2048)


@dataclass(frozen=True)
class Step:
    """One kernel of a block, for one token of float16.

    Attributes
    ----------
    flops
        Operations; a multiplication and an addition count as two.
    bytes
        Bytes read and written in the GPU's memory, where every kernel's result goes.
    attention
        Whether it is the attention kernel, whose FLOP grow with the length.
    """

    flops: float
    bytes: float
    attention: bool = False


def steps(form: str, size: ModelSize, length: int) -> list[Step]:
    """Return the kernels of one block."""
    H, F = size.hidden, size.feed_forward

    def product(wide: int, high: int) -> Step:
        return Step(2.0 * wide * high, 2.0 * (wide + high))

    def elements(n: int) -> Step:
        return Step(0.0, 2.0 * n)

    attention = Step(4.0 * length * H, 2.0 * 4 * H, attention=True)
    if form == "fp16-flash":
        projection = [product(H, H)] * 3 + [elements(2 * H)]
    else:  # one product, and a kernel that adds the bias and separates the heads
        projection = [product(H, 3 * H), elements(6 * H)]
    rest = [product(H, H), elements(3 * H), product(H, F), elements(2 * F), elements(2 * F), product(F, H)]
    return [*projection, attention, *rest, elements(3 * H)]


def projected(form: str, length: int, size: ModelSize = ModelSize()) -> float:  # noqa: B008  a frozen value
    """Return cells/s of an H100 SXM if each kernel takes as long as its FLOP or its bytes do at the assumed shares."""
    seconds = 0.0
    for step in steps(form, size, length):
        rate = H100_FLOPS * (FLASH if step.attention else PRODUCTS)
        seconds += max(step.flops / rate, step.bytes / (H100_BYTES * MEMORY))
    return 1.0 / (seconds * length * (size.layers - 1))


def projection() -> tuple[str, dict[str, Any]]:
    """Predict the speed of an H100 from FLOP and bytes, to be compared with a measurement."""
    size = ModelSize()
    rows, numbers = [], {}
    for length in LENGTHS:
        cost = cell_cost(size, length, layers=size.layers - 1)
        found = {form: projected(form, length) for form in ("fp16", "fp16-flash")}
        numbers[str(length)] = {"gflop": cost.forward / 1e9, **found}
        share = {form: rate * cost.forward / (H100_FLOPS * PRODUCTS) for form, rate in found.items()}
        rows.append(
            (
                length,
                f"{cost.forward / 1e9:.1f}",
                f"{cost.attention / cost.forward:.0%}",
                *(f"{found[form]:,.0f} ({share[form]:.0%})" for form in found),
            )
        )
    text = (
        f"**Projected, not measured:** cells/s of an H100 SXM, and share of {PRODUCTS:.0%} of its peak (what is taken "
        f"for its ceiling), if each kernel takes the time of its FLOP or of its bytes. Products run at {PRODUCTS:.0%} "
        f"of {H100_FLOPS / 1e12:.0f} TFLOP/s, attention at {FLASH:.0%}, memory at {MEMORY:.0%} of "
        f"{H100_BYTES / 1e12:.2f} TB/s. Model of the paper's shape, 5 of 6 blocks.\n\n"
    )
    return text + table(("length", "GFLOP a cell", "of it attention", "fp16", "fp16-flash"), rows), numbers


def form_makers() -> dict[str, Callable[[ModelProto, ModelProto], ModelProto]]:
    """Return the functions that make each form from the fused and the plain float32 graph."""
    from export.forms import standard_attention
    from export.variants import half_precision

    return {
        "fp16": lambda fused, plain: half_precision(fused),
        "fp16-flash": lambda fused, plain: half_precision(standard_attention(fused)),
        "fp16-packed": lambda fused, plain: packed(half_precision(fused)),
        "fp16-plain": lambda fused, plain: plain,
    }


def packed(graph: ModelProto) -> ModelProto:
    """Remove padding between embedding and mean from a graph, by ONNX Runtime's own tool."""
    import onnx
    from onnxruntime.transformers.convert_to_packing_mode import PackingMode
    from onnxruntime.transformers.onnx_model import OnnxModel

    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    wrapped = OnnxModel(copy)
    PackingMode(wrapped).convert(use_symbolic_shape_infer=False)
    wrapped.topological_sort()
    result: ModelProto = wrapped.model
    if not any(node.op_type == "PackedAttention" for node in result.graph.node):
        raise ValueError("ONNX Runtime's tool has not packed the graph")
    return result


def forms_bundle() -> Path:
    """Return a bundle with all forms of a model of the paper's shape with random weights; it is made the first time."""
    path = BUILT / "gpu-forms"
    weights = paper_weights()
    source = Bundle.open(weights.bundle)
    if path.exists() and set(FORMS) <= set(Bundle.open(path).manifest.variants):
        return path
    assert weights.checkpoint is not None
    fused, plain = (cell_graph(weights.checkpoint, fuse=fuse) for fuse in (True, False))
    files: dict[str, Path | bytes] = {
        "model.onnx": fused.SerializeToString(),
        VOCABULARY: source.vocabulary.to_tsv().encode(),
        "MODEL_CARD.md": b"Random weights, for benchmarks.\n",
    }
    variants = {"fp32": Variant(file="model.onnx")}
    for name, make in form_makers().items():
        files[f"model.{name}.onnx"] = make(fused, plain).SerializeToString()
        variants[name] = Variant(file=f"model.{name}.onnx")
    outputs = (cell_embedding(source.manifest.width),)
    manifest = dataclasses.replace(
        source.manifest, name="gpu-forms", variants=variants, outputs=outputs, capabilities=("embed",)
    )
    return Bundle.write(path, manifest, files, overwrite=True).path


def cell_graph(checkpoint: Path, *, fuse: bool) -> ModelProto:
    """Build the graph of a checkpoint with the cell embedding as its only output."""
    import numpy as np

    from export.graph import build_graph
    from export.parity import random_batch
    from perturbscope.families import load_family
    from training import families
    from training.checkpoint import load_checkpoint

    found = load_checkpoint(checkpoint)
    half = families.load(found.family)
    family = load_family(found.family, found.family_config, found.vocabulary)
    spec = half.export_spec(half.parse_config(found.model_config), family=family, outputs=[])
    example = random_batch(family, (3, 2), rng=np.random.default_rng(0))
    return build_graph(found.model(**spec.overrides), spec, example, fuse=fuse)


def forms(options: Options) -> tuple[str, dict[str, Any]]:
    """Tabulate the operators of each form, and its difference from float32 if the CPU can run it."""
    import numpy as np
    import onnx

    from export.files import graph_runner
    from export.graph import graph_facts

    bundle = Bundle.open(forms_bundle())
    rng = np.random.default_rng(0)
    length = 64 if options.quick else 512
    mask = (np.arange(length) < np.array([length, length // 2, 3])[:, None]).astype(np.int64)
    ids = rng.choice(bundle.vocabulary.tokens.astype(np.int64), mask.shape) * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    exact = graph_runner(bundle.graph())(batch)[CELL_EMBEDDING]
    rows, numbers = [], {}
    for name, description in FORMS.items():
        graph = onnx.load(bundle.graph(name))
        operators = graph_facts(graph).operators
        kernels = sum(n for operator, n in operators.items() if operator not in LAUNCHED)
        found: dict[str, Any] = {"operators": operators, "nodes": kernels, "shapes": _shapes(graph)}
        try:
            found["difference"] = float(np.abs(graph_runner(graph)(batch)[CELL_EMBEDDING] - exact).max())
        except Exception as error:  # noqa: BLE001  an operator without a CPU kernel, which is to be shown
            found["difference"] = None
            found["refused"] = str(error).splitlines()[0]
        numbers[name] = found
        main = (
            "Attention",
            "PackedAttention",
            "EmbedLayerNormalization",
            "SkipLayerNormalization",
            "Softmax",
            "MatMul",
        )
        rows.append(
            (
                f"`{name}`: {description}",
                ", ".join(f"{operators[item]} {item}" for item in main if item in operators),
                kernels,
                found["shapes"],
                "CUDA only" if found["difference"] is None else f"{found['difference']:.1e}",
            )
        )
    text = table(("form", "operators", "nodes with a kernel", "of them for shapes", "largest difference to fp32"), rows)
    return text, numbers


def _shapes(graph: ModelProto) -> int:
    """Count the nodes that compute shapes: Shape, and nodes that depend on nothing else."""
    known = {item.name for item in graph.graph.initializer}
    shapes: set[str] = set()
    n = 0
    for node in graph.graph.node:
        if node.op_type == "Constant":
            known |= set(node.output)
        elif node.op_type == "Shape" or (
            node.op_type in _CPU | LAUNCHED | {"Mul", "Add", "Cast"} and set(node.input) <= known | shapes | {""}
        ):
            shapes |= set(node.output)
            n += node.op_type not in LAUNCHED
    return n
