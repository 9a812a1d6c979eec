"""The default bundle gives the numbers that it gave when it was shipped."""

import json

import numpy as np
import onnx
import pytest

from perturbscope.inference.bundle import GOLDEN, Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.golden import check_golden, read_golden
from tests.golden.golden import BUNDLE, FILE, embed


@pytest.fixture(scope="module")
def golden():
    return json.loads(FILE.read_text())


def test_vectors_are_those_of_the_shipped_model(golden):
    bundle, found = embed()
    assert bundle.model_id == golden["model_id"]
    for name, result in found.items():
        assert result.lengths.tolist() == [cell["length"] for cell in golden["cells"][name]]
        expected = [cell["first_values"] for cell in golden["cells"][name]]
        np.testing.assert_allclose(result.values[:, :5], expected, atol=1e-4)


def test_the_manifest_records_parity_with_torch_and_the_data():
    bundle, _ = embed()
    parity = bundle.manifest.parity
    assert parity["max_abs_difference"] <= parity["tolerance"]
    assert parity["blocks_in_graph"] == parity["blocks_of_model"] - 1
    assert {(case["batch"], case["length"]) for case in parity["cases"]} >= {
        (batch, length) for batch in (1, 3) for length in (1, 7, 64, bundle.family().max_length)
    }
    assert bundle.manifest.training["data"]


def test_the_int8_variant_is_as_near_as_its_manifest_says():
    bundle, exact = embed()
    _, small = embed("int8")
    for name, result in small.items():
        a, b = result.values, exact[name].values
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        # The manifest has the least of 32 other cells; these are five.
        assert cosine.min() == pytest.approx(bundle.manifest.variants["int8"].cosine, abs=1e-3)
    assert bundle.manifest.variants["int8"].cosine == bundle.manifest.parity["variants"]["int8"]["lowest_cosine"]


def test_rounding_as_of_an_accelerator_is_within_its_limit_and_beyond_that_of_the_cpu(tmp_path):
    """TensorFloat-32 keeps 10 of the 23 bits of a factor; here those of the weights."""
    bundle = Bundle.open(BUNDLE)
    graph = onnx.load(bundle.graph())
    for item in graph.graph.initializer:
        weights = onnx.numpy_helper.to_array(item)
        if weights.dtype == np.float32 and weights.ndim == 2:
            rounded = ((weights.copy().view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)
            item.CopyFrom(onnx.numpy_helper.from_array(rounded, item.name))
    files = {name: BUNDLE / name for name in bundle.manifest.files} | {"model.onnx": graph.SerializeToString()}
    embedder = Embedder.from_bundle(Bundle.write(tmp_path / "rounded", bundle.manifest, files))
    golden = read_golden(bundle)
    on_cpu = check_golden(embedder, golden)
    assert not on_cpu.passed
    assert 1e-4 < on_cpu.largest_difference < 1e-2
    assert on_cpu.lowest_cosine > 1 - 1e-6
    values = embedder.infer(golden.tokenize(embedder))
    assert golden.compare(values, variant="fp32", provider="CUDAExecutionProvider").passed


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_the_bundle_proves_itself(variant):
    bundle = Bundle.open(BUNDLE)
    golden = read_golden(bundle)
    result = check_golden(Embedder.from_bundle(bundle, variant=variant), golden)
    result.require(bundle.model_id)
    assert result.n_cells == 5
    assert "3 real cells" in golden.source
    assert (BUNDLE / GOLDEN).stat().st_size < 100_000
