"""Arrow files of a model's values per token, written chunk by chunk, which an interrupted run continues."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.files import METADATA_KEY
from perturbscope.cells.readers import CellSource
from perturbscope.errors import InvalidParameterError, UnreadableFileError
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import OutputValues
from perturbscope.tasks.backends import Backend

if TYPE_CHECKING:
    import pyarrow as pa

_HEAD = 8
"""Bytes before the first message of an Arrow file; what follows has the form of an Arrow stream."""
GENE_BYTES = 19
"""Bytes of a token's Ensembl id and of its bound."""
_SAMPLED = 16
"""Cells whose tokens are counted to tell how large a file will be."""


class TokenFile:
    """An Arrow IPC file (Feather 2) with one row a cell, which grows by one record batch a chunk.

    Its columns are ``cell_id``; ``gene_ids``, the Ensembl id behind each token, list<string>; and the values, called as
    the output, list<fixed_size_list<float32>>. Nothing is compressed, so a reader may map it into memory. The schema's
    metadata has the model and the output as JSON under ``perturbscope``.

    Chunks that are complete in an earlier file at `path` are kept. The file can be read once :meth:`finish` has
    written its footer.

    Parameters
    ----------
    path
        The file.
    spec
        The output.
    about
        Facts about the model, for the metadata.
    sizes
        Number of cells of each chunk.

    Attributes
    ----------
    n_chunks
        Number of chunks in the file; the next one that can be appended.
    """

    def __init__(self, path: Path, spec: OutputSpec, about: Mapping[str, Any], sizes: Sequence[int]) -> None:
        import pyarrow as pa

        self.path = path
        self.spec = spec
        vectors = pa.list_(pa.list_(pa.float32(), spec.width))
        text = json.dumps({**about, "output": asdict(spec)}, sort_keys=True)
        self._schema: Any = pa.schema(
            [("cell_id", pa.string()), ("gene_ids", pa.list_(pa.string())), (spec.name, vectors)],
            metadata={METADATA_KEY: text.encode()},
        )
        kept = list(_complete(path, self._schema, sizes))
        self._sink = _Sink(path)
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        for batch in kept:
            # The bytes are there. The writer only learns their places, which it needs for the footer.
            self._writer.write_batch(batch)
        self.n_chunks = len(kept)
        self._sink.replayed()

    def append(self, cell_ids: NDArray[np.str_], values: OutputValues) -> None:
        """Append a chunk, which is on disk afterwards.

        Parameters
        ----------
        cell_ids
            Name of each cell, [n_cells].
        values
            Values of the same cells.

        Raises
        ------
        InvalidParameterError
            The disk is full.
        """
        import pyarrow as pa

        assert values.offsets is not None and values.genes is not None, "an output per cell"  # noqa: S101, PT018
        _, of_genes, of_vectors = self._schema.types
        offsets: Any = pa.array(values.offsets.astype(np.int32))
        genes: Any = pa.array(values.gene_names, pa.string()).take(values.genes)
        flat: Any = pa.array(np.ascontiguousarray(values.values).reshape(-1))
        vectors: Any = pa.FixedSizeListArray.from_arrays(flat, type=of_vectors.value_type)
        columns = [
            pa.array(cell_ids.astype(object), pa.string()),
            pa.ListArray.from_arrays(offsets, genes, type=of_genes),
            pa.ListArray.from_arrays(offsets, vectors, type=of_vectors),
        ]
        with self._disk():
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
            self._sink.flush()
        self.n_chunks += 1

    def finish(self) -> None:
        """Write the footer. Raises as :meth:`append`."""
        with self._disk():
            self._writer.close()
            self._sink.flush()
        self._sink.close()

    def close(self) -> None:
        """Close the file as it is, to be continued. May be called twice, or after :meth:`finish`."""
        self._sink.close()

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn a full disk into an error that says what to do."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InvalidParameterError(
                f"The disk is full: {self.path} has {self.n_chunks} chunks and no room for another. Free some space "
                "and run the same command again, which continues.",
                field="out",
            ) from error


