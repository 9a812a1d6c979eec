"""Token and median dictionaries in the layout in which Geneformer is published.

Below a clone of the published repository, a model directory lies beside the package ``geneformer/``, which holds the
dictionaries of the second version; those of the first are in ``geneformer/gene_dictionaries_30m/``. They are pickles.
A pickle can run code when it is read, so these are read by an unpickler that builds dictionaries of text and numbers
and refuses to look up anything else. Numbers may be scalars of numpy, of which it decodes the bytes itself. JSON and
TSV are read as well.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import BundleError, InvalidParameterError, UnreadableFileError

MAX_BYTES = 64 * 2**20
"""Size of the largest dictionary that is read; the published ones have 4 MB at most."""
LFS_POINTER = b"version https://git-lfs"
"""Beginning of the file that git leaves where it did not fetch a large one."""
VERSIONS = {("<pad>", "<mask>"): "V1", ("<pad>", "<mask>", "<cls>", "<eos>"): "V2"}
"""Version of Geneformer by the special tokens of its dictionary, in the order of their ids from 0."""
_SIZES = {25_426: "V1 (gc30M)", 20_275: "V2 (gc95M, gc104M)"}
_NAMES = {"tokens": "token_dictionary", "medians": "gene_median_dictionary", "mapping": "ensembl_mapping_dict"}
_SUFFIXES = (".pkl", ".pickle", ".json", ".tsv")
_FOLDERS = ("", "geneformer", "geneformer/gene_dictionaries_30m", "gene_dictionaries_30m")
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}")
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class PublishedGenes:
    """Genes of a published model."""

    vocabulary: GeneVocabulary
    """Genes, tokens, medians, special tokens and retired ids."""
    version: str
    """Version of Geneformer, ``V1`` or ``V2``."""
    files: Mapping[str, Path]
    """Files that were read: ``tokens``, ``medians``, and ``mapping`` if there is one."""

    @property
    def family_config(self) -> dict[str, Any]:
        """Options of the rank family but its length: the second version has special tokens at the ends of a cell."""
        return {"start": "<cls>", "end": "<eos>"} if self.version == "V2" else {}


def read_genes(
    directory: Path,
    vocab_size: int,
    *,
    tokens: Path | None = None,
    medians: Path | None = None,
    mapping: Path | None = None,
) -> PublishedGenes:
    """Read the genes of the weights in a directory.

    Parameters
    ----------
    directory
        Directory of the weights.
    vocab_size
        Number of token ids of the weights, which the token dictionary must have.
    tokens, medians, mapping
        Token dictionary, median dictionary, and mapping of retired Ensembl ids. By default they are searched in the
        published layout: in `directory`, in the two directories above it, and in the folders of the package there. The
        mapping may be missing.

    Raises
    ------
    UnreadableFileError
        A file is missing, too large, holds code, or is not such a dictionary.
    InvalidParameterError
        No dictionary was found, or several; the tokens are of another version than the weights; or there are tokens
        without a median.
    """
    tokens_path, ids = _tokens(directory, vocab_size, tokens)
    medians_path = medians or _companion(directory, tokens_path, "medians")
    if medians_path is None:
        raise InvalidParameterError(
            f"No median dictionary was found beside {tokens_path} or around {directory}. Give it with --medians.",
            field="medians",
        )
    special = tuple(sorted((name for name in ids if not _is_gene(name)), key=ids.__getitem__))
    version = VERSIONS.get(special)
    if version is None or [ids[name] for name in special] != list(range(len(special))):
        found = ", ".join(f"{name} {ids[name]}" for name in special[:6])
        raise InvalidParameterError(
            f"{tokens_path} has the special tokens {found or 'none'}; Geneformer V1 has <pad> 0, <mask> 1, and V2 also "
            "<cls> 2, <eos> 3. Give the token dictionary that the weights were trained with.",
            field="tokens",
        )
    genes = sorted((name for name in ids if _is_gene(name)), key=ids.__getitem__)
    values = _numbers(medians_path)
    lacking = [gene for gene in genes if gene not in values]
    if lacking:
        raise InvalidParameterError(
            f"{medians_path} has no median for {len(lacking):,} of the {len(genes):,} genes of {tokens_path} (first: "
            f"{', '.join(lacking[:_SHOWN])}). Give the medians of the same version with --medians.",
            field="medians",
        )
    mapping_path = mapping or _companion(directory, tokens_path, "mapping")
    retired = {} if mapping_path is None else _retired(mapping_path, set(genes))
    try:
        vocabulary = GeneVocabulary(
            tuple(genes),
            np.asarray([ids[gene] for gene in genes], dtype=np.int32),
            np.asarray([values[gene] for gene in genes], dtype=np.float64),
            {name: ids[name] for name in special},
            f"Geneformer {version}: {tokens_path.name}, {medians_path.name}",
            retired,
        )
    except BundleError as error:
        raise InvalidParameterError(f"{tokens_path} and {medians_path}: {error.message}", field="tokens") from error
    files = {"tokens": tokens_path, "medians": medians_path}
    return PublishedGenes(
        vocabulary=vocabulary, version=version, files=files | ({"mapping": mapping_path} if mapping_path else {})
    )


def _tokens(directory: Path, vocab_size: int, path: Path | None) -> tuple[Path, dict[str, int]]:
    """Return the token dictionary of the weights and its file; the number of token ids tells the version."""
    candidates = [path] if path else list(dict.fromkeys(_found(directory, "tokens")))
    if not candidates:
        raise InvalidParameterError(
            f"No token dictionary was found around {directory}. Give it with --tokens.", field="tokens"
        )
    read, problems = {}, []
    for candidate in candidates:
        try:
            read[candidate] = _ids(candidate)
        except UnreadableFileError as error:
            problems.append(error)
    fitting = {candidate: ids for candidate, ids in read.items() if len(ids) == vocab_size}
    weights = f"the weights in {directory} have {_sized(vocab_size)}"
    if not fitting and problems:
        raise problems[0]
    if not fitting:
        sizes = "; ".join(f"{candidate} has {_sized(len(ids))}" for candidate, ids in read.items())
        raise InvalidParameterError(
            f"{sizes}, but {weights}. Give the token dictionary of the same version with --tokens.", field="tokens"
        )
    first, *others = fitting
    differing = [other for other in others if fitting[other] != fitting[first]]
    if differing:
        raise InvalidParameterError(
            f"{first} and {differing[0]} differ, and both have as many token ids as {weights}. Choose with --tokens.",
            field="tokens",
        )
    return first, fitting[first]


def _sized(n_tokens: int) -> str:
    version = _SIZES.get(n_tokens)
    return f"{n_tokens:,} token ids" + (f", as Geneformer {version}" if version else "")


def _found(directory: Path, kind: str) -> Iterator[Path]:
    """Yield the dictionaries of a kind in the published layout, the nearest first."""
    place = directory.resolve()
    for folder in (place, *place.parents[:2]):
        for below in _FOLDERS:
            files = sorted((folder / below).glob(f"{_NAMES[kind]}*"))
            yield from (file for file in files if file.suffix in _SUFFIXES and file.is_file())


def _companion(directory: Path, tokens: Path, kind: str) -> Path | None:
    """Return the dictionary of a kind that belongs to a token dictionary; None if there is none.

    It lies beside it and has the same ending; failing that, it is the only one that is found.

    Raises
    ------
    InvalidParameterError
        Several could belong to it.
    """
    ending = tokens.stem.removeprefix(_NAMES["tokens"])
    beside = [tokens.with_name(f"{_NAMES[kind]}{ending}{suffix}") for suffix in (tokens.suffix, *_SUFFIXES)]
    for file in beside:
        if file.is_file():
            return file
    others = list(dict.fromkeys(_found(directory, kind)))
    if len(others) > 1:
        raise InvalidParameterError(
            f"{', '.join(map(str, others))} could belong to {tokens}. Choose with --{kind}.", field=kind
        )
    return others[0] if others else None


def _is_gene(name: str) -> bool:
    return not name.startswith("<")


def _ids(path: Path) -> dict[str, int]:
    ids = _numbers(path)
    for name, token in ids.items():
        if token != int(token) or not 0 <= token < 2**31:
            raise UnreadableFileError(f"{path}: the token of {name} is {token}, which is no token id.", field="tokens")
    return {name: int(token) for name, token in ids.items()}


def _retired(path: Path, genes: set[str]) -> dict[str, str]:
    """Return the Ensembl ids that a mapping of ids leads to a gene of the model, but for the genes themselves."""
    mapping = read_dictionary(path)
    wrong = next((key for key, value in mapping.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise UnreadableFileError(f"{path}: {wrong} leads to {mapping[wrong]!r}; a gene id is needed.", field="mapping")
    return {old: new for old, new in mapping.items() if new in genes and old not in genes and _ENSEMBL.fullmatch(old)}


def _numbers(path: Path) -> dict[str, float]:
    values = read_dictionary(path)
    for name, value in values.items():
        if isinstance(value, str) or not math.isfinite(value):
            raise UnreadableFileError(f"{path}: the value of {name} is {value!r}; a number is needed.", field="path")
    return values


def read_dictionary(path: Path) -> dict[str, Any]:
    """Read a dictionary from text to text or numbers: a pickle, a JSON object, or two columns of a TSV file.

    Keys that are whole numbers are returned as text, as JSON has them.

    Raises
    ------
    UnreadableFileError
        The file is missing, too large, holds code, or is not such a dictionary; the message says which.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UnreadableFileError(
                f"{path} has {size:,} bytes; a dictionary of at most {MAX_BYTES:,} is read.", field="path"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror or error}.", field="path") from error
    refuse_pointer(path, raw)
    read = {".json": _read_json, ".tsv": _read_tsv}.get(path.suffix, _read_pickle)
    values = read(path, raw)
    if not isinstance(values, dict) or not values:
        raise UnreadableFileError(f"{path} holds no dictionary with entries.", field="path")
    for key, value in values.items():
        if type(key) not in (str, int) or type(value) not in (str, int, float):
            raise UnreadableFileError(
                f"{path}: the entry {str(key)[:40]!r} is of {type(key).__name__} and {type(value).__name__}; text and "
                "a number or text are needed.",
                field="path",
            )
    return {str(key): value for key, value in values.items()}


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raise UnreadableFileError if git left a pointer in the place of a large file."""
    if beginning.startswith(LFS_POINTER):
        raise UnreadableFileError(
            f"{path} is a Git LFS pointer, not the file itself. Fetch it: git lfs pull.", field="path"
        )


def _read_json(path: Path, raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{path} is not JSON: {error}.", field="path") from error


def _read_tsv(path: Path, raw: bytes) -> dict[str, Any]:
    """Return two columns as a dictionary; numbers as such. A first line whose second column is a word is a header."""
    rows: list[list[str]] = []
    try:
        lines = raw.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path} is not text: {error}.", field="path") from error
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#"):
            rows.append(line.split("\t"))
            if len(rows[-1]) != 2:
                raise UnreadableFileError(
                    f"{path}: line {number} has {len(rows[-1])} columns; name and value are needed.", field="path"
                )
    values = {name: _number(value) for name, value in rows}
    kinds = {type(value) is str for value in list(values.values())[1:]}
    if rows and kinds == {False} and isinstance(values[rows[0][0]], str):
        del values[rows[0][0]]
    return values


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read_pickle(path: Path, raw: bytes) -> Any:
    try:
        return _Values(io.BytesIO(raw)).load()
    except _HoldsCode as error:
        raise UnreadableFileError(
            f"{path} is a pickle that names {error}, so reading it could run code; it is not read. A dictionary of "
            "text and numbers is needed; give it as JSON if need be.",
            field="path",
        ) from error
    except Exception as error:
        raise UnreadableFileError(f"{path} is not a pickle that can be read: {error}.", field="path") from error


class _HoldsCode(Exception):  # noqa: N818, never seen outside
    """A pickle names something that is not a value."""


class _Dtype:
    """The part of a pickled numpy scalar that says how its bytes are to be read."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = ">" if state[1] == ">" else "<"


_FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "u8": "Q", "u4": "I", "u2": "H"}


def _scalar(dtype: _Dtype, raw: bytes) -> Any:
    """Return the number of a pickled numpy scalar."""
    return struct.unpack(dtype.order + _FORMATS[dtype.code], raw)[0]


def _encode(text: str, encoding: str) -> bytes:
    """Return the bytes of a scalar in pickles of protocol 2."""
    return text.encode("latin-1")


_VALUES: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
"""Stand-ins for the only names that a pickle may have; none of them is looked up in its module."""


class _Values(pickle.Unpickler):
    """An unpickler that builds dictionaries, lists, text and numbers, and can import nothing."""

    def find_class(self, module: str, name: str) -> Any:
        value = _VALUES.get((module, name))
        if value is None:
            raise _HoldsCode(f"{module}.{name}")
        return value

    def persistent_load(self, pid: Any) -> Any:
        raise _HoldsCode("an object outside the file")
