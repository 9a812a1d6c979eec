"""The bodies of requests and answers, for the OpenAPI document.

Nothing is parsed with these models: :mod:`perturbscope.protocol` decodes, for every transport alike. A test checks
real answers against them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from perturbscope.scoring.results import ScoreOptions


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


_Name = Annotated[str, Field(max_length=512)]
_Index = Annotated[int, Field(ge=0, lt=2**63)]
_Count = Annotated[int, Field(ge=0, description="A whole number; 1.0 is one.")]


_MODEL = "Name, name@version or model_id of a model; the server's first one by default."


class Cells(_Body):
    """Raw counts, cells x genes, as the three arrays of a CSR matrix."""

    gene_ids: list[_Name] = Field(description="Ensembl id or symbol of each column.", min_length=1)
    indptr: list[_Index] = Field(description="Index of each cell's first value, and of the end.", min_length=2)
    indices: list[_Index] = Field(description="Column of each value.")
    data: list[_Count] = Field(description="The raw counts.")
    total_counts: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="Total counts of each cell over all measured genes, if the matrix holds only some of them."
    )
    first_row: _Index = Field(0, description="Row of the first cell in the caller's file; for messages only.")


class EmbedBody(_Body):
    """Cells to embed."""

    cells: Cells
    model: _Name | None = Field(None, description=_MODEL)


class _Labelled(_Body):
    cells: Cells | None = Field(None, description="Raw counts; give either cells or embeddings.")
    embeddings: list[list[float]] | None = Field(None, description="Vectors; give either cells or embeddings.")
    perturbations: list[_Name] = Field(description="Label of each cell.", min_length=1)
    batches: list[_Name] | None = Field(None, description="Batch of each cell; labels are permuted within batches.")
    options: dict[str, Any] | None = Field(None, description="Options of scoring; see the schema ScoreOptions.")
    model: _Name | None = Field(None, description=_MODEL)


class ScoreBody(_Labelled):
    """Cells, or embeddings, with their perturbations."""

    control: _Name = Field(description="The label of control cells.")


class CompareBody(_Labelled):
    """Cells, or embeddings, with their perturbations."""

    control: _Name | None = Field(None, description="The label of control cells, which all pairs leave out.")
    pairs: list[tuple[_Name, _Name]] | None = Field(None, description="Pairs to compare; all by default.")


class Coverage(_Body):
    """How the genes of the request match the model's vocabulary."""

    n_genes: int
    n_matched: int
    n_by_symbol: int
    n_merged: int
    n_ambiguous: int
    ambiguous: list[tuple[str, str]]
    unmatched: list[str]


class Meta(_Body):
    """How an answer was made; model, vocabulary, coverage and variant are null if the caller sent embeddings."""

    model_id: str | None
    vocabulary_hash: str | None
    coverage: Coverage | None
    warnings: list[str]
    timings: dict[str, float] = Field(description="Seconds by stage: tokenize, queue, inference, score.")
    variant: str | None = Field(description="Graph of the model: fp32, fp16, int8.")


class ScoreMeta(Meta):
    """Meta, with the provenance of the numbers."""

    provenance: dict[str, Any] = Field(description="Metrics, estimator, null, sizes, seed, options.")


class EmbedAnswer(_Body):
    """Vectors, in the order of the cells."""

    embeddings: list[list[float]]
    lengths: list[int] = Field(description="Tokens that the model saw of each cell.")
    n_detected: list[int] = Field(description="Genes of the vocabulary that each cell expresses.")
    known_share: list[float] = Field(description="Share of each cell's counts in genes of the vocabulary.")
    below_min_genes: list[bool] = Field(description="Cells that express fewer than 500 genes.")
    meta: Meta


class _Row(_Body):
    metric: str
    distance: float | None
    null_mean: float | None
    null_sd: float | None
    z: float | None
    p: float | None
    q: float | None
    flags: str = Field(description="Names of flags, joined by semicolons.")


class ScoreRow(_Row):
    """One perturbation by one metric; null if a number is not defined."""

    perturbation: str
    n_cells: int
    n_controls: int


class CompareRow(_Row):
    """Two perturbations by one metric."""

    a: str
    b: str
    n_a: int
    n_b: int


