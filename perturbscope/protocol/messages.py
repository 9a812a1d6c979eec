"""Requests and answers, the same whatever they travel as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError
from perturbscope.inference.embedder import Embeddings
from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbedRequest:
    """Embed cells."""

    path: ClassVar[str] = "/v1/embed"

    cells: CountMatrix
    """Raw counts."""
    model: str | None = None
    """Name of a model; None: the server's default."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreRequest:
    """Score perturbations against controls, from cells or from embeddings that the caller already has.

    Raises
    ------
    InvalidParameterError
        Neither or both of `cells` and `embeddings`, or labels that are not one a cell.
    InvalidEmbeddingError
        Embeddings that are not a matrix of finite numbers.
    """

    path: ClassVar[str] = "/v1/score"

    cells: CountMatrix | None = None
    """Raw counts, or None."""
    embeddings: NDArray[np.float32] | None = None
    """float32 [n_cells, width], or None."""
    perturbations: tuple[str, ...]
    """Label of each cell."""
    control: str
    """The label of control cells."""
    batches: tuple[str, ...] | None = None
    """Batch of each cell; labels are permuted within batches."""
    options: ScoreOptions = field(default_factory=ScoreOptions)
    model: str | None = None
    """Name of a model; None: the server's default. Without effect where embeddings are given."""

    def __post_init__(self) -> None:
        _check_labelled(self.cells, self.embeddings, self.perturbations, self.batches)


@dataclass(frozen=True, kw_only=True, eq=False)
class CompareRequest:
    """Compare perturbations with each other. Raises as :class:`ScoreRequest`."""

    path: ClassVar[str] = "/v1/compare"

    cells: CountMatrix | None = None
    """Raw counts, or None."""
    embeddings: NDArray[np.float32] | None = None
    """float32 [n_cells, width], or None."""
    perturbations: tuple[str, ...]
    """Label of each cell."""
    pairs: tuple[tuple[str, str], ...] | None = None
    """Which to compare; None: all pairs."""
    control: str | None = None
    """The label of control cells, which "all pairs" leaves out."""
    batches: tuple[str, ...] | None = None
    """Batch of each cell."""
    options: ScoreOptions = field(default_factory=ScoreOptions)
    model: str | None = None
    """Name of a model; None: the server's default. Without effect where embeddings are given."""

    def __post_init__(self) -> None:
        _check_labelled(self.cells, self.embeddings, self.perturbations, self.batches)
        if self.pairs is not None and not self.pairs:
            raise InvalidParameterError("pairs is empty; leave it out to compare all pairs.", field="pairs")


@dataclass(frozen=True, kw_only=True)
class ModelsRequest:
    """Ask which models a server offers."""

    path: ClassVar[str] = "/v1/models"


EmbedAnswer = Embeddings
"""The answer to :class:`EmbedRequest`."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What made an answer. The names and the coverage are None where the caller sent embeddings."""

    model_id: str | None = None
    vocabulary_hash: str | None = None
    coverage: GeneCoverage | None = None
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by stage: ``tokenize``, ``queue``, ``inference``, ``score``."""
    variant: str | None = None
    """The graph: ``fp32``, ``fp16``, ``int8``; None also from a server that does not say."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreAnswer:
    """The answer to :class:`ScoreRequest`."""

    result: ScoreResult
    """Its `warnings` hold those of the embedding too."""
    meta: Meta = field(default_factory=Meta)


@dataclass(frozen=True, kw_only=True, eq=False)
class CompareAnswer:
    """The answer to :class:`CompareRequest`."""

    result: CompareResult
    """Its `warnings` hold those of the embedding too."""
    meta: Meta = field(default_factory=Meta)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One model that a server offers."""

    name: str
    """What requests name it by."""
    version: str
    model_id: str
    """Changes whenever the weights do."""
    family: str
    """Family of the tokenizer."""
    width: int
    """Dimensions of an embedding."""
    vocabulary_hash: str
    layer: str
    """Which hidden state is pooled."""
    pooling: str
    """How tokens become one vector."""
    licence: str
    variant: str
    """The graph that is served: ``fp32``, ``fp16``, ``int8``."""
    device: str
    """``cpu`` or ``cuda``."""
    golden: str = ""
    """``matched`` where the model gives the vectors that its bundle records, ``absent`` where it records none; empty
    from a server that does not say."""


@dataclass(frozen=True, kw_only=True)
class ModelsAnswer:
    """The answer to :class:`ModelsRequest`; the first model is the default."""

    models: tuple[ModelInfo, ...]


Request = EmbedRequest | ScoreRequest | CompareRequest | ModelsRequest
Answer = Embeddings | ScoreAnswer | CompareAnswer | ModelsAnswer


def _check_labelled(
    cells: CountMatrix | None,
    embeddings: NDArray[np.float32] | None,
    perturbations: Sequence[str],
    batches: Sequence[str] | None,
) -> None:
    if (cells is None) == (embeddings is None):
        raise InvalidParameterError(
            f"{'Neither' if cells is None else 'Both'} of cells and embeddings given; give one of the two.",
            field="cells",
        )
    if embeddings is not None:
        _check_embeddings(embeddings)
    n_cells = len(cells) if cells is not None else len(embeddings) if embeddings is not None else 0
    for name, labels in (("perturbations", perturbations), ("batches", batches)):
        if labels is not None and len(labels) != n_cells:
            raise InvalidParameterError(
                f"{name} has {len(labels)} labels for {n_cells} cells; give one a cell, in their order.", field=name
            )


def _check_embeddings(embeddings: NDArray[np.float32]) -> None:
    shape = embeddings.shape
    if len(shape) != 2 or embeddings.dtype != np.float32 or not embeddings.size:
        raise InvalidEmbeddingError(
            f"Embeddings have shape {shape} and dtype {embeddings.dtype}; float32 [cells, width] is needed.",
            field="embeddings",
        )
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        raise InvalidEmbeddingError(
            f"Embeddings of {len(broken)} cells hold NaN or infinity (first: row {int(broken[0])}). "
            "Remove these cells, or embed them again.",
            field="embeddings",
        )
