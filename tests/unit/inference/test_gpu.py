"""The parts that run graphs on a GPU, as far as a CPU can test them: bound memory, provider options, locked memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InferenceError, InvalidParameterError, ProviderUnavailableError
from perturbscope.families.outputs import CELL_EMBEDDING
from perturbscope.families.tokens import InputSpec
from perturbscope.inference import gpu
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import MASK, OnnxEncoder
from perturbscope.inference.gpu import GpuOptions, PinnedBuffer, providers
from tests.bundles import TINY_OUTPUTS, TINY_WIDTH

INPUTS = (MASK, InputSpec("input_ids", "int64", 0))


@pytest.fixture
def encoder(tiny_bundle: Path) -> OnnxEncoder:
    return bound_encoder(tiny_bundle)


def bound_encoder(bundle: Path, *, capture: bool = False) -> OnnxEncoder:
    """An encoder on the CPU that goes the way of a GPU."""
    encoder = OnnxEncoder(Bundle.open(bundle), threads=1)
    encoder.bind("cpu", capture=capture)
    return encoder


def batch(n_cells: int, length: int, *, seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(1, length, size=n_cells, endpoint=True)[:, None]
    return {"input_ids": rng.integers(2, 30, mask.shape) * mask, "attention_mask": mask.astype(np.int64)}


def vectors(encoder: OnnxEncoder, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    return encoder.run(inputs)[CELL_EMBEDDING]


# Bound memory


def test_bound_memory_changes_no_vector(encoder: OnnxEncoder, tiny_bundle: Path) -> None:
    plain = OnnxEncoder(Bundle.open(tiny_bundle), threads=1)
    for seed, shape in enumerate([(3, 7), (1, 1), (3, 7), (8, 20), (3, 7)]):
        inputs = batch(*shape, seed=seed)
        values = vectors(encoder, inputs)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, vectors(plain, inputs))


def test_a_staged_batch_is_not_touched_by_the_next(encoder: OnnxEncoder) -> None:
    one, other = batch(2, 5, seed=1), batch(2, 5, seed=2)
    expected = [vectors(encoder, one), vectors(encoder, other)]
    staged = [encoder.stage(one), encoder.stage(other)]
    one["input_ids"][:] = 2
    found = [encoder.finish(item)[CELL_EMBEDDING] for item in staged]
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found[0], found[1])


def test_a_result_is_not_overwritten_by_the_next_batch(encoder: OnnxEncoder) -> None:
    first = vectors(encoder, batch(2, 5, seed=1))
    kept = first.copy()
    encoder.run(batch(2, 5, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_buffers_are_made_once_a_shape(encoder: OnnxEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    make = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def counted(shape: list[int], *rest: Any) -> Any:
        made.append(tuple(shape))
        return make(shape, *rest)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", counted)
    for seed in range(4):
        encoder.run(batch(3, 6, seed=seed))
    assert sorted(made) == [(3, 6), (3, 6), (3, TINY_WIDTH)]


def test_only_so_many_shapes_are_kept(encoder: OnnxEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_MAX_KEPT", 2)
    assert encoder.bound is not None
    for length in (3, 4, 5, 3):
        encoder.run(batch(1, length))
    assert list(encoder.bound._free) == [(1, 5, CELL_EMBEDDING), (1, 3, CELL_EMBEDDING)]


def test_each_choice_of_outputs_has_its_own_buffers(outputs_bundle: Path) -> None:
    encoder = bound_encoder(outputs_bundle)
    names = [spec.name for spec in TINY_OUTPUTS]
    inputs = batch(2, 5)
    staged = [encoder.stage(inputs, chosen) for chosen in (names[:1], names[1:2], names)]
    found = [encoder.finish(item) for item in staged]
    assert [list(values) for values in found] == [names[:1], names[1:2], names]
    np.testing.assert_array_equal(found[0][CELL_EMBEDDING], found[2][CELL_EMBEDDING])
    np.testing.assert_array_equal(found[1]["gene_embedding"], found[2]["gene_embedding"])
    assert found[2]["gene_embedding"].shape == (2, 5, TINY_WIDTH)
    assert encoder.bound is not None
    assert list(encoder.bound._free) == [(2, 5, *names[:1]), (2, 5, *names[1:2]), (2, 5, *names)]


def test_shapes_of_inputs_per_cell_have_no_length() -> None:
    inputs = (*INPUTS, InputSpec("label", "int64", 0, per="cell"), InputSpec("depth", "float32", 0, (3,), per="cell"))
    (_, options), _ = providers("tensorrt", GpuOptions(), inputs=inputs, max_length=512, half=False)
    assert options["trt_profile_max_shapes"] == "attention_mask:32x512,input_ids:32x512,label:32,depth:32x3"


def test_one_thread_stages_while_another_runs(encoder: OnnxEncoder, tiny_bundle: Path) -> None:
    plain = OnnxEncoder(Bundle.open(tiny_bundle), threads=1)
    batches = [batch(1 + seed % 3, 2 + seed % 5, seed=seed) for seed in range(60)]
    found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(batches)

    def every_second(start: int) -> None:
        for at in range(start, len(batches), 2):
            found[at] = encoder.finish(encoder.stage(batches[at]))[CELL_EMBEDDING]

    threads = [threading.Thread(target=every_second, args=(start,)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for values, inputs in zip(found, batches, strict=True):
        np.testing.assert_array_equal(values, vectors(plain, inputs))


def test_the_embedder_goes_the_same_way(tiny_bundle: Path, tiny_cells: CountMatrix) -> None:
    embedder = Embedder.from_bundle(Bundle.open(tiny_bundle), threads=1)
    expected = embedder.embed(tiny_cells).values
    embedder.encoder = bound_encoder(tiny_bundle)
    embedder.limits = gpu.gpu_limits("cuda", embedder.family.max_length, max_tokens=400)
    for overlap in (False, True):
        embedder.overlap = overlap
        np.testing.assert_allclose(embedder.embed(tiny_cells).values, expected, atol=1e-6, rtol=0)


def test_a_failing_pass_says_what_it_was_given(encoder: OnnxEncoder) -> None:
    bad = batch(2, 3)
    bad["input_ids"][0, 0] = 10_000_000
    with pytest.raises(InferenceError, match="forward pass of a batch of 2 x 3 tokens failed"):
        encoder.run(bad)
    assert vectors(encoder, batch(2, 3)).shape == (2, TINY_WIDTH)


def test_a_closed_model(encoder: OnnxEncoder) -> None:
    staged = encoder.stage(batch(1, 2))
    encoder.close()
    encoder.close()
    with pytest.raises(InferenceError, match="was closed"):
        encoder.run(batch(1, 2))
    with pytest.raises(InferenceError, match="was closed"):
        encoder.finish(staged)


def test_graphs_are_captured_for_shapes_that_come_often(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU captures nothing, but is asked to in the same way."""
    asked: list[str] = []
    add = onnxruntime.RunOptions.add_run_config_entry

    class Options(onnxruntime.RunOptions):  # type: ignore[misc]
        def add_run_config_entry(self, key: str, value: str) -> None:
            asked.append(value)
            add(self, key, value)

    monkeypatch.setattr(onnxruntime, "RunOptions", Options)
    encoder = bound_encoder(tiny_bundle, capture=True)
    assert encoder.bound is not None
    for _ in range(gpu._CAPTURE_AFTER + 2):
        encoder.run(batch(2, 4))
    encoder.run(batch(1, 4))
    assert asked == ["-1"] * gpu._CAPTURE_AFTER + ["1", "1", "-1"]
    assert encoder.bound.captured == 1


