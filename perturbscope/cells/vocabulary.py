"""The vocabulary of a model: token id and non-zero median of each gene."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.data import read_text
from perturbscope.errors import CorruptBundleError

_SPECIAL = re.compile(
    r"\s*(?:[<\[{|].*[>\]}|]|(?:pad|mask|masked|cls|eos|bos|sep|unk|eop|sos|start|end)(?:_?token)?|)\s*", re.IGNORECASE
)
"""Names of special tokens in the models of this field and of language, which no gene has; also no name at all."""
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}")
_RETIRED = "retired"
"""Text in place of the median in the row of a retired id."""


@dataclass(frozen=True, eq=False)
class GeneVocabulary:
    """Token ids and medians of genes; immutable, and identified by its hash.

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
        Description of the cells that the medians were computed from.
    retired
        Retired Ensembl ids, each with the gene of `gene_ids` that it became: :meth:`row` finds that gene under them.

    Raises
    ------
    CorruptBundleError
        The parts do not make a vocabulary; the message says why.
    """

    gene_ids: tuple[str, ...]
    tokens: NDArray[np.int32]
    medians: NDArray[np.float64]
    special_tokens: Mapping[str, int]
    source: str
    retired: Mapping[str, str] = field(default_factory=dict)
    _index: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise CorruptBundleError(f"The gene vocabulary is not valid: {problem}.", field="vocabulary")
        rows = {gene: row for row, gene in enumerate(self.gene_ids)}
        object.__setattr__(self, "_index", {old: rows[new] for old, new in self.retired.items()} | rows)

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
        lost = set(self.retired.values()) - set(self.gene_ids)
        if lost:
            return f"a retired id became {min(lost)}, which is not in it"
        current = set(self.retired) & set(self.gene_ids)
        if current:
            return f"{min(current)} is retired, and a gene of it"
        no_gene = next(
            (
                name
                for name in (*self.gene_ids, *self.retired)
                if not name.startswith("ENS") and _SPECIAL.fullmatch(name)
            ),
            None,
        )
        if no_gene is not None:
            return (
                f"{no_gene!r} stands among the genes, with a median, and is the name of a special token. Leave its "
                "median empty, or its row out"
            )
        twice = set(self.special_tokens) & set(self.gene_ids)
        if twice:
            return f"{min(twice)} is a special token, and a gene of it"
        unmeasured = next((name for name in self.special_tokens if _ENSEMBL.match(name)), None)
        if unmeasured is not None:
            return f"the gene {unmeasured} has no median, as only a special token may"
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
        """Return the row of a gene in `tokens` and `medians`, or -1; a retired id has the row of its successor."""
        return self._index.get(gene_id, -1)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of genes, tokens, medians, special tokens and retired ids (not of `source`)."""
        return hashlib.sha256("\n".join(self._rows()).encode()).hexdigest()

    def _rows(self) -> list[str]:
        special = sorted(self.special_tokens.items(), key=lambda item: item[1])
        rows = [f"{token}\t{name}\t" for name, token in special]
        rows += [
            f"{token}\t{gene}\t{float(median)!r}"
            for gene, token, median in zip(self.gene_ids, self.tokens.tolist(), self.medians.tolist(), strict=True)
        ]
        tokens = self.tokens.tolist()
        return rows + [f"{tokens[self.row(new)]}\t{old}\t{_RETIRED}" for old, new in sorted(self.retired.items())]

    def to_tsv(self) -> str:
        """Return the vocabulary as text: a ``# source`` line, a header, one row a token, one row a retired id."""
        return "\n".join([f"# source: {self.source}", "token\tgene_id\tmedian", *self._rows(), ""])

    @classmethod
    def from_tsv(cls, text: str) -> GeneVocabulary:
        """Read the text of :meth:`to_tsv`.

        Raises
        ------
        CorruptBundleError
            A row does not parse, or the table is not a vocabulary.
        """
        source = ""
        special: dict[str, int] = {}
        genes: list[str] = []
        tokens: list[int] = []
        medians: list[float] = []
        retired: dict[str, int] = {}
        for number, line in enumerate(io.StringIO(text), start=1):
            line = line.rstrip("\n")
            if line.startswith("# source: "):
                source = line.removeprefix("# source: ")
            if not line or line.startswith(("#", "token\t")):
                continue
            try:
                token, gene, median = line.split("\t")
                if median == _RETIRED:
                    retired[gene] = int(token)
                elif median:
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
        gene_of = dict(zip(tokens, genes, strict=True))
        return cls(
            tuple(genes),
            np.asarray(tokens, dtype=np.int32),
            np.asarray(medians, dtype=np.float64),
            special,
            source,
            {old: gene_of.get(token, f"the token {token}") for old, token in retired.items()},
        )

    @classmethod
    def read(cls, path: Path) -> GeneVocabulary:
        """Read a TSV file, gzipped or not. Raises as :meth:`from_tsv`."""
        raw = path.read_bytes()
        return cls.from_tsv((gzip.decompress(raw) if path.suffix == ".gz" else raw).decode())

    @classmethod
    def geneformer_gc30m(cls) -> GeneVocabulary:
        """Return the published Geneformer V1 medians: 25,424 genes, 30 million cells (Theodoris et al. 2023)."""
        return _shipped("geneformer_gc30m")

    @classmethod
    def geneformer_gc95m(cls) -> GeneVocabulary:
        """Return the published Geneformer V2 medians: 20,271 genes, 95 million cells, with ``<cls>`` and ``<eos>``.

        With 3,423 retired Ensembl ids, which Geneformer's tokenizer counts towards their successors.
        """
        return _shipped("geneformer_gc95m")

    @classmethod
    def named(cls, name: str) -> GeneVocabulary | None:
        """Return the shipped vocabulary of this name, one of :data:`SHIPPED`; None if there is none."""
        return _shipped(name) if name in SHIPPED else None


SHIPPED = ("geneformer_gc30m", "geneformer_gc95m")
"""Names of the vocabularies that the library ships."""


@functools.cache
def _shipped(name: str) -> GeneVocabulary:
    return GeneVocabulary.from_tsv(read_text(f"{name}.tsv.gz"))
