"""Identifiers of genes: the way from any of them to a model's vocabulary, and lists that come again and again.

Ensembl ids with or without version, symbols, previous symbols and aliases are resolved by :class:`GeneResolver`;
:class:`GeneCoverage` reports what became of each identifier.

Every request names all columns of its file, tens of thousands of strings of which one cell expresses hundreds. Checking
and looking them up takes several times as long as tokenizing that cell, and gives the same each time. So each list is
checked once and mapped to a vocabulary once. A list is recognised by all of its text, never by a digest or a part of
it, so one caller cannot change the meaning of another's list. The lists kept are bounded in number and in bytes.
"""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.data import read_text
from perturbscope.cells.gene_names import certain_gene
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import MalformedMatrixError
from perturbscope.threads import checkpoint

_ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(\.\d+)?(_PAR_Y)?$")
_STEP = 4096
"""Identifiers that are looked up between two checkpoints, a few milliseconds."""
_SHOWN = 10
"""Identifiers named in a report; all others are only counted."""
V = TypeVar("V")
MAX_LISTS = 64
"""Number of lists that are kept, and also of their JSON spellings."""
MAX_BYTES = 32 * 2**20
"""Memory for lists, and as much again for spellings; a list of 20,000 symbols takes 2 MiB."""
LARGEST = 4 * 2**20
"""Bytes of the largest list that is kept."""
_WIDTH = 4
"""Bytes of a character in an array of numpy."""
MAX_LIST_BYTES = 64 * 2**20
"""Bytes of one list as an array: 100,000 names of 160 characters, or 600,000 of 27."""
_BETWEEN = "\0"


class PerArray(Generic[V]):
    """A mapping from read-only arrays to values; an entry lives as long as its array."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[NDArray[Any]], V]] = {}

    def get(self, array: NDArray[Any]) -> V | None:
        """Return the value of this very array, not of an equal one; None if there is none."""
        entry = self._entries.get(id(array))
        return entry[1] if entry is not None and entry[0]() is array and not array.flags.writeable else None

    def put(self, array: NDArray[Any], value: V) -> None:
        """Keep the value of a read-only array; ignore an array that can be written to."""
        if not array.flags.writeable:
            key = id(array)
            self._entries[key] = weakref.ref(array, lambda _: self._entries.pop(key, None)), value


CHECKED: PerArray[bool] = PerArray()
"""Arrays of identifiers that were checked: all strings, and all different."""


def require_even(names: Sequence[str], field: str) -> None:
    """Refuse names of which one is so long that an array, where all take as much as the longest, would be too large.

    Raises
    ------
    MalformedMatrixError
        The message names the longest, and its place.
    """
    longest = max(map(len, names), default=0)
    if _WIDTH * longest * len(names) > MAX_LIST_BYTES:
        at = next(i for i, name in enumerate(names) if len(name) == longest)
        raise MalformedMatrixError(
            f"{field} has {len(names):,} names, of which number {at} has {longest:,} characters: too much for one "
            f"array, where all take as much as the longest ({MAX_LIST_BYTES:,} bytes are allowed). Give the genes "
            "shorter names, or fewer genes.",
            field=field,
        )


@dataclass(frozen=True)
class GeneCoverage:
    """Report on how the columns of a matrix were matched to a vocabulary.

    Attributes
    ----------
    n_genes
        Number of columns.
    n_matched
        Columns that are a gene of the vocabulary.
    n_by_symbol
        Number of these that were matched by symbol or alias, not by Ensembl id.
    n_merged
        Columns whose counts were added to another column of the same gene.
    ambiguous
        Identifiers that name several genes, each with the gene that was taken (the first ten).
    n_ambiguous
        Number of ambiguous identifiers.
    unmatched
        Identifiers without a gene of the vocabulary (the first ten).
    left_out
        Number of the file's features that are no genes, and no columns here, by their type.
    """

    n_genes: int
    n_matched: int
    n_by_symbol: int = 0
    n_merged: int = 0
    ambiguous: tuple[tuple[str, str], ...] = ()
    n_ambiguous: int = 0
    unmatched: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the columns that are genes of the vocabulary; 0.0 if there are no columns."""
        return self.n_matched / self.n_genes if self.n_genes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        found = {
            "n_genes": self.n_genes,
            "n_matched": self.n_matched,
            "n_by_symbol": self.n_by_symbol,
            "n_merged": self.n_merged,
            "n_ambiguous": self.n_ambiguous,
            "ambiguous": [list(pair) for pair in self.ambiguous],
            "unmatched": list(self.unmatched),
        }
        return {**found, "left_out": dict(self.left_out)} if self.left_out else found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GeneCoverage:
        """Read the JSON form."""
        return cls(
            n_genes=int(data["n_genes"]),
            n_matched=int(data["n_matched"]),
            n_by_symbol=int(data["n_by_symbol"]),
            n_merged=int(data["n_merged"]),
            ambiguous=tuple((str(a), str(b)) for a, b in data["ambiguous"]),
            n_ambiguous=int(data["n_ambiguous"]),
            unmatched=tuple(map(str, data["unmatched"])),
            left_out={str(kind): int(n) for kind, n in dict(data.get("left_out") or {}).items()},
        )


