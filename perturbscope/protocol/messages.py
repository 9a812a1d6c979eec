"""Requests and answers as dataclasses, independent of the format that they travel in.

From their fields follow all formats; see :mod:`perturbscope.protocol.fields`. A field without a default is required.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol.fields import Meta, PerRow
from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

Perturbations = Annotated[tuple[str, ...], PerRow("perturbation")]
Batches = Annotated[tuple[str, ...], PerRow("batch")]
Vectors = Annotated[NDArray[np.float32], PerRow("embedding")]


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbedRequest:
    """A request to embed cells.

    Attributes
    ----------
    cells
        Raw counts.
    model
        Name, name@version or model_id of a model; the server's first one by default.
    outputs
        Names of outputs that are wanted beside the cell embedding, such as gene_embedding; the model's description
        lists them.
    """

    cells: CountMatrix
    model: str | None = None
    outputs: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreRequest:
    """A request to score perturbations against controls, from cells or from embeddings that the caller already has.

    Attributes
    ----------
    cells
        Raw counts; give either cells or embeddings.
    embeddings
        Vectors, float32 [n_cells, width]; give either cells or embeddings.
    perturbations
        Label of each cell.
    batches
        Batch of each cell; labels are permuted within batches.
    options
        Options of the statistic.
    model
        Name, name@version or model_id of a model; the server's first one by default. It has no effect on embeddings.
    control
        The label of control cells, or several of them.

    Raises
    ------
    InvalidParameterError
        Neither or both of `cells` and `embeddings` are given, or there is not one label for each cell.
    InvalidEmbeddingError
        The embeddings are not a matrix of finite numbers.
    """

    cells: CountMatrix | None = None
    embeddings: Vectors | None = None
    perturbations: Perturbations
    batches: Batches | None = None
    options: ScoreOptions = field(default_factory=ScoreOptions)
    model: str | None = None
    control: str | tuple[str, ...]

    def __post_init__(self) -> None:
        _check_labelled(self.cells, self.embeddings, self.perturbations, self.batches)


@dataclass(frozen=True, kw_only=True, eq=False)
class CompareRequest:
    """A request to compare perturbations with each other. Raises as :class:`ScoreRequest`.

    Attributes
    ----------
    cells
        Raw counts; give either cells or embeddings.
    embeddings
        Vectors, float32 [n_cells, width]; give either cells or embeddings.
    perturbations
        Label of each cell.
    batches
        Batch of each cell; labels are permuted within batches.
    options
        Options of the statistic.
    model
        Name, name@version or model_id of a model; the server's first one by default. It has no effect on embeddings.
    pairs
        Pairs of labels to compare; all pairs by default.
    control
        The label of control cells, or several, which all pairs leave out.
    """

    cells: CountMatrix | None = None
    embeddings: Vectors | None = None
    perturbations: Perturbations
    batches: Batches | None = None
    options: ScoreOptions = field(default_factory=ScoreOptions)
    model: str | None = None
    pairs: tuple[tuple[str, str], ...] | None = None
    control: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_labelled(self.cells, self.embeddings, self.perturbations, self.batches)
        if self.pairs is not None and not self.pairs:
            raise InvalidParameterError("pairs is empty; leave it out to compare all pairs.", field="pairs")


@dataclass(frozen=True, kw_only=True)
class ModelsRequest:
    """A request for the models that a server offers."""


EmbedAnswer = Embeddings
"""The answer to :class:`EmbedRequest`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreAnswer:
    """The answer to :class:`ScoreRequest`.

    Attributes
    ----------
    result
        Table of scores. Its `warnings` hold those of the embedding too.
    meta
        The model behind it.
    """

    result: ScoreResult
    meta: Meta = field(default_factory=Meta)


@dataclass(frozen=True, kw_only=True, eq=False)
class CompareAnswer:
    """The answer to :class:`CompareRequest`.

    Attributes
    ----------
    result
        Table of pairs. Its `warnings` hold those of the embedding too.
    meta
        The model behind it.
    """

    result: CompareResult
    meta: Meta = field(default_factory=Meta)


@dataclass(frozen=True, kw_only=True)
class OutputInfo:
    """One output of a model.

    Attributes
    ----------
    name
        Name of the output in requests.
    per
        cell or token: what has a row of values.
    width
        Number of values in a row.
    meaning
        embedding, logits or value.
    names
        Names of the columns, such as the classes of logits; empty: the columns have none.
    """

    name: str
    per: str
    width: int
    meaning: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelProblem:
    """A folder of bundles that is not served, or not as its files are now.

    Attributes
    ----------
    name
        Name of the folder.
    problem
        Sentence about why.
    """

    name: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One model that a server offers. Fields with a default are those that an older server does not send.

    Attributes
    ----------
    name
        Name of the model in requests.
    version
        Version of its bundle.
    model_id
        Name, version and hash of the weights; it changes whenever they do.
    family
        Family of the tokenizer.
    width
        Dimensions of an embedding.
    vocabulary_hash
        Hash of the vocabulary.
    layer
        Hidden state that is pooled.
    pooling
        Method that turns the states of tokens into one vector.
    licence
        Licence of the weights.
    variant
        Graph that is served: fp32, fp16, int8.
    device
        Device that runs it: cpu or cuda.
    golden
        matched: the model gives the vectors that its bundle records; absent: it records none; empty if the server does
        not say.
    outputs
        Outputs of the model, the cell embedding among them; empty if the server does not say.
    task
        What the model was made for: embedding, cell_classification or gene_classification; empty if the server does
        not say.
    capabilities
        What the model can be asked for, embed among them.
    classes
        Names of the classes between which it decides; empty: it is no classifier.
    max_length
        Number of tokens of the longest cell that it reads; 0 if the server does not say.
    vocabulary_genes
        Number of genes of its vocabulary; 0 if the server does not say.
    panel_genes
        Number of the only genes that it was made for; 0: all of the vocabulary.
    memory_bytes
        Estimated bytes of memory that it takes, its largest batch included; 0 if the server does not say.
    signature
        What the server knows of the signature of its bundle: absent, unchecked (the server trusts no signers), trusted
        or untrusted; empty if the server does not say.
    signer
        Name of the signer, if the signature is trusted.
    """

    name: str
    version: str
    model_id: str
    family: str
    width: int
    vocabulary_hash: str
    layer: str
    pooling: str
    licence: str
    variant: str
    device: str
    golden: str = ""
    outputs: tuple[OutputInfo, ...] = ()
    task: str = ""
    capabilities: tuple[str, ...] = ("embed",)
    classes: tuple[str, ...] = ()
    max_length: int = 0
    vocabulary_genes: int = 0
    panel_genes: int = 0
    memory_bytes: int = 0
    signature: str = ""
    signer: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelsAnswer:
    """The answer to :class:`ModelsRequest`.

    Attributes
    ----------
    models
        The models; the first is the default.
    problems
        Folders of bundles that are not served, or not as their files are now.
    """

    models: tuple[ModelInfo, ...]
    problems: tuple[ModelProblem, ...] = ()


Request: TypeAlias = Any
"""A request of any operation of :mod:`perturbscope.protocol.operations`."""
Answer: TypeAlias = Any
"""The answer to a request of any operation."""


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
