"""The graph that a CPU session gets: the same vectors from other operators, and nothing that is not understood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from perturbscope.families.outputs import CELL_EMBEDDING
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.cpu_graph import DISABLED_OPTIMIZERS, FOLDER, MIN_FLASH_LENGTH, cpu_graph, rewritten
from perturbscope.inference.encoder import OnnxEncoder

BUNDLE = Path(__file__).resolve().parents[3] / "bundles" / "default"
HEADS, WIDTH = 2, 8


def session(graph: bytes, *, disabled: tuple[str, ...] = ()) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=[*disabled] or None
    )


def batch(lengths: list[int], *, genes: int = 25_000) -> dict[str, np.ndarray]:
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.random.default_rng(0).integers(2, genes, mask.shape)
    return {"input_ids": ids * mask, "attention_mask": mask}


def operators(graph: onnx.GraphProto) -> Counter[str]:
    found = Counter(node.op_type for node in graph.node)
    for node in graph.node:
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                found += operators(item.g)
    return found


def fused() -> onnx.ModelProto:
    """One block as an exporter fuses it: embedding, attention, and a residual normalisation without a bias."""
    rng = np.random.default_rng(1)

    def stored(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    contrib = {"domain": "com.microsoft"}
    embedding = ["ids", "segments", "words", "positions", "types", "gamma", "beta", "mask"]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.INT32),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.INT32),
        helper.make_node("Sub", ["ids", "ids"], ["segments"]),
        helper.make_node("EmbedLayerNormalization", embedding, ["embedded", "lengths"], epsilon=1e-12, **contrib),
        helper.make_node("Attention", ["embedded", "weight", "bias", "lengths"], ["mixed"], num_heads=HEADS, **contrib),
        helper.make_node(
            "SkipLayerNormalization", ["mixed", "embedded", "gamma", "beta"], [CELL_EMBEDDING], epsilon=1e-12, **contrib
        ),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "l"]) for name in ("input_ids", "attention_mask")
    ]
    graph = helper.make_graph(
        nodes,
        "block",
        inputs,
        [helper.make_tensor_value_info(CELL_EMBEDDING, TensorProto.FLOAT, None)],
        [
            stored("words", 50, WIDTH),
            stored("positions", 400, WIDTH),
            stored("types", 2, WIDTH),
            stored("gamma", WIDTH),
            stored("beta", WIDTH),
            stored("weight", WIDTH, 3 * WIDTH),
            stored("bias", 3 * WIDTH),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, doc_string="kept as it is")


@pytest.mark.parametrize(
    "lengths",
    [[1], [7, 7], [7, 3, 1], [MIN_FLASH_LENGTH - 1], [MIN_FLASH_LENGTH], [300, 300], [300, 299], [300, 2, 1]],
    ids=str,
)
def test_vectors_are_those_of_the_graph_in_the_file(lengths):
    model = fused()
    changed = rewritten(model.SerializeToString())
    inputs = batch(lengths, genes=50)
    (wanted,) = session(model.SerializeToString()).run(None, inputs)
    (found,) = session(changed, disabled=DISABLED_OPTIMIZERS).run(None, inputs)
    tokens = inputs["attention_mask"] > 0
    np.testing.assert_allclose(found[tokens], wanted[tokens], atol=1e-5)


@pytest.mark.parametrize("lengths", [[5, 64, 17], [512, 512], [512, 40]], ids=str)
def test_the_shipped_bundle_gives_the_same_vectors(lengths):
    bundle = Bundle.open(BUNDLE)
    (wanted,) = session(bundle.graph().read_bytes()).run(None, batch(lengths))
    found = OnnxEncoder(bundle, threads=1).run(batch(lengths))[CELL_EMBEDDING]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_slow_operators_are_gone_and_attention_has_a_way_without_mask():
    before = onnx.load(BUNDLE / "model.onnx")
    after = onnx.load_from_string(rewritten(before.SerializeToString()))
    was, now = operators(before.graph), operators(after.graph)
    assert "SkipLayerNormalization" not in now
    assert "EmbedLayerNormalization" not in now
    assert now["LayerNormalization"] == was["SkipLayerNormalization"] + 1
    assert now["If"] == now["MultiHeadAttention"] == now["Attention"] == was["Attention"]
    assert [item.name for item in after.graph.input] == [item.name for item in before.graph.input]


def test_what_is_not_understood_passes_through():
    model = fused()
    model.metadata_props.add(key="who", value="me")
    after = onnx.load_from_string(rewritten(model.SerializeToString()))
    assert after.doc_string == "kept as it is"
    assert after.metadata_props[0].value == "me"
    assert after.graph.input[0] == model.graph.input[0]
    assert list(after.graph.initializer[:7]) == list(model.graph.initializer)


def older(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 16


def of_another_maker(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.domain = "somebody.else"


def half(model: onnx.ModelProto) -> None:
    for item in model.graph.initializer:
        item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float16), item.name))


@pytest.mark.parametrize("change", [older, of_another_maker, half])
def test_a_graph_of_another_form_is_left_alone(change: Callable[[onnx.ModelProto], None], tmp_path: Path):
    model = fused()
    change(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert rewritten(path.read_bytes()) is None
    assert cpu_graph(path) == str(path)


@pytest.mark.parametrize("lengths", [[7, 3, 1], [300, 300]], ids=str)
def test_weights_in_another_file_stay_there(lengths: list[int], tmp_path: Path):
    whole = fused()
    onnx.save(
        fused(), tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    changed = cpu_graph(tmp_path / "model.onnx")
    assert isinstance(changed, bytes)
    assert len(changed) < (tmp_path / "model.onnx.data").stat().st_size
    options = ort.SessionOptions()
    options.add_session_config_entry(FOLDER, str(tmp_path))
    opened = ort.InferenceSession(
        changed, options, providers=["CPUExecutionProvider"], disabled_optimizers=[*DISABLED_OPTIMIZERS]
    )
    inputs = batch(lengths, genes=50)
    (wanted,) = session(rewritten(whole.SerializeToString()), disabled=DISABLED_OPTIMIZERS).run(None, inputs)
    assert np.array_equal(opened.run(None, inputs)[0], wanted)


@pytest.mark.parametrize("graph", [b"", b"no graph at all", bytes(range(256))])
def test_what_is_no_graph_is_left_to_the_runtime_to_refuse(graph: bytes):
    assert rewritten(graph) is None


def test_an_attention_with_another_mask_or_option_stays():
    causal, masked = fused(), fused()
    causal.graph.node[4].attribute.append(helper.make_attribute("unidirectional", 1))
    masked.graph.node[4].input[3] = "mask"
    for model in (causal, masked):
        after = onnx.load_from_string(rewritten(model.SerializeToString()))
        assert operators(after.graph)["Attention"] == 1
        assert "If" not in operators(after.graph)
        inputs = batch([300, 300], genes=50)
        (wanted,) = session(model.SerializeToString()).run(None, inputs)
        (found,) = session(after.SerializeToString(), disabled=DISABLED_OPTIMIZERS).run(None, inputs)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_normalisation_with_further_outputs_stays():
    model = fused()
    model.graph.node[5].output.extend(["", "", "sum"])
    after = onnx.load_from_string(rewritten(model.SerializeToString()))
    assert operators(after.graph)["SkipLayerNormalization"] == 1
