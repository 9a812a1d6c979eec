"""Graphs on an NVIDIA GPU: execution providers with their options, and memory that stays in place.

Nothing here falls back to the CPU: a GPU that was asked for and cannot be used is an error, see
:class:`perturbscope.inference.encoder.OnnxEncoder`.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError
from perturbscope.families.outputs import OutputSpec
from perturbscope.families.tokens import InputSpec
from perturbscope.inference.batching import BatchLimits, Buckets

CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
MAX_TOKENS = 65_536
"""Padded tokens of a batch, enough to keep a GPU busy for longer than the processor needs to launch its kernels."""
_TENSORRT_CELLS = 32
"""Cells of a batch in TensorRT, whose engine reserves memory for this many of the longest cells."""
_CAPTURE_AFTER = 3
"""Batches in the same buffers before a graph of their shape is captured."""
_CAPTURING = 3
"""Batches after that during which nothing else may use the GPU; ONNX Runtime captures during the first."""
_MAX_CAPTURED = 64
"""Most graphs that are captured; each keeps its memory until the session ends."""
_MAX_KEPT = 64
"""Most shapes whose buffers are kept."""
_Shape = tuple[int | str, ...]
"""Numbers of cells and tokens of a batch, and names of the outputs that it computes."""
_NUMPY: Final[dict[str, type[np.generic]]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """Options of a GPU.

    Raises
    ------
    InvalidParameterError
        A number is negative.
    """

    device_id: int = 0
    """Number of the GPU among those that the process sees."""
    memory: int = 0
    """Bytes that ONNX Runtime may take for its arena; 0: all that there are."""
    cuda_graphs: bool = False
    """Capture the kernels of frequent shapes and launch them as one graph; all operators must run on the GPU."""
    engine_cache: Path | None = None
    """Directory for TensorRT's engines, which take minutes to build; None: they are not kept."""

    def __post_init__(self) -> None:
        for name in ("device_id", "memory"):
            if getattr(self, name) < 0:
                raise InvalidParameterError(f"{name} is {getattr(self, name)}; it must not be negative.", field=name)


def gpu_limits(device: str, max_length: int, *, max_tokens: int = MAX_TOKENS) -> BatchLimits:
    """Return the budget of a batch on a GPU, and the shapes that it is padded up to.

    Parameters
    ----------
    device
        ``cuda`` or ``tensorrt``.
    max_length
        Number of tokens of the longest cell, and of positions of the model.
    max_tokens
        Padded tokens of a batch. Attention has no budget of its own: its scores are never stored.
    """
    return BatchLimits(
        max_tokens=max_tokens,
        max_attention=max(max_tokens, max_length) * max_length,
        max_cells=_TENSORRT_CELLS if device == "tensorrt" else 512,
        buckets=Buckets().up_to(max_length),
    )


