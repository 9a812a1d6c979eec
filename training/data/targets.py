"""Genes behind the labels of perturbed cells: guides of one gene, and labels that name nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from perturbscope.cells.genes import GeneResolver

_GUIDE = re.compile(r"^(?:sg[-_.]?)?(?P<gene>.+?)(?:[-_.]?(?:sg|sgrna|guide|g)?[-_.]?\d+|[-_]P\d+(?:P\d+)?)?$", re.I)
"""A guide as screens write it: STAT1g2, STAT1_1, sgSTAT1-2, STAT1-guide3, STAT1_P1P2."""


def genes_of_guides(labels: Iterable[str]) -> dict[str, str]:
    """Return the gene of each label that is the name of a guide, and no gene itself.

    A label counts as one if a known gene is left when the mark of a guide is taken off its ends.
    """
    resolver = GeneResolver.default()
    found = {}
    for label in labels:
        if resolver.resolve(label)[0] is not None:
            continue
        matched = _GUIDE.match(label)
        gene = matched["gene"] if matched else label
        if gene != label and resolver.resolve(gene)[0] is not None:
            found[label] = gene
    return found


def separated(genes: dict[str, str], parts: dict[str, Collection[str]]) -> dict[str, list[str]]:
    """Return the genes whose guides, or whose guides and own label, are in several parts, with these labels."""
    groups: dict[str, list[str]] = {}
    for label, gene in genes.items():
        groups.setdefault(gene, []).append(label)
    where = {label: part for part, labels in parts.items() for label in labels}
    found = {}
    for gene, labels in sorted(groups.items()):
        members = sorted({gene, *labels} & where.keys())
        if len({where[label] for label in members}) > 1:
            found[gene] = members
    return found
