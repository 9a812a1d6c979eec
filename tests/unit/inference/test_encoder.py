"""ONNX Runtime behind the encoder protocol: what it computes, and how it fails."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from perturbscope.errors import (
    BundleError,
    CorruptBundleError,
    InferenceError,
    InvalidParameterError,
    ProviderUnavailableError,
)
from perturbscope.families.outputs import CELL_EMBEDDING, GENE_EMBEDDING
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.encoder import OnnxEncoder
from perturbscope.threads import usable_cores
from tests.bundles import (
    TINY_OUTPUTS,
    TINY_WIDTH,
    tiny_files,
    tiny_manifest,
    tiny_table,
)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def bundle_with(graph: bytes, path: Path) -> Bundle:
    return Bundle.write(path, tiny_manifest(), tiny_files() | {"model.onnx": graph})


def renamed(old: str, new: str) -> bytes:
    """The tiny graph with another name for one of its inputs or its output."""
    graph = onnx.load_from_string(tiny_files()["model.onnx"])
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    for value in (*graph.graph.input, *graph.graph.output):
        value.name = new if value.name == old else value.name
    return graph.SerializeToString()


def inputs(rows: list[list[int]]) -> dict[str, np.ndarray]:
    longest = max(map(len, rows))
    return {
        "input_ids": np.array([row + [0] * (longest - len(row)) for row in rows], dtype=np.int64),
        "attention_mask": np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=np.int64),
    }


def test_the_graph_computes_what_it_says(bundle):
    weights = onnx.load(bundle.graph()).graph.initializer
    table = next(numpy_helper.to_array(item) for item in weights if item.name == "table")
    values = OnnxEncoder(bundle, threads=1).run(inputs([[5, 9, 2], [7]]))[CELL_EMBEDDING]
    assert values.shape == (2, TINY_WIDTH)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [table[[5, 9, 2]].mean(axis=0), table[7]], atol=1e-6)


@pytest.mark.parametrize("memory", [None, "cpu"])
def test_several_outputs_by_name(outputs_bundle, memory):
    encoder = OnnxEncoder(Bundle.open(outputs_bundle), threads=1)
    if memory:
        encoder.bind(memory)
    assert encoder.outputs == TINY_OUTPUTS
    batch = inputs([[5, 9, 2], [7]])
    everything = encoder.run(batch, [spec.name for spec in TINY_OUTPUTS])
    table = tiny_table(len(Bundle.open(outputs_bundle).vocabulary))
    np.testing.assert_array_equal(everything[GENE_EMBEDDING], table[batch["input_ids"]])
    np.testing.assert_array_equal(everything["gene_value"], batch["input_ids"][..., None] / 2)
    np.testing.assert_array_equal(everything["cell_logits"], everything[CELL_EMBEDDING][:, :3])
    for names in (["gene_value"], ["cell_logits", CELL_EMBEDDING]):
        for _ in range(2):
            some = encoder.run(batch, names)
            assert list(some) == names
            for name in names:
                assert some[name].dtype == np.float32
                np.testing.assert_array_equal(some[name], everything[name])


def test_inputs_that_the_graph_does_not_take_are_left_out(bundle):
    batch = inputs([[5, 9]])
    values = OnnxEncoder(bundle, threads=1).run(batch | {"counts": np.ones((1, 2))})[CELL_EMBEDDING]
    np.testing.assert_array_equal(values, OnnxEncoder(bundle, threads=1).run(batch)[CELL_EMBEDDING])


def test_cpu_is_what_runs(bundle):
    assert OnnxEncoder(bundle).provider == "CPUExecutionProvider"


@pytest.mark.parametrize("offered", [True, False], ids=["listed but broken", "not listed"])
def test_cuda_asked_for_and_absent_is_an_error(bundle, monkeypatch, offered):
    """There is no quiet fallback to the CPU."""
    names = ["CPUExecutionProvider", *["CUDAExecutionProvider"] * offered]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    start = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: start(path, options, ["CPUExecutionProvider"])
    )
    with pytest.raises(ProviderUnavailableError, match=r"'cuda' was asked for.*choose the device 'cpu'") as caught:
        OnnxEncoder(bundle, device="cuda")
    assert caught.value.field == "device"


def test_a_device_that_does_not_exist(bundle):
    with pytest.raises(InvalidParameterError, match="'tpu'; it must be 'cpu' or 'cuda'"):
        OnnxEncoder(bundle, device="tpu")


def test_a_variant_that_does_not_exist(bundle):
    with pytest.raises(BundleError, match="no variant 'int4'") as caught:
        OnnxEncoder(bundle, variant="int4")
    assert not isinstance(caught.value, CorruptBundleError)


@pytest.mark.parametrize("graph", [b"", b"this is no graph", tiny_files()["model.onnx"][:-100]])
def test_a_broken_graph(tmp_path, graph):
    with pytest.raises(CorruptBundleError, match=r"cannot load .*model\.onnx"):
        OnnxEncoder(bundle_with(graph, tmp_path / "broken"))


def test_a_graph_without_the_output(tmp_path):
    with pytest.raises(CorruptBundleError, match="has no output 'cell_embedding'"):
        OnnxEncoder(bundle_with(renamed("cell_embedding", "logits"), tmp_path / "other"))


def test_a_graph_without_an_output_of_the_manifest(tmp_path):
    bundle = Bundle.write(tmp_path / "fewer", tiny_manifest(outputs=TINY_OUTPUTS), tiny_files())
    with pytest.raises(CorruptBundleError, match="it has no output 'cell_logits'"):
        OnnxEncoder(bundle)


def test_a_graph_of_another_family(tmp_path):
    with pytest.raises(CorruptBundleError, match="not a graph of the family 'rank': it wants the input 'gene_ids'"):
        OnnxEncoder(bundle_with(renamed("input_ids", "gene_ids"), tmp_path / "other"))


def test_a_forward_pass_that_fails_says_what_it_was_given(bundle):
    """A token beyond the embedding table: the graph's Gather fails."""
    with pytest.raises(InferenceError, match="forward pass of a batch of 2 x 3 tokens failed"):
        OnnxEncoder(bundle, threads=1).run(inputs([[5, 9, 10_000_000], [7]]))


def test_the_encoder_is_fine_after_a_failure(bundle):
    encoder = OnnxEncoder(bundle, threads=1)
    before = encoder.run(inputs([[5, 9]]))[CELL_EMBEDDING]
    with pytest.raises(InferenceError):
        encoder.run(inputs([[10_000_000]]))
    np.testing.assert_array_equal(encoder.run(inputs([[5, 9]]))[CELL_EMBEDDING], before)


def test_cores_are_counted_where_the_system_knows_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6
