"""Graphs as files: small ones whole, large ones with their weights in a file beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from perturbscope.inference.bundle import Variant
from perturbscope.inference.encoder import Values

EXTERNAL_FROM = 2**26
"""Bytes of weights from which they are written to a file of their own: protobuf ends at 2 GiB, and a graph with its
weights inside is in memory several times while it is loaded."""
_ALIGNED = 64
"""Bytes of whose multiples a tensor begins, so that it can be used where the file is mapped."""
_INSIDE = 1024
"""Bytes up to which a tensor stays in the graph."""
Batch = Mapping[str, NDArray[Any]]
"""Inputs of a graph by name, padded, and ``attention_mask``."""


def is_large(graph: ModelProto) -> bool:
    """Return whether the weights of a graph are written to a file of their own."""
    return sum(_size(item) for item in graph.graph.initializer) >= EXTERNAL_FROM


def write_graph(graph: ModelProto, path: Path) -> tuple[str, ...]:
    """Write a graph, and the weights of a large one to a file beside it; their values are then gone from `graph`.

    Returns
    -------
    Names of the further files.
    """
    if not is_large(graph):
        path.write_bytes(graph.SerializeToString())
        return ()
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as file:
        for item in graph.graph.initializer:
            if _size(item) >= _INSIDE and item.HasField("raw_data"):
                file.write(bytes(-file.tell() % _ALIGNED))
                place = {"location": data.name, "offset": file.tell(), "length": file.write(item.raw_data)}
                item.ClearField("raw_data")
                item.data_location = TensorProto.EXTERNAL
                for key, value in place.items():
                    item.external_data.add(key=key, value=str(value))
    path.write_bytes(graph.SerializeToString())
    return (data.name,)


def session(graph: ModelProto | Path) -> ort.InferenceSession:
    """Return a session on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source = graph.SerializeToString() if isinstance(graph, ModelProto) else str(graph)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def graph_runner(graph: ModelProto | Path) -> Callable[[Batch], Values]:
    """Return a function that computes all outputs of a graph on the CPU."""
    opened = session(graph)
    names = [item.name for item in opened.get_outputs()]
    return lambda batch: run_session(opened, batch, names)


class GraphFiles:
    """The graphs of a bundle in the making, in a folder. Of their sessions one is open at a time, the last used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data: dict[str, tuple[str, ...]] = {}
        self._open: tuple[str, ort.InferenceSession] | None = None

    def add(self, variant: str, graph: ModelProto) -> None:
        """Write a graph; its values may be gone afterwards, see :func:`write_graph`."""
        self._data[variant] = write_graph(graph, self._path(variant))

    def load(self, variant: str) -> ModelProto:
        """Read a graph with its weights; the open session is closed, so that they are not in memory twice."""
        self._open = None
        return onnx.load(self._path(variant))

    def run(self, variant: str, batch: Batch, outputs: Sequence[str]) -> Values:
        """Compute outputs of a batch, float32."""
        if self._open is None or self._open[0] != variant:
            self._open = None
            self._open = variant, session(self._path(variant))
        return run_session(self._open[1], batch, outputs)

    def described(self, variant: str, **facts: Any) -> Variant:
        """Return a variant's entry of the manifest."""
        return Variant(file=self._path(variant).name, data=self._data[variant], **facts)

    @property
    def files(self) -> dict[str, Path]:
        """All files by name."""
        names = [name for variant, data in self._data.items() for name in (self._path(variant).name, *data)]
        return {name: self._folder / name for name in names}

    def _path(self, variant: str) -> Path:
        return self._folder / ("model.onnx" if variant == "fp32" else f"model.{variant}.onnx")


def run_session(opened: ort.InferenceSession, batch: Batch, outputs: Sequence[str]) -> Values:
    """Compute outputs of a batch, float32; inputs that the graph does not take are left out."""
    taken = {item.name for item in opened.get_inputs()}
    found = opened.run([*outputs], {name: array for name, array in batch.items() if name in taken})
    return {name: np.asarray(values, dtype=np.float32) for name, values in zip(outputs, found, strict=True)}


def _size(item: TensorProto) -> int:
    """Return the bytes of a tensor's values."""
    return math.prod(item.dims) * helper.tensor_dtype_to_np_dtype(item.data_type).itemsize
