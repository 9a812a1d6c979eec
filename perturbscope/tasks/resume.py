"""Runs of embedding that survive an interruption: finished chunks stay on disk until the output is complete."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.files import atomic, write_json
from perturbscope.cells.genes import GeneCoverage
from perturbscope.cells.readers import CellSource
from perturbscope.errors import BundleError, InvalidParameterError, UnreadableFileError
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import Embeddings, OutputValues, gather
from perturbscope.tasks.backends import Backend, CellProgress, StageProgress, count_stage, embed_parts
from perturbscope.tasks.token_files import TokenFile

CHUNK_CELLS = 512
"""Cells of one chunk, the most that an interruption can lose; enough to sort cells by length."""
FORMAT = 1
_STATE = "state.json"
_MODEL = "model.json"
_VALUES = "values.f32"
_SAMPLES = 64
_SAMPLE_BYTES = 2**20


def fingerprint(path: Path) -> str:
    """Return a digest that changes when a file or directory does.

    It covers names, sizes, times of change and content: all of it up to 64 MiB, 64 evenly spaced MiB of larger files.
    """
    digest = hashlib.sha256()
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    for file in files:
        facts = file.stat()
        name = str(file.relative_to(path)) if path.is_dir() else ""
        digest.update(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
        with file.open("rb") as content:
            step = max(_SAMPLE_BYTES, facts.st_size // _SAMPLES)
            for start in range(0, facts.st_size, step):
                content.seek(start)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class PartialRun:
    """The directory ``<OUT>.partial`` of one run of embed.

    Parameters
    ----------
    path
        The directory.
    identity
        Model, input and options, as JSON. Chunks of another identity are discarded.
    notice
        Called with a sentence about the chunks of an earlier run, if there are any.
    outputs
        Outputs beside the cell embedding that are wanted. Their values per token go to :meth:`token_file`.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        notice: Callable[[str], None],
        outputs: Sequence[OutputSpec] = (),
    ) -> None:
        self.path = path
        self.outputs = tuple(outputs)
        self._per_cell = [spec for spec in outputs if spec.per == "cell"]
        self._per_token = [spec for spec in outputs if spec.per == "token"]
        self._identity = {"format": FORMAT, **identity, **_identity_of(self.outputs)}
        self._notice = notice

    @property
    def staging(self) -> Path:
        """Path at which the output is written, before it is moved to its name."""
        return self.path / "out.h5ad"

    def token_file(self, name: str) -> Path:
        """Path at which the Arrow file of an output per token is written; see :class:`TokenFile`."""
        return self.path / f"{name}.arrow"

    def written(self) -> int:
        """Return the bytes of values per token that an earlier run has left."""
        files = [self.token_file(spec.name) for spec in self._per_token]
        return sum(file.stat().st_size for file in files if file.exists())

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the directory; removed after success, left in place after an error or a kill if it holds chunks.

        Raises
        ------
        InvalidParameterError
            Another process holds the directory.
        """
        self.path.mkdir(exist_ok=True)
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InvalidParameterError(
                    f"Another process is writing to {self.path}. Wait for it, or give another output.", field="out"
                ) from error
            self._prepare()
            try:
                yield
            except BaseException:
                if not self._chunks():
                    shutil.rmtree(self.path)
                raise
            shutil.rmtree(self.path)
        finally:
            os.close(lock)

    def _chunks(self) -> list[Path]:
        return sorted(self.path.glob("chunk-*.npy"))

    def _prepare(self) -> None:
        """Keep the chunks of an earlier run if they have the identity of this one."""
        state = self.path / _STATE
        earlier = _read_json(state)
        chunks = self._chunks()
        if chunks and earlier != self._identity:
            keys = {*self._identity, *(earlier or {})}
            changed = sorted(key for key in keys if (earlier or {}).get(key) != self._identity.get(key))
            self._notice(
                f"The {len(chunks)} chunks in {self.path} were made with another {', '.join(changed)}; "
                "they are discarded."
            )
        elif chunks:
            self._notice(f"Continuing an interrupted run: {len(chunks)} chunks are in {self.path}.")
        if earlier != self._identity:
            for item in [*chunks, self.path / _MODEL, *self.path.glob("*.arrow")]:
                item.unlink(missing_ok=True)
            write_json(state, self._identity)

    def embed(self, source: CellSource, backend: Backend, *, progress: StageProgress | None = None) -> Embeddings:
        """Embed all cells of which no finished chunk exists.

        Neither the counts nor the vectors are ever all in memory: the vectors returned are mapped from a file in the
        directory, and vanish with it.

        Raises
        ------
        BundleError
            The chunks were made with another model: a server has changed it meanwhile.
        InvalidParameterError
            The disk is full.
        """
        advance = count_stage("embed", source.n_cells, progress)
        starts = range(0, source.n_cells, source.chunk_cells)
        sizes = [self._n_cells(source, start) for start in starts]
        with ExitStack() as opened:
            files = {
                spec.name: opened.enter_context(TokenFile(self.token_file(spec.name), spec, self._about(), sizes))
                for spec in self._per_token
            }
            whole = min((file.n_chunks for file in files.values()), default=len(sizes))
            todo = [number for number, size in enumerate(sizes) if number >= whole or self._load(number, size) is None]
            if advance:
                advance(source.n_cells - sum(sizes[number] for number in todo))
            for run in _runs(todo):
                chunks = (source.rows(starts[number], starts[number] + source.chunk_cells) for number in run)
                for number, found in zip(run, self._found(backend, chunks, advance), strict=True):
                    self._check_model(found)
                    for name, file in files.items():
                        # Of a chunk whose values per cell are damaged, those per token may be there.
                        if number == file.n_chunks:
                            rows = slice(starts[number], starts[number] + sizes[number])
                            file.append(source.cell_ids[rows], found.outputs[name])
                    self._save(number, found)
            for file in files.values():
                file.finish()
        parts = (self._result(number, source, start) for number, start in enumerate(starts))
        width = self._result(0, source, 0).values.shape[1]
        values = _mapped(self.path / _VALUES, source.n_cells, width)
        others = {
            spec.name: _mapped(self.path / f"{spec.name}.f32", source.n_cells, spec.width) for spec in self._per_cell
        }
        return gather(parts, source.n_cells, values, others)

    def _found(
        self, backend: Backend, chunks: Iterator[CountMatrix], advance: CellProgress | None
    ) -> Iterator[Embeddings]:
        names = [spec.name for spec in self.outputs] or None
        return embed_parts(chunks, backend, outputs=names, progress=advance)

    def _about(self) -> dict[str, Any]:
        """Return the facts about the model in the metadata of a file of values per token."""
        return {key: self._identity[key] for key in ("model", "version") if key in self._identity}

    @staticmethod
    def _n_cells(source: CellSource, start: int) -> int:
        return min(start + source.chunk_cells, source.n_cells) - start

    def _result(self, number: int, source: CellSource, start: int) -> Embeddings:
        """Return a finished chunk as embeddings."""
        rows = self._load(number, self._n_cells(source, start))
        model = _read_json(self.path / _MODEL)
        if rows is None or model is None:
            raise UnreadableFileError(f"{self._chunk(number)} was changed while it was needed. Run again.", field="out")
        return Embeddings(
            rows["values"],
            rows["lengths"],
            rows["n_detected"],
            rows["known_share"],
            GeneCoverage.from_dict(model["coverage"]),
            model["model_id"],
            model["vocabulary_hash"],
            variant=model.get("variant"),
            outputs={spec.name: OutputValues(spec, rows[spec.name]) for spec in self._per_cell},
        )

    def _check_model(self, found: Embeddings) -> None:
        """Note the model of the first chunk, before that is written; refuse chunks of any other model."""
        model = {
            "model_id": found.model_id,
            "vocabulary_hash": found.vocabulary_hash,
            "coverage": found.coverage.to_dict(),
            "variant": found.variant,
        }
        earlier = _read_json(self.path / _MODEL)
        if earlier is None:
            write_json(self.path / _MODEL, model)
        elif (was := _name_of(earlier)) != (now := _name_of(model)):
            raise BundleError(
                f"The model changed during the run, from {was} to {now}. Run again.",
                field="model",
            )

    def _load(self, number: int, n_cells: int) -> NDArray[Any] | None:
        """Return the rows of a finished chunk, or None."""
        path = self._chunk(number)
        if not path.exists() or _read_json(self.path / _MODEL) is None:
            return None
        try:
            rows: NDArray[Any] = np.load(path, allow_pickle=False)
            width = rows["values"].shape[1]
        except (OSError, ValueError, EOFError, LookupError):
            return None
        return rows if len(rows) == n_cells and rows.dtype == _row_type(width, self._per_cell) else None

    def _save(self, number: int, found: Embeddings) -> None:
        rows = np.empty(len(found), dtype=_row_type(found.values.shape[1], self._per_cell))
        for name in ("values", "lengths", "n_detected", "known_share"):
            rows[name] = getattr(found, name)
        for spec in self._per_cell:
            rows[spec.name] = found.outputs[spec.name].values
        with atomic(self._chunk(number)) as staging:
            np.save(staging, rows, allow_pickle=False)

    def _chunk(self, number: int) -> Path:
        return self.path / f"chunk-{number:06d}.npy"


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Yield the runs of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        yield [number for _, number in run]


def _mapped(path: Path, n_cells: int, width: int) -> NDArray[np.float32]:
    """Map an array in a file whose space is reserved: writing to a mapped file on a full disk kills the process."""
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, n_cells * width * 4)
        return np.asarray(np.memmap(file, dtype=np.float32, mode="r+", shape=(n_cells, width)))


def _row_type(width: int, outputs: Sequence[OutputSpec]) -> np.dtype[Any]:
    own = [("values", "<f4", (width,)), ("lengths", "<i4"), ("n_detected", "<i4"), ("known_share", "<f4")]
    return np.dtype([*own, *((spec.name, "<f4", (spec.width,)) for spec in outputs)])


def _identity_of(outputs: Sequence[OutputSpec]) -> dict[str, Any]:
    """Return what the identity of a run with other outputs than the cell embedding has beside that of one without."""
    if not outputs:
        return {}
    import pyarrow as pa

    # Bytes of an Arrow file are continued only by the version that wrote them.
    return {"outputs": [spec.name for spec in outputs], "pyarrow": pa.__version__}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _name_of(model: Mapping[str, Any]) -> str:
    variant = model.get("variant")
    return f"{model['model_id']} ({variant})" if variant else str(model["model_id"])
