"""Bodies that are mutated, and cells with a defect, in the form of every interface."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.protocol.arrow_ipc import KEY
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from tests.fuzz.seeds import h5ad

BOUNDARY = "perturbscopetrial"


@dataclass
class Raw:
    """Cells as a caller has them before anything checks them: CSR arrays, and everything beside them."""

    gene_ids: list[Any]
    indptr: list[int]
    indices: list[int]
    data: NDArray[Any]
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: CountMatrix) -> Raw:
        """Take good cells, with counts as float64."""
        counts = cells.counts
        ids = cells.gene_ids.tolist()
        return cls(ids, counts.indptr.tolist(), counts.indices.tolist(), counts.data.astype(np.float64))

    def json(self) -> bytes:
        """Return a body of /v1/embed."""
        cells = {"gene_ids": self.gene_ids, "indptr": self.indptr, "indices": self.indices, "data": self.data.tolist()}
        return json.dumps({"cells": cells, **self.extra}).encode()

    def arrow(self) -> bytes:
        """Return the same body in Arrow. Its lists cannot be ragged; a cell has more indices than counts instead."""
        starts = np.array(self.indptr)
        n = len(self.indices)
        lists = [self.indices[a:b] for a, b in zip(starts, np.minimum(starts[1:], n), strict=False)]
        counts = [self.data[a:b].tolist() for a, b in zip(starts, np.minimum(starts[1:], n), strict=False)]
        if starts[-1] != n and lists:
            lists[-1] = [*lists[-1], 0]
        table = pa.table({"indices": pa.array(lists, pa.list_(pa.int32())), "counts": pa.array(counts)})
        table = table.replace_schema_metadata({KEY: json.dumps({"gene_ids": self.gene_ids, **self.extra}).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue().to_pybytes())

    def proto(self) -> pb.EmbedRequest:
        """Return a message of Embed."""
        cells = pb.CountMatrix(
            gene_ids=self.gene_ids,
            indptr=np.asarray(self.indptr, "<i8").tobytes(),
            indices=np.asarray(self.indices, "<i4").tobytes(),
            data=np.asarray(self.data, "<f8").tobytes(),
            data_type=pb.COUNT_TYPE_FLOAT64,
        )
        return pb.EmbedRequest(cells=cells, **self.extra)

    def stream(self) -> list[pb.EmbedStreamRequest]:
        """Return the messages of EmbedStream."""
        message = self.proto()
        cells = pb.CellChunk(
            indptr=message.cells.indptr,
            indices=message.cells.indices,
            data=message.cells.data,
            data_type=message.cells.data_type,
        )
        start = pb.EmbedStreamStart(gene_ids=self.gene_ids, **self.extra)
        return [pb.EmbedStreamRequest(start=start), pb.EmbedStreamRequest(cells=cells)]

    def h5ad(self) -> bytes:
        """Return a file, made by changing a good one, so that no library refuses to write it."""
        ones = CountMatrix.from_matrix(np.ones((8, 2), dtype=np.int32), ["A", "B"])
        target = io.BytesIO(h5ad(ones))
        n_cells, text = len(self.indptr) - 1, h5py.string_dtype()
        with h5py.File(target, "r+") as file:
            for path, values, kind in (
                ("X/data", self.data, None),
                ("X/indices", np.array(self.indices, dtype=np.int32), None),
                ("X/indptr", np.array(self.indptr, dtype=np.int64), None),
                ("var/_index", np.array(self.gene_ids, dtype=object), text),
                ("obs/_index", np.array([f"c{i}" for i in range(n_cells)], dtype=object), text),
                ("obs/perturbation", np.resize(np.array(["control", "KO"], dtype=object), n_cells), text),
                ("obs/batch", np.resize(np.array(["a", "b"], dtype=object), n_cells), text),
                ("obsm/X_pca", np.ones((n_cells, 3)), None),
            ):
                attributes = dict(file[path].attrs)
                del file[path]
                file.create_dataset(path, data=values, dtype=kind).attrs.update(attributes)
            file["X"].attrs["shape"] = (n_cells, len(self.gene_ids))
        return target.getvalue()


def form(content: bytes, **parts: str) -> bytes:
    """Return a form with a file and other fields."""
    lines = []
    for name, value in parts.items():
        lines += [f"--{BOUNDARY}", f'content-disposition: form-data; name="{name}"', "", value]
    lines += [f"--{BOUNDARY}", 'content-disposition: form-data; name="file"; filename="cells.h5ad"', "", ""]
    return "\r\n".join(lines).encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def _at(name: str, key: int, value: Any) -> Callable[[Raw], None]:
    def spoil(cells: Raw) -> None:
        getattr(cells, name)[key] = value

    return spoil


def _empty_cell(cells: Raw) -> None:
    cells.data[: cells.indptr[1]] = 0


def _unknown(start: int) -> Callable[[Raw], None]:
    def spoil(cells: Raw) -> None:
        cells.gene_ids[start:] = [f"unknown{i}" for i in range(len(cells.gene_ids) - start)]

    return spoil


def _log(cells: Raw) -> None:
    cells.data = np.log1p(cells.data)


def _twice(cells: Raw) -> None:
    cells.gene_ids[0] = cells.gene_ids[1]


def _ragged(cells: Raw) -> None:
    cells.indptr[-1] += 1


def _many(cells: Raw) -> None:
    n = len(cells.indices)
    times = 5000 // (len(cells.indptr) - 1) + 1
    cells.indptr = [0, *(at + n * t for t in range(times) for at in cells.indptr[1:])]
    cells.indices, cells.data = cells.indices * times, np.tile(cells.data, times)


def _no_cells(cells: Raw) -> None:
    cells.indptr, cells.indices, cells.data = [0], [], np.zeros(0)


DEFECTS: dict[str, tuple[Callable[[Raw], None], set[str]]] = {
    "a negative count": (_at("data", 3, -1.0), {"not_raw_counts"}),
    "a fractional count": (_at("data", 3, 1.5), {"not_raw_counts"}),
    "a NaN": (_at("data", 3, np.nan), {"not_raw_counts"}),
    "an infinite count": (_at("data", 3, np.inf), {"not_raw_counts"}),
    "a count above 2^31": (_at("data", 3, 2.0**40), {"not_raw_counts"}),
    "log-normalised": (_log, {"not_raw_counts"}),
    "a cell without counts": (_empty_cell, {"empty_cell"}),
    "no known gene": (_unknown(0), {"unknown_genes"}),
    "2 of 40 genes known": (_unknown(2), {"unknown_genes"}),
    "a gene twice": (_twice, {"duplicate_genes"}),
    "ragged": (_ragged, {"malformed_matrix", "unreadable_file"}),
    "a column outside": (_at("indices", 0, 40), {"malformed_matrix", "unreadable_file"}),
    "a negative column": (_at("indices", 0, -1), {"malformed_matrix", "unreadable_file"}),
    "too many cells": (_many, {"limit_exceeded"}),
    "no cells": (_no_cells, {"malformed_matrix", "unreadable_file", "empty_cell"}),
    "an unknown model": (lambda cells: cells.extra.update(model="nope"), {"unknown_model"}),
}
"""Defects of the cells, and the error codes that they may get. (A file whose CSR arrays do not fit together may be
called unreadable, since its shape comes from the file and not from the caller.)"""
