"""The genes that a model knows: what an identifier must be to count, and what ranks are made with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from perturbscope.inference.embedder import Embedder
from perturbscope.protocol.fields import Labels, Meta
from perturbscope.protocol.operations import Operation


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyRequest:
    """A request for the vocabulary of a model.

    Attributes
    ----------
    model
        Name, name@version or model_id of a model; the server's first one by default.
    """

    model: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyAnswer:
    """The genes of a model's vocabulary, in the order of their tokens, and its special tokens.

    Attributes
    ----------
    gene_id
        Ensembl id of each gene. Symbols, earlier ids and versions of ids are resolved to these.
    token
        Token id of each gene.
    median
        Median of each gene's non-zero counts per 10,000; a cell's genes are ranked by count / median.
    special_tokens
        Names of the tokens that stand for no gene, such as <pad>.
    special_ids
        Their token ids, as text, in the same order.
    max_length
        Number of tokens of the longest cell that the model reads; of longer ones the last ranks are left out.
    source
        Description of the cells that the medians were computed from.
    meta
        The model that was asked.
    """

    gene_id: Labels
    token: NDArray[np.int64]
    median: NDArray[np.float64]
    special_tokens: tuple[str, ...]
    special_ids: tuple[str, ...]
    max_length: int
    source: str
    meta: Meta = field(default_factory=Meta)


def vocabulary(model: Embedder, _request: VocabularyRequest) -> VocabularyAnswer:
    """Return the vocabulary of a model's family."""
    known = model.family.vocabulary
    special = sorted(known.special_tokens.items(), key=lambda item: item[1])
    return VocabularyAnswer(
        gene_id=known.gene_ids,
        token=known.tokens.astype(np.int64),
        median=known.medians,
        special_tokens=tuple(name for name, _ in special),
        special_ids=tuple(str(token) for _, token in special),
        max_length=model.family.max_length,
        source=known.source,
        meta=Meta(model_id=model.model_id, vocabulary_hash=model.vocabulary_hash),
    )


OPERATION = Operation(
    name="vocabulary",
    summary="The genes that a model knows, with their tokens and medians.",
    request=VocabularyRequest,
    answer=VocabularyAnswer,
    run=vocabulary,
)
