"""The protocol's descriptions of the server and of its models.

They are JSON objects whose names are those of the protobuf messages, so that gRPC is filled from the same objects.
"""

from __future__ import annotations

from typing import Any

from perturbscope import __version__
from perturbscope.families.outputs import OutputSpec
from perturbscope.families.tokens import InputSpec
from perturbscope.inference.encoder import MASK
from perturbscope.protocol.messages import ModelInfo
from serving.models.loading import ServedModel
from serving.openinference.tensors import PROTOCOL_NAMES
from serving.settings import Settings

EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics")
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"


def server() -> dict[str, Any]:
    """Describe the server: name, version, extensions."""
    return {"name": "perturbscope", "version": __version__, "extensions": list(EXTENSIONS)}


def metadata(model: ServedModel, served: tuple[ModelInfo, ...]) -> dict[str, Any]:
    """Describe the tensors of a model, [batch, length, ...]; -1 means any size."""
    return {
        "name": model.info.name,
        "versions": [info.version for info in served if info.name == model.info.name],
        "platform": PLATFORM,
        "inputs": [
            {"name": spec.name, "datatype": PROTOCOL_NAMES[spec.dtype], "shape": [-1, *_input_dims(spec)]}
            for spec in _inputs(model)
        ],
        "outputs": [
            {"name": spec.name, "datatype": "FP32", "shape": [-1, *_output_dims(spec)]}
            for spec in model.embedder.outputs
        ],
        "properties": _properties(model),
    }


def configuration(model: ServedModel, settings: Settings) -> dict[str, Any]:
    """Describe them in Triton's terms: without the batch axis, and with a prefix to the types."""
    return {
        "name": model.info.name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "max_batch_size": min(settings.max_cells, 2**31 - 1),
        "input": [
            {"name": spec.name, "data_type": f"TYPE_{PROTOCOL_NAMES[spec.dtype]}", "dims": _input_dims(spec)}
            for spec in _inputs(model)
        ],
        "output": [
            {"name": spec.name, "data_type": "TYPE_FP32", "dims": _output_dims(spec)} for spec in model.embedder.outputs
        ],
        "parameters": {name: {"string_value": value} for name, value in _properties(model).items()},
    }


def _properties(model: ServedModel) -> dict[str, str]:
    """Return what a client must know that makes tokens itself; ``GET /v1/models/{name}/vocabulary`` has the rest."""
    family = model.embedder.family
    return {
        "max_length": str(family.max_length),
        "vocabulary_genes": str(len(family.vocabulary.gene_ids)),
        "vocabulary_hash": model.info.vocabulary_hash,
    }


def _inputs(model: ServedModel) -> tuple[InputSpec, ...]:
    return (*model.embedder.family.inputs, MASK)


def _input_dims(spec: InputSpec) -> list[int]:
    """Return the sizes of the axes behind the batch."""
    return [*spec.trailing] if spec.per == "cell" else [-1, *spec.trailing]


def _output_dims(spec: OutputSpec) -> list[int]:
    return [spec.width] if spec.per == "cell" else [-1, spec.width]
