"""The tokens of each cell: an operation as somebody would add it, in this one module."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol.fields import Meta
from perturbscope.protocol.operations import Operation


@dataclass(frozen=True, kw_only=True, eq=False)
class CountTokensRequest:
    """A request to count the tokens of cells.

    Attributes
    ----------
    cells
        Raw counts.
    model
        Name of a model; the server's first one by default.
    most
        Largest number that is reported.
    """

    cells: CountMatrix
    model: str | None = None
    most: int = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class CountTokensAnswer:
    """The number of tokens of each cell.

    Attributes
    ----------
    n_tokens
        Tokens that the model would see of each cell.
    meta
        The model that was asked.
    """

    n_tokens: NDArray[np.int32]
    meta: Meta = field(default_factory=Meta)


def count_tokens(model: Embedder, request: CountTokensRequest) -> CountTokensAnswer:
    """Tokenize, and run nothing."""
    tokens = model.tokenize(request.cells)
    return CountTokensAnswer(
        n_tokens=np.minimum(tokens.lengths, request.most).astype(np.int32),
        meta=Meta(model_id=model.model_id, vocabulary_hash=model.vocabulary_hash, coverage=tokens.coverage),
    )


OPERATION = Operation(
    name="count_tokens",
    summary="The number of tokens of each cell.",
    request=CountTokensRequest,
    answer=CountTokensAnswer,
    run=count_tokens,
    per_cell=True,
)