def providers(
    device: str, options: GpuOptions, *, inputs: Sequence[InputSpec], max_length: int, half: bool
) -> list[tuple[str, dict[str, str]]]:
    """Return the execution providers of a device with their options, in ONNX Runtime's form.

    Parameters
    ----------
    device
        ``cuda``; or ``tensorrt``, with CUDA for the operators that TensorRT lacks.
    options
        Options of the GPU.
    inputs
        The graph's inputs, the mask among them.
    max_length
        Number of tokens of the longest cell.
    half
        Whether the graph computes in float16.
    """
    cuda = {
        "device_id": str(options.device_id),
        # Shapes repeat (see Buckets), so the arena need not grow by powers of two: it asks for what a shape needs.
        "arena_extend_strategy": "kSameAsRequested",
        # float32 means float32: TensorFloat-32 would keep 10 bits of a weight, and miss a bundle's golden vectors.
        "use_tf32": "0",
        "enable_cuda_graph": str(int(options.cuda_graphs and device == "cuda")),
    }
    if options.memory:
        cuda["gpu_mem_limit"] = str(options.memory)
    if device == "cuda":
        return [(CUDA, cuda)]

    def shapes(n_cells: int, length: int) -> str:
        of_tokens = {"token": (n_cells, length), "cell": (n_cells,)}
        return ",".join(f"{spec.name}:{'x'.join(map(str, (*of_tokens[spec.per], *spec.trailing)))}" for spec in inputs)

    tensorrt = {
        "device_id": str(options.device_id),
        "trt_fp16_enable": str(int(half)),
        "trt_profile_min_shapes": shapes(1, 1),
        "trt_profile_opt_shapes": shapes(_TENSORRT_CELLS, max(max_length // 2, 1)),
        "trt_profile_max_shapes": shapes(_TENSORRT_CELLS, max_length),
        "trt_cuda_graph_enable": str(int(options.cuda_graphs)),
    }
    if options.engine_cache is not None:
        options.engine_cache.mkdir(parents=True, exist_ok=True)
        tensorrt |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(options.engine_cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(options.engine_cache),
        }
    return [(TENSORRT, tensorrt), (CUDA, cuda)]


class PinnedBuffer:
    """Host memory that a GPU reads without the driver's copy, grown to the largest array that passed through it.

    Pages are locked by the CUDA runtime that ONNX Runtime has loaded. If it refuses, because the process may not lock
    memory, the buffer is ordinary memory and :attr:`locked` is False: copies are slower, results the same.

    Parameters
    ----------
    runtime
        The CUDA runtime library; None: ordinary memory.
    """

    def __init__(self, runtime: Any = None) -> None:
        self._runtime = runtime
        self._bytes: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._unlock: Any = None
        self.locked = False

    def holding(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a copy of `array` in the buffer; the next call overwrites it."""
        if array.nbytes > len(self._bytes):
            self.free()
            self._bytes = np.empty(max(array.nbytes, 2 * len(self._bytes)), dtype=np.uint8)
            if self._runtime is not None:
                address, size = ctypes.c_void_p(self._bytes.ctypes.data), ctypes.c_size_t(len(self._bytes))
                self.locked = self._runtime.cudaHostRegister(address, size, ctypes.c_uint(0)) == 0
                if self.locked:
                    # Memory that is freed while it is locked would be copied from wherever it was.
                    self._unlock = weakref.finalize(self, self._runtime.cudaHostUnregister, address)
        copy = self._bytes[: array.nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(copy, array)
        return copy

    def free(self) -> None:
        """Unlock the pages. May be called twice."""
        if self.locked:
            self._unlock()
            self.locked = False


def cuda_runtime() -> Any:
    """Return the CUDA runtime library that this process has loaded, or None."""
    for name in ("libcudart.so.13", "libcudart.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@dataclass(eq=False)
class Staged:
    """A batch whose inputs are on the device.

    Attributes
    ----------
    shape
        Numbers of cells and tokens.
    binding
        Inputs and outputs, bound to their memory.
    inputs
        Inputs by name, on the device.
    outputs
        Outputs by name, float32 [batch, width] or per token [batch, length, width], on the device.
    runs
        Number of batches that ran in this memory.
    graph
        Number of the graph that was captured in this memory; -1: none.
    """

    shape: tuple[int, int]
    binding: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    runs: int = 0
    graph: int = -1


class BoundSession:
    """A session on memory of the device that stays in place: buffers are kept for each shape and choice of outputs.

    :meth:`stage` may be called by one thread while another is in :meth:`finish`.

    Parameters
    ----------
    session
        Session of ONNX Runtime.
    outputs
        Outputs of the graph.
    device
        ``cuda``, or ``cpu`` (which works but is not faster).
    device_id
        Number of the device.
    capture
        Whether the session was made with ``enable_cuda_graph``.
    runtime
        CUDA runtime for page-locked memory, see :class:`PinnedBuffer`.
    """

    def __init__(
        self,
        session: Any,
        *,
        outputs: Sequence[OutputSpec],
        device: str,
        device_id: int = 0,
        capture: bool = False,
        runtime: Any = None,
    ) -> None:
        self._session = session
        self._outputs = {spec.name: spec for spec in outputs}
        self._device = device
        self._device_id = device_id
        self._capture = capture
        self._types = {item.name: _NUMPY[item.type] for item in session.get_inputs()}
        self._host = {name: PinnedBuffer(runtime) for name in self._types}
        self._free: OrderedDict[_Shape, list[Staged]] = OrderedDict()
        self._captured = 0
        self._lock = threading.RLock()

    @property
    def captured(self) -> int:
        """Number of graphs that were captured."""
        return self._captured

    def stage(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Staged:
        """Copy a batch to the device, to compute some outputs of it; `inputs` may be changed afterwards."""
        arrays = {name: np.asarray(inputs[name], dtype=dtype) for name, dtype in self._types.items()}
        n_cells, length = inputs["attention_mask"].shape
        with self._lock:
            kept = self._free.get((n_cells, length, *outputs))
            staged = kept.pop() if kept else self._allocate((n_cells, length), arrays, outputs)
            for name, value in staged.inputs.items():
                value.update_inplace(self._host[name].holding(arrays[name]))
        return staged

    def finish(self, staged: Staged) -> dict[str, NDArray[np.float32]]:
        """Run a staged batch once; returns its outputs by name on the host, float32."""
        options = self._options(staged)
        # While a graph is captured, a copy by another thread would spoil it.
        capturing = staged.graph > 0 and staged.runs <= _CAPTURE_AFTER + _CAPTURING
        with self._lock if capturing else nullcontext():
            self._session.run_with_iobinding(staged.binding, options)
            values = {name: np.array(value.numpy(), dtype=np.float32) for name, value in staged.outputs.items()}
        with self._lock:
            self._give(staged)
        return values

    def close(self) -> None:
        """Free the buffers. May be called twice."""
        with self._lock:
            for buffer in self._host.values():
                buffer.free()
            self._free.clear()
            self._session = None

    def _options(self, staged: Staged) -> Any:
        """Return the options of a run, which name the graph that it captures or replays, if any."""
        import onnxruntime as ort

        if not self._capture:
            return None
        staged.runs += 1
        if staged.graph < 0 and staged.runs > _CAPTURE_AFTER and self._captured < _MAX_CAPTURED:
            self._captured += 1
            staged.graph = self._captured  # from 1: 0 is ONNX Runtime's own
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(staged.graph))
        return options

    def _give(self, staged: Staged) -> None:
        """Keep buffers for the next batch of their shape; drop those of the least recent shape."""
        key: _Shape = (*staged.shape, *staged.outputs)
        self._free.setdefault(key, []).append(staged)
        self._free.move_to_end(key)
        while len(self._free) > _MAX_KEPT:
            self._free.popitem(last=False)

    def _allocate(self, shape: tuple[int, int], arrays: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Staged:
        import onnxruntime as ort

        def empty(dims: tuple[int, ...], dtype: Any) -> Any:
            return ort.OrtValue.ortvalue_from_shape_and_type(list(dims), dtype, self._device, self._device_id)

        binding = self._session.io_binding()
        inputs = {name: empty(array.shape, array.dtype) for name, array in arrays.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        dims = {"cell": shape[:1], "token": shape}
        bound = {
            name: empty((*dims[spec.per], spec.width), np.float32)
            for name, spec in ((name, self._outputs[name]) for name in outputs)
        }
        for name, value in bound.items():
            binding.bind_ortvalue_output(name, value)
        return Staged(shape, binding, inputs, bound)
