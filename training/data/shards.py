"""Token shards on disk: written chunk by chunk, read through memory maps.

A corpus is a directory::

    manifest.json                contents, sources and configuration of the corpus
    shard-00000/<input>.npy      values of an input per token, end to end; ids as uint16 where they fit
    shard-00000/cell-<input>.npy values of an input per cell
    shard-00000/offsets.npy      cell i has the tokens offsets[i]:offsets[i + 1]; int64
    shard-00000/source.npy       number of each cell's source, int32
    shard-00000/row.npy          each cell's row in its source, int64
    shard-00000/n_detected.npy   genes of the vocabulary that the cell expresses, int32
    shard-00000/known_share.npy  share of its counts that they hold, float32
    shard-00000/digest.npy       digest of the cell's inputs, uint64, by which copies are found
    shard-00000/label-<name>.npy the cell's label as a code, int32; -1 where it has none

The manifest has the SHA-256 of each file, which ``python -m training corpus verify`` compares.

A token costs two bytes, so 30 million cells of 1,500 tokens are 90 GB, of which a batch reads only its own cells.
"""

from __future__ import annotations

import errno
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneCoverage
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import CorruptBundleError
from perturbscope.families import Family, load_family
from perturbscope.families.tokens import InputSpec, TokenizedCells
from perturbscope.inference.bundle import sha256
from training.data import copies

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.tsv"
FORMAT_VERSION = 1
PER_CELL: dict[str, str] = {
    "source": "int32", "row": "int64", "n_detected": "int32", "known_share": "float32", "digest": "uint64",
}  # fmt: skip
"""Facts that are kept for every cell, with their types."""
_READ = 4096
"""Cells that are read at a time where a whole corpus is."""


class ArrayWriter:
    """A ``.npy`` file that grows along its first axis.

    The header of a .npy file leaves room for a longer length, so it is written again, in place, at the end.
    """

    def __init__(self, path: Path, dtype: Any, trailing: tuple[int, ...] = ()) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._trailing = trailing
        self._header_size = self._write_header()
        self.length = 0

    def append(self, values: NDArray[Any]) -> None:
        """Write more rows, [n, *trailing]."""
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.length += len(values)

    def close(self) -> None:
        """Write the final length."""
        self._file.seek(0)
        size = self._write_header()
        assert size == self._header_size, "the header grew"  # noqa: S101, numpy reserves the room
        self._file.close()

    def _write_header(self) -> int:
        shape = (getattr(self, "length", 0), *self._trailing)
        np.lib.format.write_array_header_1_0(
            self._file,
            {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape},
        )
        return self._file.tell()


class ShardWriter:
    """Writer of one shard.

    Parameters
    ----------
    path
        Directory to create.
    family
        Family of the tokens.
    labels
        Names of the labels.
    """

    def __init__(self, path: Path, family: Family, labels: Sequence[str]) -> None:
        path.mkdir()
        self.path = path
        kinds = {spec: (_stored_type(spec, family.max_length), spec.trailing) for spec in family.inputs}
        files = {spec: ArrayWriter(path / f"{stored_name(spec)}.npy", *kind) for spec, kind in kinds.items()}
        self._inputs = {spec.name: file for spec, file in files.items() if spec.per == "token"}
        self._cell_inputs = {spec.name: file for spec, file in files.items() if spec.per == "cell"}
        self._offsets = ArrayWriter(path / "offsets.npy", np.int64)
        self._offsets.append(np.zeros(1, dtype=np.int64))
        self._cells = {name: ArrayWriter(path / f"{name}.npy", dtype) for name, dtype in PER_CELL.items()}
        self._cells |= {f"label-{name}": ArrayWriter(path / f"label-{name}.npy", np.int32) for name in labels}
        self.n_tokens = 0
        self.n_cells = 0

    def append(self, tokens: TokenizedCells, per_cell: Mapping[str, NDArray[Any]]) -> None:
        """Add cells; `per_cell` has their ``source``, ``row`` and ``label-<name>``, [n] each."""
        for name, writer in self._inputs.items():
            writer.append(tokens.arrays[name])
        for name, writer in self._cell_inputs.items():
            writer.append(tokens.per_cell[name])
        self._offsets.append(tokens.offsets[1:] + self.n_tokens)
        facts: dict[str, NDArray[Any]] = {
            "n_detected": tokens.n_detected, "known_share": tokens.known_share, "digest": copies.digests(tokens),
        }  # fmt: skip
        for name, writer in self._cells.items():
            writer.append({**facts, **per_cell}[name])
        self.n_tokens += int(tokens.offsets[-1])
        self.n_cells += len(tokens)

    def close(self) -> None:
        """Finish every file."""
        for writer in (*self._inputs.values(), *self._cell_inputs.values(), self._offsets, *self._cells.values()):
            writer.close()