@dataclass(frozen=True)
class GeneMapping:
    """The rows of a vocabulary for the columns of a matrix.

    Attributes
    ----------
    rows
        Row of the vocabulary for each column, or -1; int32 [n_columns].
    coverage
        Report on the matching.
    """

    rows: NDArray[np.int32]
    coverage: GeneCoverage


class GeneResolver:
    """The way from any identifier to an Ensembl id.

    Parameters
    ----------
    aliases
        Ensembl id of each symbol and alias, and whether it names several genes.
    """

    def __init__(self, aliases: Mapping[str, tuple[str, bool]]) -> None:
        self._aliases = aliases

    @classmethod
    def default(cls) -> GeneResolver:
        """Return the resolver of 139,531 human symbols and aliases of GENCODE v44, HGNC and org.Hs.eg.db."""
        return _default_resolver()

    def resolve(self, identifier: str) -> tuple[str | None, bool]:
        """Return the Ensembl id without version, or None, and whether the identifier is ambiguous."""
        match = _ENSEMBL.match(identifier)
        if match:
            return match.group(1), False
        found = self._aliases.get(identifier)
        return (certain_gene(identifier, self._spelled), False) if found is None else found

    def is_spelled(self, identifier: str) -> bool:
        """Whether an identifier is an Ensembl id, symbol or alias as it stands."""
        return identifier in self._aliases or _ENSEMBL.match(identifier) is not None

    def _spelled(self, name: str) -> tuple[str | None, bool]:
        return self._aliases.get(name, (None, False))

    def map(self, gene_ids: Sequence[str] | NDArray[np.str_], vocabulary: GeneVocabulary) -> GeneMapping:
        """Find the row of the vocabulary for each column.

        A column that names a gene unambiguously wins over one that reaches the same gene through an ambiguous alias.
        Otherwise all columns of one gene are kept; their counts are added up, and `n_merged` counts them.

        Raises
        ------
        MalformedMatrixError
            There are no columns.
        """
        if not isinstance(gene_ids, np.ndarray):
            return _map(self, tuple(map(str, gene_ids)), vocabulary)
        mappings = _MAPPED.get(gene_ids)
        if mappings is None:
            _MAPPED.put(gene_ids, mappings := {})
        mapping = mappings.get((self, vocabulary))
        if mapping is None:
            mapping = mappings[self, vocabulary] = _map(self, tuple(map(str, gene_ids.tolist())), vocabulary)
        return mapping


_MAPPED: PerArray[dict[tuple[GeneResolver, GeneVocabulary], GeneMapping]] = PerArray()
"""Mappings of the arrays of identifiers that matrices share."""


