"""Features of a matrix that are genes, and those that are not: antibodies, guides, hashtags, peaks and controls.

Cell Ranger, muon and scvi-tools write the type of each feature into a column of var (``feature_types``, ``modality``
and other names). An antibody called CD45 and a guide called by its target resolve to genes, and their counts are many
times as high, so a matrix with a column of types is read without them. A column is one of types by its values, and its
name decides only how sure they have to be: the biotypes of CELLxGENE's ``feature_type`` (lncRNA, protein_coding) are
all genes.

Names of genomic intervals are peaks where a file says nothing about types. Other names that look like those of
antibodies or guides are only warned of: see :func:`doubtful_names`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneResolver
from perturbscope.errors import MalformedMatrixError

if TYPE_CHECKING:
    import pandas as pd

_NAMED = ("featuretypes", "featuretype", "featurestype", "modality", "modalities", "librarytype", "featurebiotype")
"""Names of columns of types, without case and marks, the surest first."""
_GENES = {
    *("geneexpression", "geneexp", "expression", "gene", "genes", "gex", "transcript", "transcripts"),
    *("transcriptome", "transcriptomics", "rna", "rnas", "mrna", "rnaseq", "scrna", "scrnaseq", "snrnaseq"),
}
"""Types that say gene expression, as :func:`_letters` spells them."""
_BIOTYPES = ("proteincoding", "lncrna", "lincrna", "antisense", "sense", "retainedintron", "tec", "ribozyme")
_BIOTYPE_ENDS = ("rna", "pseudogene", "cgene", "dgene", "jgene", "vgene")
_OTHER = {
    "adt",
    "adts",
    "hto",
    "htos",
    "cmo",
    "lmo",
    "ab",
    "abs",
    "prot",
    "cite",
    "tag",
    "tags",
    "vdj",
    "atac",
    "blank",
}
_OTHER_PARTS = (
    *("antibod", "antigen", "protein", "citeseq", "totalseq", "abseq", "surface", "isotype", "hashtag", "hashing"),
    *("crispr", "guide", "grna", "multiplex", "custom", "barcode", "peak", "chromatin", "atacseq", "accessib"),
    *("spikein", "codeword", "negativecontrol", "genomiccontrol", "controlprobe", "lipid", "metabol"),
)
_IDENTIFIERS = re.compile("symbol|name|ids?$|ensembl")
"""Columns that hold an identifier each, and are not read to look for types."""
_FEW = 24
"""Most types of a column whose name does not say that it has types."""
_INTERVAL = re.compile(r"^(?:chr[^:_\s]+|[0-9]{1,2}|[XYM]|MT|(?:GL|KI)[0-9.]+)[:_-][0-9]+[-_][0-9]+$")
_ANTIBODY = re.compile(
    r"total-?seq|(?:^|[_.\-])(?:ADT|HTO|CITE|AbSeq|prot|protein|antibody|hashtag|isotype)(?:[_.\-:\d]|$)|^anti-|"
    r"\.Total[ABC]$|^IgG\d?[abc]?(?:[_.\-]|$)|isotype",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"^(.+?)[-_.](?:sg|g|grna|sgrna|guide|crispr)?[-_.]?\d{1,2}$", re.IGNORECASE)
_SURFACE = re.compile(r"^(?:CD\d|PD-|HLA-|TCR|Ig[GMDA]|B7)")
_STRANGERS = 10
"""With more than so many Ensembl ids for each other name, the other names are strangers."""
_SHOWN = 3


@dataclass(frozen=True)
class Features:
    """Which features of a matrix are genes.

    Attributes
    ----------
    keep
        Whether each feature is a gene, bool [n_features]; None if all are.
    left_out
        Number of the other features by their type.
    typed
        Whether the file says the types.
    """

    keep: NDArray[np.bool_] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    typed: bool = False


def features_of_frame(
    names: Sequence[str],
    distinct: Callable[..., Sequence[Any] | None],
    column: Callable[[str], pd.Series[Any]],
    identifiers: NDArray[np.str_],
    *,
    where: str,
) -> Features:
    """Find the genes of a var.

    Parameters
    ----------
    names
        Names of its columns.
    distinct
        Gives the different values of a column of text; None for a column of something else. Without ``whole=True``, a
        sample of them is enough.
    column
        Gives a column.
    identifiers
        Gene identifiers that were selected, [n_features].
    where
        Name of the file or object, for messages.

    Raises
    ------
    MalformedMatrixError
        No feature is a gene.
    """
    by_letters = {_letters(name): name for name in reversed(names)}
    named = [by_letters[name] for name in _NAMED if name in by_letters]
    for name in [*named, *(name for name in names if name not in named and not _IDENTIFIERS.search(_letters(name)))]:
        values = distinct(name, whole=name in named)
        if values is None or not _has_types(values, sure=name in named):
            continue
        found = features_of_types(column(name).to_numpy(dtype=object), sure=name in named, where=where)
        if found.typed:
            return found
    return _by_names(identifiers)


def features_of_types(types: NDArray[Any], *, sure: bool = True, where: str) -> Features:
    """Find the genes by the type of each feature; `sure`: the values can be nothing but types.

    Raises
    ------
    MalformedMatrixError
        No feature is a gene.
    """
    texts = ["" if is_missing(kind) else str(kind) for kind in types.tolist()]
    kinds = {text: _kind(text) for text in set(texts)}
    if not _has_types(list(kinds), sure=sure):
        return Features()
    # Beside features of gene expression, a type that nobody knows is not of genes.
    strict = any(_is_expression(_letters(text)) for text in kinds)
    is_gene = {text: kind in ("gene", "") or (kind == "unknown" and not strict) for text, kind in kinds.items()}
    keep = np.array([is_gene[text] for text in texts], dtype=bool)
    left_out = dict(sorted(Counter(text for text in texts if not is_gene[text]).items()))
    if not keep.any():
        raise MalformedMatrixError(
            f"{where} has no features of type 'Gene Expression': its {len(texts)} features are "
            f"{', '.join(left_out)}. Give the file, modality or layer that holds the genes.",
            field="gene_ids",
        )
    return Features(None if keep.all() else keep, left_out, typed=True)


def choose_modality(names: Sequence[str], features: Callable[[str], Features], *, where: str) -> str:
    """Return the modality of genes: the one called rna or gex, else the one whose features say so, else the only one.

    Parameters
    ----------
    names
        Names of the modalities.
    features
        Gives the features of a modality.
    where
        Name of the file or object, for messages.

    Raises
    ------
    MalformedMatrixError
        None of the modalities can be told to have the genes, or several have them.
    """
    called = [name for name in names if _is_expression(_letters(name))]
    if len(called) == 1:
        return called[0]
    found = called or [name for name in names if _says_genes(features, name)] or list(names)
    if len(found) == 1:
        return found[0]
    what = "several modalities that may hold the genes" if len(found) > 1 else "no modality"
    raise MalformedMatrixError(
        f"{where} has {what}: {', '.join(found) or 'none'}. Call the right one rna, or give it alone: "
        "mdata.mod[NAME], or the file that mdata.mod[NAME].write_h5ad(...) writes.",
        field="cells",
    )


def _says_genes(features: Callable[[str], Features], name: str) -> bool:
    try:
        return features(name).typed
    except MalformedMatrixError:  # it has other features only
        return False


def doubtful_names(identifiers: NDArray[np.str_]) -> list[str]:
    """Return warnings of names that look like those of antibodies, hashtags or guides, where no types are known."""
    foreign = _without_ensembl_id(identifiers)
    if not foreign:
        return []
    names: list[str] = identifiers.tolist()
    antibodies = [name for name in foreign if _ANTIBODY.search(name)]
    resolver, known = GeneResolver.default(), set(names)
    # Beside Ensembl ids a symbol is a stranger; among symbols only its like can tell.
    is_by_id = _STRANGERS * len(foreign) < len(names)
    numbered = [
        name
        for name in set(foreign).difference(antibodies)
        # A dot before the number is that of a clone's name (7SK.2), unless its like is there.
        if any(base in known or (is_by_id and "." not in name and resolver.is_spelled(base)) for base in _bases(name))
        and not resolver.is_spelled(name)
    ]
    if is_by_id:
        twice = [name for name in foreign if name not in antibodies and resolver.is_spelled(name)]
    else:
        twice = _named_twice(resolver, names, [name for name in foreign if _SURFACE.match(name)])
    remedy = "Leave them out if they are no genes, or give var a column feature_types."
    warnings = []
    if antibodies:
        warnings.append(f"{_listed(antibodies)}: named like antibodies or hashtags. {remedy}")
    if numbered:
        warnings.append(
            f"{_listed(sorted(numbered))}: named like guides, or like a second feature of the same gene. {remedy}"
        )
    if twice:
        how = "named by symbol among Ensembl ids" if is_by_id else "named like antibodies of genes that are there too"
        warnings.append(f"{_listed(twice)}: {how}, and counted as these genes. {remedy}")
    return warnings


def left_out_sentence(left_out: Mapping[str, int]) -> str:
    """Return the sentence about features that were left out."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.items())
    n = sum(left_out.values())
    return (
        f"{n} {'features are' if n > 1 else 'feature is'} no gene and {'were' if n > 1 else 'was'} left out: {kinds}."
    )