class ShardsWriter:
    """Writer of one shard after another; a context manager, which closes the last one.

    Parameters
    ----------
    path
        Directory of the corpus.
    family, labels
        See :class:`ShardWriter`.
    max_tokens
        Tokens after which a new shard begins.
    written
        Entries of the shards that an earlier run has finished; any other shard in `path` is removed.
    """

    def __init__(
        self,
        path: Path,
        family: Family,
        labels: Sequence[str],
        *,
        max_tokens: int,
        written: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._path = path
        self._family = family
        self._labels = labels
        self._max_tokens = max_tokens
        self._open: ShardWriter | None = None
        self.written: list[dict[str, Any]] = list(written)
        finished = {shard["name"] for shard in self.written}
        for left in path.glob("shard-*"):
            if left.name not in finished:
                shutil.rmtree(left)

    @property
    def is_full(self) -> bool:
        """Whether the current shard is full, so that the next cells begin another."""
        return self._open is not None and self._open.n_tokens >= self._max_tokens

    def append(self, tokens: TokenizedCells, per_cell: Mapping[str, NDArray[Any]]) -> None:
        """Add cells; see :meth:`ShardWriter.append`."""
        if self._open is None or self.is_full:
            self.close()
            name = f"shard-{len(self.written):05d}"
            self._open = ShardWriter(self._path / name, self._family, self._labels)
            self.written.append({"name": name})
        self._open.append(tokens, per_cell)
        self.written[-1] |= {"cells": self._open.n_cells, "tokens": self._open.n_tokens}

    def close(self) -> None:
        """Finish the current shard."""
        if self._open is not None:
            self._open.close()
            self.written[-1]["files"] = {path.name: sha256(path) for path in sorted(self._open.path.iterdir())}
            self._open = None

    def __enter__(self) -> ShardsWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


class Corpus:
    """Tokenized cells of a corpus, by their number.

    Parameters
    ----------
    path
        Directory that :func:`training.data.corpus.build_corpus` wrote.

    Raises
    ------
    CorruptBundleError
        `path` is not a corpus, or a file is missing or does not fit the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.vocabulary = GeneVocabulary.read(self.path / VOCABULARY)
        if self.vocabulary.hash != self.manifest["vocabulary_hash"]:
            raise CorruptBundleError(f"{self.path / VOCABULARY} is not the vocabulary of this corpus. Build it again.")
        self.family: Family = load_family(self.manifest["family"], self.manifest["family_config"], self.vocabulary)
        counts = [shard["cells"] for shard in self.manifest["shards"]]
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
        self._shards = [self.path / shard["name"] for shard in self.manifest["shards"]]
        self._offsets = [self._map(at, "offsets") for at in range(len(self._shards))]
        for shard, offsets in zip(self.manifest["shards"], self._offsets, strict=True):
            if len(offsets) != shard["cells"] + 1 or offsets[-1] != shard["tokens"]:
                raise CorruptBundleError(f"{self.path / shard['name']} does not fit the manifest. Build it again.")
        self._inputs = {
            spec: [self._map(at, stored_name(spec)) for at in range(len(self._shards))] for spec in self.family.inputs
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    @functools.cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each cell, [n_cells]."""
        return np.concatenate([np.diff(offsets).astype(np.int32) for offsets in self._offsets])

    def per_cell(self, name: str) -> NDArray[Any]:
        """Return one of :data:`PER_CELL`, [n_cells]."""
        return np.concatenate([np.asarray(self._map(at, name)) for at in range(len(self._shards))])

    @functools.cached_property
    def digests(self) -> NDArray[np.uint64]:
        """Digest of the inputs of each cell, by which copies are found (:mod:`training.data.copies`), [n_cells]."""
        if all((shard / "digest.npy").exists() for shard in self._shards):
            return self.per_cell("digest")
        # A corpus of an earlier version keeps none.
        numbers = (np.arange(start, min(start + _READ, len(self))) for start in range(0, len(self), _READ))
        return np.concatenate([copies.digests(self.cells(cells)) for cells in numbers])

    def verify(self, progress: Callable[[str, int, int], None] | None = None) -> int:
        """Compare every file of every shard with its digest in the manifest, and every value with its bounds.

        Parameters
        ----------
        progress
            Called with ``files``, the number of compared files, and the number of all.

        Returns
        -------
        Number of files that were compared with a digest; 0 for a corpus of an earlier version, which has none.

        Raises
        ------
        CorruptBundleError
            A file was changed, is missing, or holds a value out of its bounds.
        """
        listed = [
            (self._shards[number] / name, digest)
            for number, shard in enumerate(self.manifest["shards"])
            for name, digest in shard.get("files", {}).items()
        ]
        for number, (path, digest) in enumerate(listed, 1):
            if not path.is_file() or sha256(path) != digest:
                what = "was changed after it was written" if path.is_file() else "is missing"
                raise CorruptBundleError(f"{path} {what}. Build the corpus again.")
            if progress:
                progress("files", number, len(listed))
        for shard, offsets in enumerate(self._offsets):
            if offsets[0] or (np.diff(offsets) < 0).any():
                raise CorruptBundleError(f"{self._shards[shard] / 'offsets.npy'} is not ascending. Build it again.")
        for spec, parts in self._inputs.items():
            n_values = self.family.max_length if spec.within_length else spec.n_values
            for shard, values in enumerate(parts):
                if n_values is not None and len(values) and not 0 <= values.min() <= values.max() < n_values:
                    raise CorruptBundleError(
                        f"{self._shards[shard] / stored_name(spec)}.npy holds a value outside 0 to {n_values - 1}. "
                        "Build the corpus again."
                    )
        return len(listed)

    def labels(self, name: str) -> NDArray[np.object_]:
        """Return a label of each cell, None where it has none, [n_cells].

        Raises
        ------
        CorruptBundleError
            The corpus was built without this label.
        """
        if name not in self.manifest["labels"]:
            raise CorruptBundleError(
                f"The corpus {self.path} keeps no label {name!r}; it keeps {', '.join(self.manifest['labels'])}. "
                "Add it to labels and build the corpus again."
            )
        names = np.array([*self.manifest["labels"][name], None], dtype=object)
        found: NDArray[np.object_] = names[self.per_cell(f"label-{name}")]
        return found

    def cells(self, numbers: NDArray[np.integer[Any]]) -> TokenizedCells:
        """Return the tokens of some cells, in the order given."""
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        places = numbers - self._starts[shards]
        bounds = [
            (int(at), int(self._offsets[at][place]), int(self._offsets[at][place + 1]))
            for at, place in zip(shards.tolist(), places.tolist(), strict=True)
        ]
        lengths = np.array([stop - start for _, start, stop in bounds], dtype=np.int64)
        return TokenizedCells(
            arrays={
                spec.name: np.concatenate([maps[at][start:stop] for at, start, stop in bounds])
                for spec, maps in self._inputs.items()
                if spec.per == "token"
            },
            offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
            known_share=np.zeros(len(numbers), dtype=np.float32),
            n_detected=lengths.astype(np.int32),
            coverage=GeneCoverage(0, 0),
            per_cell={
                spec.name: np.stack([maps[at][place] for at, place in zip(shards, places, strict=True)])
                for spec, maps in self._inputs.items()
                if spec.per == "cell"
            },
        )

    def _map(self, shard: int, name: str) -> NDArray[Any]:
        path = self._shards[shard] / f"{name}.npy"
        try:
            mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            remedy = "Build the corpus again."
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                remedy = (
                    f"Each of {len(self._shards)} shards keeps {len(self.family.inputs) + 1} files open: raise the "
                    "limit (ulimit -n), or build the corpus with a larger corpus.shard_tokens."
                )
            raise CorruptBundleError(f"{path} cannot be read: {error}. {remedy}") from error
        return mapped


def stored_name(spec: InputSpec) -> str:
    """Return the name of an input's file in a shard, without its ending."""
    return spec.name if spec.per == "token" else f"cell-{spec.name}"


def _stored_type(spec: InputSpec, max_length: int) -> str:
    """Return the type in which values of an input are kept: the smallest for ids and for positions in the cell."""
    n_values = max_length if spec.within_length else spec.n_values
    if n_values is None:
        return spec.dtype
    return "uint16" if n_values <= 2**16 else "int32"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CorruptBundleError(
            f"{path} is not a corpus: it has no {MANIFEST}. Build it with python -m training corpus."
        ) from error
    except (OSError, ValueError) as error:
        raise CorruptBundleError(f"{path / MANIFEST} cannot be read: {error}.") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise CorruptBundleError(f"{path / MANIFEST} is not the manifest of a corpus. Build it again.")
    return manifest
