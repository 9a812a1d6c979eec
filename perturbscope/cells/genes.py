"""Genes: the model's vocabulary, and the way from any identifier to it.

A :class:`GeneVocabulary` holds the token id and the non-zero median of each gene. Identifiers that users bring
(Ensembl ids with or without version, symbols, previous symbols, aliases) are resolved by :class:`GeneResolver`, and
:class:`GeneCoverage` says what became of each of them.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.known_genes import PerArray
from perturbscope.errors import CorruptBundleError, MalformedMatrixError

_ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(\.\d+)?(_PAR_Y)?$")
_SHOWN = 10
"""Identifiers named in a report; the rest is counted."""


@dataclass(frozen=True, eq=False)
class GeneVocabulary:
    """Token ids and medians of genes; immutable, and named by its hash.

    Attributes
    ----------
    gene_ids
        Ensembl ids, in the order of their tokens.
    tokens
        Token id of each gene, int32 [n_genes], ascending.
    medians
        Median of a gene's non-zero counts per 10,000 over the cells of a corpus, float64 [n_genes], > 0.
    special_tokens
        Name to token id; ``<pad>`` and ``<mask>`` at least.
    source
        Where the medians come from, in words.
    """

    gene_ids: tuple[str, ...]
    tokens: NDArray[np.int32]
    medians: NDArray[np.float64]
    special_tokens: Mapping[str, int]
    source: str
    _index: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise CorruptBundleError(f"The gene vocabulary is not valid: {problem}.", field="vocabulary")
        object.__setattr__(self, "_index", {gene: row for row, gene in enumerate(self.gene_ids)})

    def _problem(self) -> str | None:
        if not len(self.gene_ids) == len(self.tokens) == len(self.medians):
            return "genes, tokens and medians differ in number"
        if not self.gene_ids:
            return "it has no genes"
        if len(set(self.gene_ids)) < len(self.gene_ids):
            return "a gene stands in it twice"
        if (np.diff(self.tokens) <= 0).any():
            return "its tokens are not ascending"
        bad = np.flatnonzero(~np.isfinite(self.medians) | (self.medians <= 0))
        if len(bad):
            return f"the median of {self.gene_ids[bad[0]]} is {self.medians[bad[0]]}, not a positive number"
        missing = {"<pad>", "<mask>"} - set(self.special_tokens)
        if missing:
            return f"the special token {min(missing)} is missing"
        used = set(self.tokens.tolist()) | set(self.special_tokens.values())
        if used != set(range(len(self.gene_ids) + len(self.special_tokens))):
            return "its token ids are not 0..n-1 without gaps"
        return None

    def __len__(self) -> int:
        """Number of token ids, special tokens included."""
        return len(self.gene_ids) + len(self.special_tokens)

    def __contains__(self, gene_id: object) -> bool:
        return gene_id in self._index

    def row(self, gene_id: str) -> int:
        """Row of a gene in `tokens` and `medians`, or -1."""
        return self._index.get(gene_id, -1)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of genes, tokens, medians and special tokens (not of `source`)."""
        return hashlib.sha256("\n".join(self._rows()).encode()).hexdigest()

    def _rows(self) -> list[str]:
        special = sorted(self.special_tokens.items(), key=lambda item: item[1])
        rows = [f"{token}\t{name}\t" for name, token in special]
        rows += [
            f"{token}\t{gene}\t{float(median)!r}"
            for gene, token, median in zip(self.gene_ids, self.tokens.tolist(), self.medians.tolist(), strict=True)
        ]
        return rows

    def to_tsv(self) -> str:
        """The vocabulary as text: a ``# source`` line, a header, one row a token."""
        return "\n".join([f"# source: {self.source}", "token\tgene_id\tmedian", *self._rows(), ""])

    @classmethod
    def from_tsv(cls, text: str) -> GeneVocabulary:
        """Read what :meth:`to_tsv` wrote.

        Raises
        ------
        CorruptBundleError
            A row does not parse, or the table as a whole is not a vocabulary.
        """
        source = ""
        special: dict[str, int] = {}
        genes: list[str] = []
        tokens: list[int] = []
        medians: list[float] = []
        for number, line in enumerate(io.StringIO(text), start=1):
            line = line.rstrip("\n")
            if line.startswith("# source: "):
                source = line.removeprefix("# source: ")
            if not line or line.startswith(("#", "token\t")):
                continue
            try:
                token, gene, median = line.split("\t")
                if median:
                    genes.append(gene)
                    tokens.append(int(token))
                    medians.append(float(median))
                else:
                    special[gene] = int(token)
            except ValueError as error:
                raise CorruptBundleError(
                    f"Line {number} of the gene vocabulary is {line[:60]!r}; token, gene_id and median are needed.",
                    field="vocabulary",
                ) from error
        return cls(
            tuple(genes),
            np.asarray(tokens, dtype=np.int32),
            np.asarray(medians, dtype=np.float64),
            special,
            source,
        )

    @classmethod
    def read(cls, path: Path) -> GeneVocabulary:
        """Read a TSV file, gzipped or not. Raises as :meth:`from_tsv`."""
        raw = path.read_bytes()
        return cls.from_tsv((gzip.decompress(raw) if path.suffix == ".gz" else raw).decode())

    @classmethod
    def geneformer_gc30m(cls) -> GeneVocabulary:
        """The published Geneformer V1 medians: 25,424 genes over 30 million cells (Theodoris et al. 2023)."""
        return _geneformer_gc30m()


