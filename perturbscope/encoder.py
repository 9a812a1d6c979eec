"""Running a model's graph."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from perturbscope.bundle import Bundle
from perturbscope.errors import CorruptBundleError, InferenceError, InvalidParameterError, ProviderUnavailableError

Device = Literal["cpu", "cuda"]
_PROVIDERS: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OUTPUT = "cell_embedding"
"""Name of the graph output, float32 [batch, width]."""


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not tell (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Encoder(Protocol):
    """Padded inputs in, one vector a cell out. Knows nothing of requests."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Embed one batch.

        Parameters
        ----------
        inputs
            What :func:`perturbscope.families.pad` returns; each [batch, longest, ...].

        Returns
        -------
        float32 [batch, width].
        """
        ...


class OnnxEncoder:
    """A bundle's graph in ONNX Runtime; ready once constructed.

    Parameters
    ----------
    bundle
        An opened (so verified) bundle.
    variant
        Which of its graphs.
    device
        ``cpu`` or ``cuda``. There is no silent fallback.
    threads
        CPU threads of one operator; default: the cores that this process may use.

    Raises
    ------
    InvalidParameterError
        No such device.
    BundleError
        The bundle has no such variant.
    ProviderUnavailableError
        CUDA was asked for and ONNX Runtime could not use it.
    CorruptBundleError
        ONNX Runtime cannot load the graph, or its inputs and output are not those of the family.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        variant: str = "fp32",
        device: Device = "cpu",
        threads: int | None = None,
    ) -> None:
        import onnxruntime as ort

        if device not in _PROVIDERS:
            raise InvalidParameterError(f"The device is {device!r}; it must be 'cpu' or 'cuda'.", field="device")
        wanted = _PROVIDERS[device]
        if wanted not in ort.get_available_providers():
            raise ProviderUnavailableError(
                f"The device {device!r} was asked for, but this onnxruntime offers only "
                f"{', '.join(ort.get_available_providers())}. Install onnxruntime-gpu in place of onnxruntime, "
                "or choose the device 'cpu'.",
                field="device",
            )
        if device == "cuda":
            # onnxruntime-gpu[cuda,cudnn] brings the libraries as packages, outside the loader's search path.
            ort.preload_dlls()
        path = bundle.graph(variant)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.log_severity_level = 3
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers=[wanted])
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
        strange = self._names - {"attention_mask", *(spec.name for spec in bundle.family().inputs)}
        if strange or OUTPUT not in {item.name for item in self._session.get_outputs()}:
            raise CorruptBundleError(
                f"{path} is not a graph of the family {bundle.manifest.family!r}: "
                + (f"it wants the input {min(strange)!r}." if strange else f"it has no output {OUTPUT!r}.")
            )

    def close(self) -> None:
        """Free the session, and with it the graph's memory; :meth:`run` fails from then on. May be called twice."""
        self._session = None

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See :meth:`Encoder.run`.

        Raises
        ------
        InferenceError
            The forward pass failed, for instance for want of memory.
        """
        if self._session is None:
            raise InferenceError("The model was closed.")
        feed = {name: array for name, array in inputs.items() if name in self._names}
        try:
            (output,) = self._session.run([OUTPUT], feed)
        except Exception as error:
            shape = inputs["attention_mask"].shape
            raise InferenceError(
                f"The forward pass of a batch of {shape[0]} x {shape[1]} tokens failed: {error}"
            ) from error
        return np.asarray(output, dtype=np.float32)