def _bases(name: str) -> list[str]:
    """Return what a name may be a numbered guide of: STAT1 of STAT1-1, STAT1_sg2 and sgSTAT1; nothing for others."""
    match = _NUMBERED.match(name) if name[-1:].isdigit() else None
    base = match.group(1) if match else name
    bare = base[2:] if base.startswith("sg") else base
    return [found for found in dict.fromkeys((base, bare)) if found != name]


def _named_twice(resolver: GeneResolver, names: list[str], suspects: list[str]) -> list[str]:
    """Return those of the `suspects` that name a gene by an alias, which another name means too (CD45 beside PTPRC)."""
    of = {name: gene for name in suspects if (gene := resolver.resolve(name)[0])}
    wanted = set(of.values())
    meant = Counter(gene for name in names if (gene := resolver.resolve(name)[0]) in wanted) if wanted else Counter()
    return [name for name, gene in of.items() if meant[gene] > 1]


def _without_ensembl_id(identifiers: NDArray[np.str_]) -> list[str]:
    """Return the identifiers that are no Ensembl ids; arrays compare their beginnings at once."""
    rest: list[str] = identifiers[identifiers.astype("U3") != "ENS"].tolist()
    return rest


def _by_names(identifiers: NDArray[np.str_]) -> Features:
    """Leave out the names of genomic intervals."""
    if not any(_INTERVAL.match(name) for name in _without_ensembl_id(identifiers)):
        return Features()
    peaks = np.array([_INTERVAL.match(name) is not None for name in identifiers.tolist()], dtype=bool)
    if not peaks.any() or peaks.all():
        return Features()
    return Features(~peaks, {"Peaks": int(peaks.sum())})


