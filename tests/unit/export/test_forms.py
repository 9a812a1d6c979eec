"""The form of the graph for GPUs: the same vectors on the CPU, and no nodes that a GPU cannot run."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch

from export import GraphError
from export.files import graph_runner
from export.forms import standard_attention
from export.graph import graph_facts
from export.variants import VARIANTS, half_precision
from perturbscope.families.outputs import CELL_EMBEDDING, GENE_EMBEDDING
from tests.models import TINY_MODEL, small_batch, small_example, small_graph, small_model
from training.families.rank.pooling import PooledEncoder

EAGER = dataclasses.replace(TINY_MODEL, attention="eager")


@pytest.fixture(scope="module")
def encoder() -> PooledEncoder:
    """A model whose biases and token types, zero at the start of training, matter."""
    model = small_model(EAGER)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.bert.named_parameters():
            if name.endswith("bias") or "token_type" in name:
                parameter.normal_()
    return PooledEncoder(model)


@pytest.fixture(scope="module")
def fused(encoder: PooledEncoder) -> onnx.ModelProto:
    model = small_model(EAGER)
    model.bert.embeddings.load_state_dict(encoder.embeddings.state_dict())
    for mine, other in zip(model.bert.encoder.layer, encoder.blocks, strict=False):
        mine.load_state_dict(other.state_dict())
    return small_graph(model)


@pytest.mark.parametrize("lengths", [(1,), (40,), (40, 7, 1), (3, 40)], ids=str)
def test_equals_the_torch_module(encoder: PooledEncoder, fused: onnx.ModelProto, lengths: tuple[int, ...]) -> None:
    ids, mask = small_batch(lengths=lengths)
    with torch.inference_mode():
        expected, (states, _) = encoder(ids, mask).numpy(), encoder.states(ids, mask)
    found = graph_runner(standard_attention(fused))({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    np.testing.assert_allclose(found[CELL_EMBEDDING], expected, atol=1e-5)
    is_real = mask.numpy() > 0
    np.testing.assert_allclose(found[GENE_EMBEDDING][is_real], states.numpy()[is_real], atol=1e-5)


def test_padding_changes_nothing(fused: onnx.ModelProto) -> None:
    run = graph_runner(standard_attention(fused))
    batch = small_example(lengths=(12, 7, 1))
    wide = {name: np.pad(array, ((0, 0), (0, 20))) for name, array in batch.items()}
    np.testing.assert_allclose(run(wide)[CELL_EMBEDDING], run(batch)[CELL_EMBEDDING], atol=1e-5)


def test_half_precision_is_near(fused: onnx.ModelProto) -> None:
    batch = small_example(lengths=(40, 7, 1))
    half = VARIANTS["fp16-flash"](fused)
    expected, found, other = (graph_runner(graph)(batch) for graph in (fused, half, half_precision(fused)))
    is_real = {CELL_EMBEDDING: slice(None), GENE_EMBEDDING: batch["attention_mask"] > 0}
    for name, real in is_real.items():
        near, also = (np.abs(values[name] - expected[name])[real].max() for values in (found, other))
        assert 0 < near < 3e-2
        assert near < 2 * also


def test_all_of_it_runs_on_a_gpu(fused: onnx.ModelProto) -> None:
    """No node computes shapes, which ONNX Runtime does on the CPU."""
    facts = graph_facts(standard_attention(fused))
    assert (facts.blocks, facts.fused) == (2, True)
    assert not set(facts.operators) & {"Shape", "Slice", "Gather", "Concat", "Expand", "Where", "ConstantOfShape"}
    assert facts.matrix_elements < graph_facts(fused).matrix_elements  # without the token types


def test_the_graph_that_it_is_made_from_stays_as_it_was(fused: onnx.ModelProto) -> None:
    before = fused.SerializeToString()
    made = standard_attention(fused)
    assert fused.SerializeToString() == before
    assert standard_attention(fused).SerializeToString() == made.SerializeToString()


def test_it_needs_a_fused_graph() -> None:
    with pytest.raises(GraphError, match="no fused attention"):
        standard_attention(small_graph(fuse=False))


def test_it_needs_the_bias_behind_attention(fused: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(fused)
    for node in other.graph.node:
        if node.op_type == "SkipLayerNormalization":
            del node.input[4:]
    with pytest.raises(GraphError, match="normalisation that adds its bias"):
        standard_attention(other)
