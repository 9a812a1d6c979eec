"""The protocol's descriptions of the server and of its models.

They are JSON objects whose names are those of the protobuf messages, so that gRPC is filled from the same objects.
"""

from __future__ import annotations

from typing import Any

from perturbscope import __version__
from perturbscope.families.tokens import InputSpec
from perturbscope.inference.encoder import OUTPUT
from perturbscope.protocol.messages import ModelInfo
from serving.models.loading import ServedModel
from serving.openinference.tensors import MASK, PROTOCOL_NAMES
from serving.settings import Settings

EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics")
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"


def server() -> dict[str, Any]:
    """Describe the server: name, version, extensions."""
    return {"name": "perturbscope", "version": __version__, "extensions": list(EXTENSIONS)}


def metadata(model: ServedModel, served: tuple[ModelInfo, ...]) -> dict[str, Any]:
    """Describe the tensors of a model, [batch, length, ...] and [batch, width]; -1 means any size."""
    return {
        "name": model.info.name,
        "versions": [info.version for info in served if info.name == model.info.name],
        "platform": PLATFORM,
        "inputs": [
            {"name": spec.name, "datatype": PROTOCOL_NAMES[spec.dtype], "shape": [-1, -1, *spec.trailing]}
            for spec in _inputs(model)
        ],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, model.embedder.width]}],
    }


def configuration(model: ServedModel, settings: Settings) -> dict[str, Any]:
    """Describe them in Triton's terms: without the batch axis, and with a prefix to the types."""
    return {
        "name": model.info.name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "max_batch_size": min(settings.max_cells, 2**31 - 1),
        "input": [
            {"name": spec.name, "data_type": f"TYPE_{PROTOCOL_NAMES[spec.dtype]}", "dims": [-1, *spec.trailing]}
            for spec in _inputs(model)
        ],
        "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [model.embedder.width]}],
    }


def _inputs(model: ServedModel) -> tuple[InputSpec, ...]:
    return (*model.embedder.family.inputs, InputSpec(MASK, "int64", 0, n_values=2))