# Provider options


def test_cuda_keeps_float32_as_it_is() -> None:
    ((name, options),) = providers("cuda", GpuOptions(), inputs=INPUTS, max_length=512, half=False)
    assert name == "CUDAExecutionProvider"
    assert options["use_tf32"] == "0"
    assert options["enable_cuda_graph"] == "0"
    assert "gpu_mem_limit" not in options


def test_options_of_the_user() -> None:
    chosen = GpuOptions(device_id=1, memory=2**30, cuda_graphs=True)
    ((_, options),) = providers("cuda", chosen, inputs=INPUTS, max_length=512, half=False)
    assert (options["device_id"], options["gpu_mem_limit"], options["enable_cuda_graph"]) == ("1", str(2**30), "1")


def test_tensorrt_gets_shapes_and_a_place_for_its_engines(tmp_path: Path) -> None:
    chosen = GpuOptions(engine_cache=tmp_path / "engines")
    (name, options), (second, _) = providers("tensorrt", chosen, inputs=INPUTS, max_length=512, half=True)
    assert (name, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert options["trt_profile_min_shapes"] == "attention_mask:1x1,input_ids:1x1"
    assert options["trt_profile_max_shapes"] == "attention_mask:32x512,input_ids:32x512"
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_engine_cache_path"] == str(tmp_path / "engines")
    assert (tmp_path / "engines").is_dir()
    limits = gpu.gpu_limits("tensorrt", 512)
    assert all(limits.capacity(length) <= 32 for length in (1, 100, 512))


def test_options_that_make_no_sense() -> None:
    with pytest.raises(InvalidParameterError, match="device_id is -1"):
        GpuOptions(device_id=-1)
    with pytest.raises(InvalidParameterError, match="memory is -1") as caught:
        GpuOptions(memory=-1)
    assert caught.value.field == "memory"


def test_tensorrt_asked_for_and_absent_is_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(ProviderUnavailableError, match=r"'tensorrt' was asked for.*choose the device 'cpu'") as caught:
        OnnxEncoder(Bundle.open(tiny_bundle), device="tensorrt")
    assert caught.value.field == "device"


# Page-locked memory


class Runtime:
    """A CUDA runtime that counts."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: Any, size: Any, flags: Any) -> int:  # noqa: N802  CUDA's name
        assert flags.value == 0
        if self.refuses:
            return 1
        self.locked[address.value] = size.value
        return 0

    def cudaHostUnregister(self, address: Any) -> int:  # noqa: N802  CUDA's name
        del self.locked[address.value]
        return 0


def test_a_buffer_grows_and_is_locked() -> None:
    runtime = Runtime()
    buffer = PinnedBuffer(runtime)
    for n in (10, 3, 1000):
        array = np.arange(n, dtype=np.int64).reshape(-1, 1)
        np.testing.assert_array_equal(buffer.holding(array), array)
        assert buffer.locked
        assert len(runtime.locked) == 1
        assert sum(runtime.locked.values()) >= array.nbytes
    buffer.free()
    buffer.free()
    assert not runtime.locked


def test_a_buffer_that_nobody_freed_is_unlocked_before_its_memory_goes() -> None:
    runtime = Runtime()
    buffer = PinnedBuffer(runtime)
    buffer.holding(np.arange(5))
    assert runtime.locked
    del buffer
    assert not runtime.locked


def test_memory_that_cannot_be_locked_still_holds(encoder: OnnxEncoder) -> None:
    for runtime in (None, Runtime(refuses=True)):
        buffer = PinnedBuffer(runtime)
        np.testing.assert_array_equal(buffer.holding(np.arange(5)), np.arange(5))
        assert not buffer.locked
        buffer.free()
    assert encoder.bound is not None
    assert not any(buffer.locked for buffer in encoder.bound._host.values())
