from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from export import GraphError
from export.files import graph_runner
from export.graph import build_graph, check_graph, graph_facts
from export.variants import eight_bit, half_precision
from perturbscope.families.outputs import CELL_EMBEDDING, GENE_EMBEDDING
from tests.models import TINY_MODEL, small_example, small_graph, small_model, small_spec

EAGER = dataclasses.replace(TINY_MODEL, attention="eager")
MATRICES = 62 * 32 + 40 * 32 + 2 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 48)
"""Elements of the embeddings and of two blocks."""


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return small_graph()


def weights(graph: onnx.ModelProto) -> list[np.ndarray]:
    return [numpy_helper.to_array(item) for item in graph.graph.initializer]


def test_two_of_three_blocks_and_no_head(graph: onnx.ModelProto) -> None:
    facts = graph_facts(graph)
    assert facts.blocks == 2
    assert facts.fused
    assert facts.operators["Attention"] == 2
    assert facts.operators["EmbedLayerNormalization"] == 1
    assert facts.operators["SkipLayerNormalization"] == 4
    assert facts.matrix_elements == MATRICES
    with_vocabulary = [array.shape for array in weights(graph) if 62 in array.shape]
    assert with_vocabulary == [(62, 32)]


def test_no_weight_of_the_last_block_is_in_the_graph(graph: onnx.ModelProto) -> None:
    model = small_model(EAGER)
    last = model.bert.encoder.layer[-1].output.dense.weight.detach().numpy()
    kept = model.bert.encoder.layer[-2].output.dense.weight.detach().numpy()
    assert any(np.array_equal(array, kept.T) for array in weights(graph))
    assert not any(array.shape in {last.shape, last.T.shape} and np.isin(last, array).all() for array in weights(graph))


def test_inputs_and_outputs(graph: onnx.ModelProto) -> None:
    def shape(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]

    assert [shape(value) for value in graph.graph.input] == [
        ("input_ids", TensorProto.INT64, ["batch", "length"]),
        ("attention_mask", TensorProto.INT64, ["batch", "length"]),
    ]
    assert [shape(value) for value in graph.graph.output] == [
        ("cell_embedding", TensorProto.FLOAT, ["batch", 32]),
        ("gene_embedding", TensorProto.FLOAT, ["batch", "length", 32]),
    ]
    found = graph_runner(graph)(small_example(lengths=(5, 2)))
    assert {name: values.shape for name, values in found.items()} == {
        "cell_embedding": (2, 32),
        "gene_embedding": (2, 5, 32),
    }


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("lengths", [(1,), (40,), (40, 7, 1), (3, 40)], ids=str)
def test_equals_the_torch_module(fuse: bool, lengths: tuple[int, ...], graph: onnx.ModelProto) -> None:
    model = small_model(EAGER)
    run = graph_runner(graph if fuse else small_graph(model, fuse=False))
    batch = small_example(lengths=lengths)
    is_real = batch["attention_mask"] > 0
    with torch.inference_mode():
        cells, genes = small_spec(EAGER).module(model)(*map(torch.from_numpy, batch.values()))
    found = run(batch)
    np.testing.assert_allclose(found[CELL_EMBEDDING], cells.numpy(), atol=1e-5)
    np.testing.assert_allclose(found[GENE_EMBEDDING][is_real], genes.numpy()[is_real], atol=1e-5)


def test_a_further_output_changes_nothing_of_the_cell_embedding(graph: onnx.ModelProto) -> None:
    """The nodes before it are the same ones, and it needs one that nothing else needs."""
    alone = build_graph(small_model(EAGER), small_spec(EAGER, outputs=[]), small_example())
    before, after = graph_facts(alone).operators, graph_facts(graph).operators
    assert {name: n - before.get(name, 0) for name, n in after.items() if n != before.get(name, 0)} == {"Cast": 1}
    batch = small_example(lengths=(40, 7, 1))
    assert np.array_equal(graph_runner(alone)(batch)[CELL_EMBEDDING], graph_runner(graph)(batch)[CELL_EMBEDDING])


def test_the_same_model_gives_the_same_bytes(graph: onnx.ModelProto) -> None:
    again = small_graph()
    assert again.SerializeToString() == graph.SerializeToString()
    for variant in (half_precision, eight_bit):
        assert variant(graph).SerializeToString() == variant(again).SerializeToString()


def test_building_a_variant_leaves_the_graph_as_it_was(graph: onnx.ModelProto) -> None:
    before = graph.SerializeToString()
    half_precision(graph)
    eight_bit(graph)
    assert graph.SerializeToString() == before


@pytest.mark.parametrize(
    ("variant", "kind", "tolerance"),
    [(half_precision, TensorProto.FLOAT16, 2e-2), (eight_bit, TensorProto.INT8, 0.5)],
    ids=["fp16", "int8"],
)
def test_variants_are_smaller_and_near(graph: onnx.ModelProto, variant, kind: int, tolerance: float) -> None:
    smaller = variant(graph)
    assert graph_facts(smaller).blocks == 2
    assert kind in {item.data_type for item in smaller.graph.initializer}
    stored = {item.data_type for item in smaller.graph.initializer if len(item.dims) == 2 and 62 in item.dims}
    assert TensorProto.FLOAT not in stored
    assert len(stored) == 1
    batch = small_example(lengths=(40, 7, 1))
    found, expected = graph_runner(smaller)(batch), graph_runner(graph)(batch)
    for name, values in found.items():
        assert values.dtype == np.float32
        is_real = batch["attention_mask"] > 0 if name == GENE_EMBEDDING else slice(None)
        assert 0 < np.abs(values[is_real] - expected[name][is_real]).max() < tolerance * (1 + (name == GENE_EMBEDDING))


def test_the_half_precision_mean_cannot_overflow() -> None:
    # 40 values of 3,000 add up to more than float16 can hold (65,504).
    model = small_model(EAGER)
    with torch.no_grad():
        model.bert.encoder.layer[-2].output.LayerNorm.bias.fill_(3000.0)
    found = graph_runner(half_precision(small_graph(model)))(small_example(lengths=(40,)))
    for values in found.values():
        np.testing.assert_allclose(values, 3000.0, atol=10)


def test_fusion_needs_eager_attention() -> None:
    with pytest.raises(GraphError, match=r"fused|blocks"):
        small_graph(small_model(dataclasses.replace(TINY_MODEL, attention="sdpa")))


class TestCheckGraph:
    def test_accepts_what_it_should(self, graph: onnx.ModelProto) -> None:
        check_graph(graph, blocks=2, matrix_elements=MATRICES, fused=True)

    def test_a_block_too_many(self, graph: onnx.ModelProto) -> None:
        with pytest.raises(GraphError, match="2 transformer blocks; its outputs need 1"):
            check_graph(graph, blocks=1, matrix_elements=MATRICES, fused=True)

    def test_a_vocabulary_sized_head(self, graph: onnx.ModelProto) -> None:
        larger = onnx.ModelProto()
        larger.CopyFrom(graph)
        larger.graph.initializer.append(numpy_helper.from_array(np.zeros((32, 62), np.float32), "head"))
        with pytest.raises(GraphError, match="stored twice, or belongs to an unused part"):
            check_graph(larger, blocks=2, matrix_elements=MATRICES, fused=True)

    def test_a_graph_that_is_not_fused(self) -> None:
        plain = small_graph(fuse=False)
        check_graph(plain, blocks=2, matrix_elements=MATRICES, fused=False)
        with pytest.raises(GraphError, match="could not be fused"):
            check_graph(plain, blocks=2, matrix_elements=MATRICES, fused=True)