@functools.cache
def _geneformer_gc30m() -> GeneVocabulary:
    return GeneVocabulary.from_tsv(_resource("geneformer_gc30m.tsv.gz"))


def _resource(name: str) -> str:
    return gzip.decompress(resources.files("perturbscope.cells.data").joinpath(name).read_bytes()).decode()


@dataclass(frozen=True)
class GeneCoverage:
    """What became of the columns of a matrix.

    Attributes
    ----------
    n_genes
        Columns given.
    n_matched
        Columns that are a gene of the vocabulary.
    n_by_symbol
        Of these, matched through a symbol or alias and not by Ensembl id.
    n_merged
        Columns whose counts were added to another column of the same gene.
    ambiguous
        Identifiers that name several genes, with the one that was taken (the first ten).
    n_ambiguous
        Number of these.
    unmatched
        Identifiers without a gene of the vocabulary (the first ten).
    """

    n_genes: int
    n_matched: int
    n_by_symbol: int = 0
    n_merged: int = 0
    ambiguous: tuple[tuple[str, str], ...] = ()
    n_ambiguous: int = 0
    unmatched: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Matched columns among all columns."""
        return self.n_matched / self.n_genes if self.n_genes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "n_genes": self.n_genes,
            "n_matched": self.n_matched,
            "n_by_symbol": self.n_by_symbol,
            "n_merged": self.n_merged,
            "n_ambiguous": self.n_ambiguous,
            "ambiguous": [list(pair) for pair in self.ambiguous],
            "unmatched": list(self.unmatched),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GeneCoverage:
        """Read what :meth:`to_dict` wrote."""
        return cls(
            n_genes=int(data["n_genes"]),
            n_matched=int(data["n_matched"]),
            n_by_symbol=int(data["n_by_symbol"]),
            n_merged=int(data["n_merged"]),
            ambiguous=tuple((str(a), str(b)) for a, b in data["ambiguous"]),
            n_ambiguous=int(data["n_ambiguous"]),
            unmatched=tuple(map(str, data["unmatched"])),
        )


@dataclass(frozen=True)
class GeneMapping:
    """Columns of a matrix mapped to rows of a vocabulary.

    Attributes
    ----------
    rows
        Row of the vocabulary for each column, -1 where there is none; int32 [n_columns].
    coverage
        The report.
    """

    rows: NDArray[np.int32]
    coverage: GeneCoverage


class GeneResolver:
    """Ensembl id of any identifier.

    Parameters
    ----------
    aliases
        Identifier to (Ensembl id, whether it names several genes).
    """

    def __init__(self, aliases: Mapping[str, tuple[str, bool]]) -> None:
        self._aliases = aliases

    @classmethod
    def default(cls) -> GeneResolver:
        """139,531 human symbols and aliases of GENCODE v44, HGNC and org.Hs.eg.db."""
        return _default_resolver()

    def resolve(self, identifier: str) -> tuple[str | None, bool]:
        """Ensembl id without version, or None; and whether the identifier is ambiguous."""
        match = _ENSEMBL.match(identifier)
        if match:
            return match.group(1), False
        found = self._aliases.get(identifier)
        return found if found else (None, False)

    def map(self, gene_ids: Sequence[str] | NDArray[np.str_], vocabulary: GeneVocabulary) -> GeneMapping:
        """Find each column's row in the vocabulary.

        A column that spells out a gene of the vocabulary wins over one that reaches the same gene through an ambiguous
        alias; otherwise columns of one gene are both kept (their counts are added) and counted in `n_merged`.
        """
        if not isinstance(gene_ids, np.ndarray):
            return _map(self, tuple(map(str, gene_ids)), vocabulary)
        known = _MAPPED.get(gene_ids)
        if known is None:
            _MAPPED.put(gene_ids, known := {})
        found = known.get((self, vocabulary))
        if found is None:
            found = known[self, vocabulary] = _map(self, tuple(map(str, gene_ids.tolist())), vocabulary)
        return found


_MAPPED: PerArray[dict[tuple[GeneResolver, GeneVocabulary], GeneMapping]] = PerArray()
"""What the arrays of identifiers that matrices share were mapped to."""


def _map(resolver: GeneResolver, gene_ids: tuple[str, ...], vocabulary: GeneVocabulary) -> GeneMapping:
    if not gene_ids:
        raise MalformedMatrixError("There are no genes; the matrix has no columns.", field="gene_ids")
    rows = np.full(len(gene_ids), -1, dtype=np.int32)
    ambiguous: list[int] = []
    by_symbol = 0
    for column, identifier in enumerate(gene_ids):
        ensembl, is_ambiguous = resolver.resolve(identifier)
        if ensembl is None:
            continue
        rows[column] = vocabulary.row(ensembl)
        if rows[column] >= 0:
            by_symbol += not identifier.startswith(ensembl)
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
    for line in _resource("gene_aliases.tsv.gz").splitlines():
        if line and not line.startswith(("#", "alias\t")):
            alias, ensembl, ambiguous = line.split("\t")
            aliases[alias] = (ensembl, ambiguous == "1")
    return GeneResolver(aliases)
