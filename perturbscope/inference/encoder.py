"""The encoder, which runs a model's graph in ONNX Runtime and returns its outputs by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import CorruptBundleError, InferenceError, InvalidParameterError, ProviderUnavailableError
from perturbscope.families.outputs import CELL_EMBEDDING, OutputSpec
from perturbscope.families.tokens import InputSpec
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.gpu import (
    CUDA,
    TENSORRT,
    BoundSession,
    GpuOptions,
    Staged,
    cuda_runtime,
    providers,
)
from perturbscope.threads import usable_cores

Device = Literal["cpu", "cuda", "tensorrt"]
_PROVIDERS: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": CUDA, "tensorrt": TENSORRT}
MASK = InputSpec("attention_mask", "int64", 0, n_values=2, pad_is_a_value=True)
"""The input that every graph takes beside those of its family: 1 on tokens, 0 on padding."""
_Fed = tuple[Mapping[str, NDArray[Any]], Sequence[str]]
"""Inputs of a batch that stay where they are, and the outputs that are wanted."""
Values = Mapping[str, NDArray[np.float32]]
"""Outputs of a batch by name, float32: [batch, width] per cell, [batch, longest, width] per token."""


class Encoder(Protocol):
    """Turns padded inputs into outputs by name; it knows nothing of requests."""

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """The outputs that it can compute."""
        ...

    @property
    def provider(self) -> str:
        """Execution provider that runs the graph; empty if there is none."""
        ...

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        """Compute outputs of one batch.

        Parameters
        ----------
        inputs
            Arrays of :func:`perturbscope.families.tokens.pad`.
        outputs
            Names of the outputs that are wanted.
        """
        ...

    def close(self) -> None:
        """Free the memory; :meth:`run` fails afterwards. May be called twice."""
        ...


@runtime_checkable
class StagedEncoder(Encoder, Protocol):
    """An encoder that copies a batch to its device while another batch runs."""

    def stage(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Any:
        """Copy a batch to the device. Raises as :meth:`run`."""
        ...

    def finish(self, staged: Any) -> Values:
        """Compute the outputs of a batch from :meth:`stage`. Raises as :meth:`run`."""
        ...


class OnnxEncoder:
    """A bundle's graph in ONNX Runtime; ready once constructed.

    The graph computes all of its outputs in every pass, and only those that are asked for are copied: the option of
    ONNX Runtime that skips the others (``only_execute_path_to_fetches``) has an effect in builds for training alone.

    Parameters
    ----------
    bundle
        Opened, and so verified, bundle.
    variant
        Name of one of its graphs.
    device
        ``cpu``, ``cuda``, or ``tensorrt``, which builds an engine for the GPU at hand; CUDA runs the operators that
        TensorRT lacks. There is no silent fallback.
    threads
        CPU threads of one operator; default: the cores that this process may use.
    gpu
        Options of a GPU.

    Attributes
    ----------
    provider
        Execution provider that runs the graph.
    outputs
        Outputs of the graph that the manifest describes.

    Raises
    ------
    InvalidParameterError
        There is no such device.
    BundleError
        The bundle has no such variant.
    ProviderUnavailableError
        A GPU was asked for and ONNX Runtime could not use it.
    CorruptBundleError
        ONNX Runtime cannot load the graph, or its inputs and outputs are not those of the family and the manifest.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        variant: str = "fp32",
        device: Device = "cpu",
        threads: int | None = None,
        gpu: GpuOptions | None = None,
    ) -> None:
        import onnxruntime as ort

        from perturbscope.inference.cpu_graph import DISABLED_OPTIMIZERS, FOLDER, cpu_graph

        if device not in _PROVIDERS:
            raise InvalidParameterError(
                f"The device is {device!r}; it must be 'cpu' or 'cuda' (or 'tensorrt', opt-in).", field="device"
            )
        wanted = _PROVIDERS[device]
        if wanted not in ort.get_available_providers():
            raise ProviderUnavailableError(
                f"The device {device!r} was asked for, but this onnxruntime offers only "
                f"{', '.join(ort.get_available_providers())}. Install onnxruntime-gpu in place of onnxruntime, "
                "or choose the device 'cpu'.",
                field="device",
            )
        if device != "cpu":
            # onnxruntime-gpu[cuda,cudnn] brings the libraries as packages, outside the loader's search path.
            ort.preload_dlls()
        path = bundle.graph(variant)
        family = bundle.family()
        inputs = (MASK, *family.inputs)
        gpu = gpu or GpuOptions()
        session_providers: list[Any] = [wanted]
        if device != "cpu":
            half = variant.startswith("fp16")
            session_providers = [*providers(device, gpu, inputs=inputs, max_length=family.max_length, half=half)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.log_severity_level = 3
        try:
            if device == "cpu":
                options.add_session_config_entry(FOLDER, str(path.parent))
                self._session: Any = ort.InferenceSession(
                    cpu_graph(path), options, providers=session_providers, disabled_optimizers=[*DISABLED_OPTIMIZERS]
                )
            else:
                self._session = ort.InferenceSession(str(path), options, providers=session_providers)
        except Exception as error:
            raise CorruptBundleError(f"ONNX Runtime cannot load {path}: {error}") from error
        # A provider that is listed can still fail to load its libraries; only the session knows.
        self.provider: str = self._session.get_providers()[0]
        if self.provider != wanted:
            raise ProviderUnavailableError(
                f"The device {device!r} was asked for, but ONNX Runtime could not start {wanted} and offers "
                f"{self.provider}. Check driver, CUDA and cuDNN, or choose the device 'cpu'.",
                field="device",
            )
        self._names = {item.name for item in self._session.get_inputs()}
        self.outputs: tuple[OutputSpec, ...] = bundle.manifest.outputs
        unknown = self._names - {spec.name for spec in inputs}
        missing = {spec.name for spec in self.outputs} - {item.name for item in self._session.get_outputs()}
        if unknown or missing:
            raise CorruptBundleError(
                f"{path} is not a graph of the family {bundle.manifest.family!r}: "
                + (f"it wants the input {min(unknown)!r}." if unknown else f"it has no output {min(missing)!r}.")
            )
        self.bound: BoundSession | None = None
        """Runs the session on bound memory of a GPU; None on the CPU."""
        self._gpu = gpu
        if device != "cpu":
            self.bind("cuda", capture=gpu.cuda_graphs and device == "cuda", runtime=cuda_runtime())

    def bind(self, memory: str, *, capture: bool = False, runtime: Any = None) -> None:
        """Run on bound memory of ``cuda`` or ``cpu`` from now on; see :class:`BoundSession`."""
        self.bound = BoundSession(
            self._session,
            outputs=self.outputs,
            device=memory,
            device_id=self._gpu.device_id,
            capture=capture,
            runtime=runtime,
        )

    def close(self) -> None:
        """Free the session and the graph's memory; :meth:`run` fails afterwards. May be called twice."""
        if self.bound is not None:
            self.bound.close()
        self._session = None

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        """See :meth:`Encoder.run`.

        Raises
        ------
        InferenceError
            The forward pass failed, for instance because memory ran out.
        """
        return self.finish(self.stage(inputs, outputs))

    def stage(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Staged | _Fed:
        """Copy a batch to the device, possibly while another batch runs. Raises as :meth:`run`."""
        if self._session is None:
            raise InferenceError("The model was closed.")
        if self.bound is None:
            return inputs, outputs
        try:
            return self.bound.stage(inputs, outputs)
        except Exception as error:
            raise _failed(inputs["attention_mask"].shape, error) from error

    def finish(self, staged: Staged | _Fed) -> Values:
        """Compute the outputs of a batch from :meth:`stage`. Raises as :meth:`run`."""
        if self._session is None:
            raise InferenceError("The model was closed.")
        shape = staged.shape if isinstance(staged, Staged) else staged[0]["attention_mask"].shape
        try:
            if isinstance(staged, Staged):
                assert self.bound is not None  # noqa: S101  nobody else stages
                return self.bound.finish(staged)
            inputs, outputs = staged
            feed = {name: array for name, array in inputs.items() if name in self._names}
            found = self._session.run([*outputs], feed)
        except Exception as error:
            raise _failed(shape, error) from error
        return {name: np.asarray(values, dtype=np.float32) for name, values in zip(outputs, found, strict=True)}


def _failed(shape: tuple[int, ...], error: Exception) -> InferenceError:
    return InferenceError(f"The forward pass of a batch of {shape[0]} x {shape[1]} tokens failed: {error}")
