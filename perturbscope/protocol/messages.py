"""Requests and answers as dataclasses, independent of the format that they travel in.

A format encodes a request field by field, in the order of the fields here; a field without a default is required.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbedRequest:
    """A request to embed cells."""

    path: ClassVar[str] = "/v1/embed"

    cells: CountMatrix
    """Raw counts."""
    model: str | None = None
    """Name of a model; None: the server's default."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreRequest:
    """A request to score perturbations against controls, from cells or from embeddings that the caller already has.

    Raises
    ------
    InvalidParameterError
        Neither or both of `cells` and `embeddings` are given, or there is not one label for each cell.
    InvalidEmbeddingError
        The embeddings are not a matrix of finite numbers.
    """

    path: ClassVar[str] = "/v1/score"

    cells: CountMatrix | None = None
    """Raw counts, or None."""
    embeddings: NDArray[np.float32] | None = None
    """float32 [n_cells, width], or None."""
    perturbations: tuple[str, ...]
    """Label of each cell."""
    batches: tuple[str, ...] | None = None
    """Batch of each cell; labels are permuted within batches."""
    options: ScoreOptions = field(default_factory=ScoreOptions)
    """Options of the statistic."""
    model: str | None = None
    """Name of a model; None: the server's default. It has no effect on embeddings."""
    control: str
    """Label of the control cells."""

    def __post_init__(self) -> None:
        _check_labelled(self.cells, self.embeddings, self.perturbations, self.batches)


@dataclass(frozen=True, kw_only=True, eq=False)
class CompareRequest:
    """A request to compare perturbations with each other. Raises as :class:`ScoreRequest`."""

    path: ClassVar[str] = "/v1/compare"

    cells: CountMatrix | None = None
    """Raw counts, or None."""
    embeddings: NDArray[np.float32] | None = None
    """float32 [n_cells, width], or None."""
    perturbations: tuple[str, ...]
    """Label of each cell."""
    batches: tuple[str, ...] | None = None
    """Batch of each cell."""
    options: ScoreOptions = field(default_factory=ScoreOptions)
    """Options of the statistic."""
    model: str | None = None
    """Name of a model; None: the server's default. It has no effect on embeddings."""
    pairs: tuple[tuple[str, str], ...] | None = None
    """Pairs of labels to compare; None: all pairs."""
    control: str | None = None
    """Label of the control cells, which "all pairs" leaves out."""

    def __post_init__(self) -> None:
        _check_labelled(self.cells, self.embeddings, self.perturbations, self.batches)
        if self.pairs is not None and not self.pairs:
            raise InvalidParameterError("pairs is empty; leave it out to compare all pairs.", field="pairs")


@dataclass(frozen=True, kw_only=True)
class ModelsRequest:
    """A request for the models that a server offers."""

    path: ClassVar[str] = "/v1/models"


EmbedAnswer = Embeddings
"""The answer to :class:`EmbedRequest`."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The model behind an answer. Its names and the coverage are None if the caller sent embeddings."""

    model_id: str | None = None
    vocabulary_hash: str | None = None
    coverage: GeneCoverage | None = None
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by stage: ``tokenize``, ``queue``, ``inference``, ``score``."""
    variant: str | None = None
    """Graph of the model: ``fp32``, ``fp16``, ``int8``; None also if the server does not say."""


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
    """Name of the model in requests."""
    version: str
    model_id: str
    """Name, version and hash of the weights; it changes whenever they do."""
    family: str
    """Family of the tokenizer."""
    width: int
    """Dimensions of an embedding."""
    vocabulary_hash: str
    layer: str
    """Hidden state that is pooled."""
    pooling: str
    """Method that turns the states of tokens into one vector."""
    licence: str
    variant: str
    """Graph that is served: ``fp32``, ``fp16``, ``int8``."""
    device: str
    """``cpu`` or ``cuda``."""
    golden: str = ""
    """``matched`` if the model gives the vectors that its bundle records, ``absent`` if it records none; empty if the
    server does not say."""


@dataclass(frozen=True, kw_only=True)
class ModelsAnswer:
    """The answer to :class:`ModelsRequest`; the first model is the default."""

    models: tuple[ModelInfo, ...]


Request = EmbedRequest | ScoreRequest | CompareRequest | ModelsRequest
Answer = Embeddings | ScoreAnswer | CompareAnswer | ModelsAnswer
AnyRequest = TypeVar("AnyRequest", bound=Request)
AnyAnswer = TypeVar("AnyAnswer", bound=Answer)
ANSWERS: Mapping[type[Request], type[Answer]] = {
    EmbedRequest: Embeddings,
    ScoreRequest: ScoreAnswer,
    CompareRequest: CompareAnswer,
    ModelsRequest: ModelsAnswer,
}
"""Type of the answer to each type of request."""


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
