"""Weights outside a graph: the files that a graph names for its tensors, found without loading it."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from perturbscope.errors import CorruptBundleError
from perturbscope.inference.onnx_graph_pb2 import Attribute, Graph, Model, Node, SparseTensor, Tensor

EXTERNAL = 1
"""Value of a tensor's ``data_location`` if its values are in another file."""
_KEY = b"location"
"""Key of the file's name, without which no runtime looks for a file."""


def external_files(path: Path) -> set[str]:
    """Return the names of the files that a graph keeps tensors in, as the graph has them.

    Every place that ONNX has for a tensor is searched: initializers (sparse ones too), attributes of nodes, their
    subgraphs, functions, and the graphs of training.

    Raises
    ------
    CorruptBundleError
        The file cannot be read, or seems to name files but is no graph.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return set()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                # Most graphs hold all of their weights, hundreds of megabytes that need not be parsed.
                if content.find(_KEY) < 0:
                    return set()
                model = Model.FromString(content[:])
    except DecodeError as error:
        raise CorruptBundleError(f"{path} is not an ONNX graph: {error}.") from error
    except OSError as error:
        raise CorruptBundleError(f"{path} cannot be read: {error}.") from error
    return {
        _location(tensor) for tensor in _of_model(model) if tensor.data_location == EXTERNAL or tensor.external_data
    }


def _location(tensor: Tensor) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == _KEY.decode()), "")


def _of_model(model: Model) -> Iterator[Tensor]:
    yield from _of_graph(model.graph)
    for training in model.training_info:
        yield from _of_graph(training.initialization)
        yield from _of_graph(training.algorithm)
    for function in model.functions:
        yield from _of_nodes(function.node)
        yield from _of_attributes(function.attribute_proto)


def _of_graph(graph: Graph) -> Iterator[Tensor]:
    yield from graph.initializer
    yield from _of_sparse(graph.sparse_initializer)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[Node]) -> Iterator[Tensor]:
    for node in nodes:
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Iterable[Attribute]) -> Iterator[Tensor]:
    for item in attributes:
        yield item.t
        yield from item.tensors
        yield from _of_sparse([item.sparse_tensor, *item.sparse_tensors])
        yield from _of_graph(item.g)
        for graph in item.graphs:
            yield from _of_graph(graph)


def _of_sparse(tensors: Iterable[SparseTensor]) -> Iterator[Tensor]:
    for item in tensors:
        yield item.values
        yield item.indices