class ScoreAnswer(_Body):
    """The table of scores."""

    results: list[ScoreRow]
    meta: ScoreMeta


class CompareAnswer(_Body):
    """The table of pairs."""

    results: list[CompareRow]
    meta: ScoreMeta


class Label(_Body):
    """A label, and how many cells carry it."""

    label: str
    n_cells: int


class Column(_Body):
    """A column of labels."""

    name: str
    n_labels: int
    labels: list[Label] = Field(description="The most frequent first.")
    control: str | None = Field(description="Label that looks like that of control cells.")


class ColumnsAnswer(_Body):
    """The contents of a file; the likely column of perturbations comes first."""

    n_cells: int
    n_genes: int
    columns: list[Column]
    representations: list[str] = Field(description="Matrices of obsm, which can be scored in place of an embedding.")


class Output(_Body):
    """One output of a model."""

    name: str = Field(description="Name of the output in requests.")
    per: str = Field(description="cell or token: what has a row of values.")
    width: int = Field(description="Number of values in a row.")
    meaning: str = Field(description="embedding, logits or value.")
    names: list[str] = Field(description="Names of the columns, such as the classes of logits; or none.")


class Problem(_Body):
    """A folder of bundles that is not served, or not as its files are now."""

    name: str
    problem: str


class Model(_Body):
    """One model that is served."""

    name: str = Field(description="Name of the model in requests.")
    version: str
    model_id: str = Field(description="Changes whenever the weights do.")
    family: str
    width: int = Field(description="Dimensions of an embedding.")
    vocabulary_hash: str
    layer: str
    pooling: str
    licence: str
    variant: str
    device: str
    golden: str = Field(description="matched: the model gives the vectors that its bundle records; or absent.")
    outputs: list[Output]
    task: str = Field(description="What the model was made for: embedding, cell_classification, gene_classification.")
    capabilities: list[str] = Field(description="What the model can be asked for.")
    classes: list[str] = Field(description="Classes between which it decides; empty: it is no classifier.")
    max_length: int = Field(description="Tokens of the longest cell that it reads.")
    vocabulary_genes: int
    panel_genes: int = Field(description="Number of the only genes that it was made for; 0: all of the vocabulary.")
    memory_bytes: int = Field(description="Estimated memory, its largest batch included.")


class ModelsAnswer(_Body):
    """The models that are served; the first is the default."""

    models: list[Model]
    problems: list[Problem]


class Error(_Body):
    """An error and its remedy."""

    code: str = Field(description="Stable name of the error.")
    message: str
    field: str | None = Field(description="Field, parameter or header at fault, if known.")


class ErrorAnswer(_Body):
    """The body of every answer that is not 2xx."""

    error: Error


_LABELLED: dict[str, Any] = {
    "embeddings": [[1.0, 0.0], [0.9, 0.1], [1.0, 0.2], [0.8, 0.0], [0.1, 1.0], [0.0, 0.9], [0.2, 1.0], [0.1, 0.8]],
    "perturbations": ["control", "control", "control", "control", "STAT1", "STAT1", "STAT1", "STAT1"],
    "control": "control",
    "options": {"min_cells": 4, "permutations": 19},
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "EmbedBody": {
        "cells": {
            "gene_ids": ["ENSG00000115415", "ENSG00000168610", "IRF1"],
            "indptr": [0, 3, 5],
            "indices": [0, 1, 2, 0, 2],
            "data": [4, 1, 2, 7, 1],
        }
    },
    "ScoreBody": _LABELLED,
    "CompareBody": _LABELLED | {"pairs": [["STAT1", "control"]]},
}
"""Valid example bodies, by name of their class."""


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a model without references, so that it can stand anywhere in a document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    if "options" in schema.get("properties", {}):
        schema["properties"]["options"]["anyOf"][0] = TypeAdapter(ScoreOptions).json_schema()
    resolved: dict[str, Any] = _resolve(schema, definitions)
    return resolved


def _resolve(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        if "$ref" in node:
            return _resolve(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
        return {key: _resolve(value, definitions) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolve(item, definitions) for item in node]
    return node