def _has_types(values: Sequence[Any], *, sure: bool) -> bool:
    """Return whether these values tell genes from other features, or say that all are genes."""
    texts = [str(value) for value in values if not is_missing(value)]
    if not texts or (not sure and len(texts) > _FEW):
        return False
    kinds = {text: _kind(text) for text in texts}
    strict, other = any(_is_expression(_letters(text)) for text in texts), "other" in kinds.values()
    if sure:
        return strict or other
    return strict and other and "unknown" not in kinds.values()


def _kind(text: str) -> str:
    """Return ``gene``, ``other`` or ``unknown`` for a type; empty for none."""
    letters = _letters(text)
    if not letters:
        return ""
    if _is_expression(letters) or letters.startswith(_BIOTYPES):
        return "gene"
    if letters in _OTHER or any(part in letters for part in _OTHER_PARTS):
        return "other"
    return "gene" if letters.endswith(_BIOTYPE_ENDS) else "unknown"


def _is_expression(letters: str) -> bool:
    return letters in _GENES or letters.startswith("geneexpression")


def _letters(text: str) -> str:
    return "".join(letter for letter in str(text).casefold() if letter.isalnum())


def is_missing(value: Any) -> bool:
    """Return whether a value of a column is missing: None, NaN, NaT or pandas' NA."""
    # NaN is not equal to itself; pd.NA is not equal to anything, and says so with an error.
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{len(names)} feature{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > _SHOWN else ''})"