def _map(resolver: GeneResolver, gene_ids: tuple[str, ...], vocabulary: GeneVocabulary) -> GeneMapping:
    if not gene_ids:
        raise MalformedMatrixError("There are no genes; the matrix has no columns.", field="gene_ids")
    rows = np.full(len(gene_ids), -1, dtype=np.int32)
    ambiguous: list[int] = []
    by_symbol = 0
    # A file of Ensembl ids has symbols where its makers found none, often of genes that were withdrawn: those are taken
    # as they are spelled, or not at all.
    by_id = sum(map(bool, map(_ENSEMBL.match, gene_ids))) > len(gene_ids) / 2
    for column, identifier in enumerate(gene_ids):
        if column % _STEP == 0:
            checkpoint()
        ensembl, is_ambiguous = resolver.resolve(identifier)
        if ensembl is None or (by_id and not resolver.is_spelled(identifier) and ensembl[-10:] not in identifier):
            continue
        rows[column] = vocabulary.row(ensembl)
        if rows[column] >= 0:
            by_symbol += ensembl not in identifier
            if is_ambiguous:
                ambiguous.append(column)
    certain = np.ones(len(gene_ids), dtype=bool)
    certain[ambiguous] = False
    taken = set(rows[certain & (rows >= 0)].tolist())
    for column in ambiguous:
        if int(rows[column]) in taken:
            rows[column] = -1
            by_symbol -= 1
    kept = [column for column in ambiguous if rows[column] >= 0]
    matched = rows[rows >= 0]
    missing = np.flatnonzero(rows < 0)
    return GeneMapping(
        rows,
        GeneCoverage(
            n_genes=len(gene_ids),
            n_matched=len(matched),
            n_by_symbol=by_symbol,
            n_merged=len(matched) - len(np.unique(matched)),
            ambiguous=tuple((gene_ids[c], vocabulary.gene_ids[rows[c]]) for c in kept[:_SHOWN]),
            n_ambiguous=len(kept),
            unmatched=tuple(gene_ids[c] for c in missing[:_SHOWN]),
        ),
    )


@functools.cache
def _default_resolver() -> GeneResolver:
    aliases: dict[str, tuple[str, bool]] = {}
    for line in read_text("gene_aliases.tsv.gz").splitlines():
        if line and not line.startswith(("#", "alias\t")):
            alias, ensembl, ambiguous = line.split("\t")
            aliases[alias] = (ensembl, ambiguous == "1")
    return GeneResolver(aliases)


class GeneLists:
    """Checked lists of identifiers by their text; those used last are kept. Safe for several threads.

    Parameters
    ----------
    max_lists, max_bytes
        Most lists and most bytes to keep, and as many spellings.
    """

    def __init__(self, max_lists: int = MAX_LISTS, max_bytes: int = MAX_BYTES) -> None:
        self._by_names = _Recent(max_lists, max_bytes)
        self._by_spelling = _Recent(max_lists, max_bytes)

    def find(self, names: object) -> NDArray[np.str_] | None:
        """Return the checked array of these names, or None if they are not a known list of strings."""
        key = _key(names)
        return None if key is None else self._by_names.get(key)

    def keep(self, names: object, genes: NDArray[np.str_]) -> None:
        """Remember these names and their checked array `genes`, which is read-only."""
        key = _key(names)
        if key is not None:
            self._by_names.put(key, genes, 4 * len(key[1]) + genes.nbytes)

    def spelled(self, text: bytes) -> NDArray[np.str_] | None:
        """Return the checked array of a list in JSON, or None if this very text is not known."""
        return self._by_spelling.get(text)

    def keep_spelling(self, text: bytes, genes: NDArray[np.str_]) -> None:
        """Remember a list in JSON; the caller has made sure that it means `genes`."""
        self._by_spelling.put(text, genes, len(text) + genes.nbytes)


class _Recent:
    """The arrays that were used last, bounded in number and bytes."""

    def __init__(self, most: int, max_bytes: int) -> None:
        self._most, self._max_bytes, self._bytes = most, max_bytes, 0
        self._entries: OrderedDict[Hashable, tuple[NDArray[np.str_], int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> NDArray[np.str_] | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, genes: NDArray[np.str_], n_bytes: int) -> None:
        if n_bytes > LARGEST:
            return
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = genes, n_bytes
            self._bytes += n_bytes
            while len(self._entries) > self._most or self._bytes > self._max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self._bytes -= freed


def _key(names: object) -> tuple[int, str] | None:
    """Return a key that only equal lists share; None if `names` is not a list of strings, or one holds a separator."""
    if not isinstance(names, (list, tuple)) or not names:
        return None
    try:
        text = _BETWEEN.join(names)
    except TypeError:
        return None
    # With one separator more, a name would hold one, and ["a\0b", "c"] would look like ["a", "b\0c"].
    return (len(names), text) if text.count(_BETWEEN) == len(names) - 1 else None


RECENT = GeneLists()
"""The lists that this process has seen."""