class _Sink(io.RawIOBase):
    """A file for Arrow's writer. Until :meth:`replayed` the bytes that are written are there already, and skipped."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._at = 0
        self._replaying = True

    def replayed(self) -> None:
        """Drop what stands behind the bytes that were written so far; write from now on."""
        self._replaying = False
        self._file.seek(self._at)
        self._file.truncate()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if not self._replaying:
            self._file.write(data)
        self._at += size
        return size

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Bring what was written to the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()


def _complete(path: Path, schema: pa.Schema, sizes: Sequence[int]) -> Iterator[pa.RecordBatch]:
    """Yield the chunks of an unfinished file up to the first that is cut off or not as it should be."""
    import pyarrow as pa

    if not path.exists() or path.stat().st_size <= _HEAD:
        return
    with pa.memory_map(str(path)) as file:
        file.seek(_HEAD)
        try:
            reader = pa.ipc.open_stream(file)
            if not reader.schema.equals(schema, check_metadata=True):
                return
            for size in sizes:
                batch = reader.read_next_batch()
                batch.validate()
                if batch.num_rows != size:
                    return
                yield batch
        except (StopIteration, pa.ArrowInvalid, OSError):
            return


def read_gene_vectors(path: str | Path) -> Iterator[tuple[NDArray[np.object_], OutputValues]]:
    """Read the Arrow file of an output per token that ``perturbscope embed --output NAME`` wrote.

    The file is mapped into memory, so only what is used of it is read.

    Yields
    ------
    Names of the cells of a chunk, and their values.

    Raises
    ------
    UnreadableFileError
        It is no such file, or it is damaged.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            about = json.loads((reader.schema.metadata or {})[METADATA_KEY])["output"]
            spec = OutputSpec(**{**about, "names": about["names"] and tuple(about["names"])})
            for number in range(reader.num_record_batches):
                columns: list[Any] = reader.get_batch(number).columns
                cells, of_genes, of_vectors = columns
                genes = of_genes.values.dictionary_encode()
                values = of_vectors.values.values.to_numpy().reshape(-1, spec.width)
                offsets = of_vectors.offsets.to_numpy().astype(np.int64)
                places = genes.indices.to_numpy().astype(np.int32)
                yield (
                    cells.to_numpy(zero_copy_only=False),
                    OutputValues(spec, values, offsets, places, tuple(genes.dictionary.to_pylist())),
                )
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableFileError(
            f"{path} is no Arrow file of perturbscope embed, or it is damaged: {error}.", field="file"
        ) from error


def tokens_of_a_cell(source: CellSource, backend: Backend) -> float:
    """Return the mean number of tokens of a cell, from a few cells all over the source, which are embedded.

    Raises
    ------
    InvalidInputError
        One of them cannot be read or embedded.
    """
    rows = np.unique(np.linspace(0, source.n_cells - 1, _SAMPLED).astype(int)).tolist()
    found = backend.embed_stream(source.rows(row, row + 1) for row in rows)
    return float(np.mean([int(part.lengths[0]) for part in found]))


def check_room(path: Path, needed: int, there: int) -> None:
    """Refuse to begin with files that the disk has no room for.

    Parameters
    ----------
    path
        Directory of the files.
    needed, there
        Bytes of the files, and bytes of them that an earlier run has written.

    Raises
    ------
    InvalidParameterError
        There is too little free space.
    """
    free = shutil.disk_usage(path).free
    if needed - there > free:
        raise InvalidParameterError(
            f"The values of tokens take about {size_text(needed - there)}, and the disk of {path} has "
            f"{size_text(free)} free. Free some space, give an output elsewhere, or embed fewer cells at a time.",
            field="out",
        )


def size_text(n_bytes: float) -> str:
    """Return a number of bytes in words: ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if n_bytes >= 100 or unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
