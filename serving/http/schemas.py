"""The bodies of requests and answers, for the OpenAPI document: those of operations follow from their fields.

Nothing is parsed with these models: :mod:`perturbscope.protocol` decodes, for every transport alike. A test checks
real answers against them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model

from perturbscope.protocol.fields import Kind, summary_of
from perturbscope.protocol.messages import ModelInfo
from perturbscope.protocol.operations import Operation
from perturbscope.protocol.tables import form_of
from perturbscope.scoring.results import ScoreOptions


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


_Name = Annotated[str, Field(max_length=512)]
_Index = Annotated[int, Field(ge=0, lt=2**63)]
_Count = Annotated[int, Field(ge=0, description="A whole number; 1.0 is one.")]


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


class Coverage(_Body):
    """How the genes of the request match the model's vocabulary."""

    n_genes: int
    n_matched: int
    n_by_symbol: int
    n_merged: int
    n_ambiguous: int
    ambiguous: list[tuple[str, str]]
    unmatched: list[str]
    left_out: dict[str, int] = Field({}, description="Features of an uploaded file that are no genes, by their type.")


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

    provenance: dict[str, Any] = Field({}, description="Metrics, estimator, null, sizes, seed, options.")


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
    controls: list[str] = Field([], description="All labels that look like those of control cells.")
    recognised: bool = Field(False, description="Whether its name or labels look like those of perturbations.")


class ColumnsAnswer(_Body):
    """The contents of a file; the likely column of perturbations comes first."""

    n_cells: int
    n_genes: int
    columns: list[Column]
    representations: list[str] = Field(description="Matrices of obsm, which can be scored in place of an embedding.")
    layers: list[str] = Field([], description="Places of counts beside X, for the parameter layer.")
    gene_columns: list[str] = Field([], description="Columns of var that hold text, for the parameter gene_key.")


class ProgressAnswer(_Body):
    """How far a request is."""

    stage: str = Field(description="What is being done: receive, decode, inference, score, map and others.")
    percent: int = Field(ge=0, le=100, description="Estimate of how much of a result page is done.")


class OutputAnswer(_Body):
    """Values of one output beside the cell embedding."""

    per: str = Field(description="cell: values has one row a cell; token: one list a cell, with one row a gene.")
    width: int = Field(description="Number of values in a row.")
    meaning: str = Field(description="embedding, logits or value.")
    names: list[str] | None = Field(description="Names of the values in a row, such as classes.")
    values: list[Any] = Field(description="Rows of numbers, or per token lists of them.")
    gene_ids: list[list[str]] = Field([], description="Per token: Ensembl id behind each row of each cell.")


class Error(_Body):
    """An error and its remedy."""

    code: str = Field(description="Stable name of the error.")
    message: str
    field: str | None = Field(description="Field, parameter or header at fault, if known.")


class ErrorAnswer(_Body):
    """The body of every answer that is not 2xx."""

    error: Error


_NUMBERS: Mapping[str, Any] = {"i": int, "u": int, "b": bool, "f": float | None}
_PLAIN: Mapping[Kind, Any] = {"text": str, "integer": int, "number": float, "flag": bool, "texts": list[str]}
_TAKEN: Mapping[Kind, Any] = {
    **_PLAIN,
    "cells": Cells,
    "vectors": list[list[float]],
    "labels": Annotated[list[_Name], Field(min_length=1)],
    "text": _Name,
    "texts": list[_Name],
    "names": _Name | Annotated[list[_Name], Field(min_length=1)],
    "pairs": list[tuple[_Name, _Name]],
    "options": dict[str, Any],
}
"""Type of each kind of field in a request."""
_GIVEN: Mapping[Kind, Any] = {
    **_PLAIN,
    "vectors": list[list[float]],
    "labels": list[str],
    "outputs": dict[str, OutputAnswer],
}
"""Type of each kind of field in an answer."""


@functools.cache
def taken(operation: Operation[Any, Any]) -> type[BaseModel]:
    """Return the model of an operation's request."""
    values: dict[str, Any] = {}
    for item in operation.takes.fields:
        kind = _list_of(_NUMBERS[item.dtype.kind]) if item.kind == "numbers" else _TAKEN[item.kind]
        values[item.name] = (
            (kind, Field(description=item.doc)) if item.required else (kind | None, Field(None, description=item.doc))
        )
    return create_model(operation.takes.name, __base__=_Body, __doc__=summary_of(operation.request), **values)


@functools.cache
def given(operation: Operation[Any, Any]) -> type[BaseModel]:
    """Return the model of an operation's answer."""
    form = operation.gives
    values: dict[str, Any] = {}
    for item in form.fields:
        kind: Any
        if item.kind == "numbers":
            kind = _list_of(float if item.finite else _NUMBERS[item.dtype.kind])
        elif item.kind == "meta":
            kind = Meta if form.name == "EmbedAnswer" else ScoreMeta
        elif item.kind == "table":
            kind = _list_of(_row(form.name.replace("Answer", "Row"), item.columns))
        elif item.kind == "records":
            kind = _list_of(_record(item.record))
        else:
            kind = _GIVEN[item.kind]
        absent: dict[str, Any] = {"default": {}} if item.kind == "outputs" else {}
        values[item.name] = (kind | None if item.optional else kind, Field(description=item.doc, **absent))
    return create_model(form.name, __base__=_Body, __doc__=summary_of(operation.answer), **values)


def _list_of(item: Any) -> Any:
    return list[item]


def _row(name: str, columns: Mapping[str, Kind]) -> type[BaseModel]:
    """Return the model of a row of a table, in which a number that is not defined is null."""
    values: dict[str, Any] = {
        column: (float | None if kind == "number" else _PLAIN[kind], Field()) for column, kind in columns.items()
    }
    return create_model(name, __base__=_Body, **values)


def _record_of(record: Any) -> type[BaseModel]:
    """Return the model of a row of records, whose fields an answer always has."""
    values: dict[str, Any] = {
        item.name: (
            _list_of(_record(item.record)) if item.kind == "records" else _PLAIN[item.kind],
            Field(description=item.doc),
        )
        for item in form_of(record).fields
    }
    return create_model(record.__name__.removesuffix("Info"), __base__=_Body, __doc__=summary_of(record), **values)


_record: Callable[[Any], type[BaseModel]] = functools.cache(_record_of)
Model = _record(ModelInfo)
"""One model that is served."""


_CELLS = {
    "gene_ids": ["ENSG00000115415", "ENSG00000168610", "IRF1"],
    "indptr": [0, 3, 5],
    "indices": [0, 1, 2, 0, 2],
    "data": [4, 1, 2, 7, 1],
}
_LABELLED: dict[str, Any] = {
    "embeddings": [[1.0, 0.0], [0.9, 0.1], [1.0, 0.2], [0.8, 0.0], [0.1, 1.0], [0.0, 0.9], [0.2, 1.0], [0.1, 0.8]],
    "perturbations": ["control", "control", "control", "control", "STAT1", "STAT1", "STAT1", "STAT1"],
    "control": "control",
    "options": {"min_cells": 4, "permutations": 19},
}
_EXAMPLES = {"score": _LABELLED, "compare": _LABELLED | {"pairs": [["STAT1", "control"]]}}


def example(operation: Operation[Any, Any]) -> dict[str, Any] | None:
    """Return a valid body of an operation; None if its fields do not tell one."""
    if operation.name in _EXAMPLES:
        return _EXAMPLES[operation.name]
    required = [item for item in operation.takes.fields if item.required]
    return {item.name: _CELLS for item in required} if {item.kind for item in required} == {"cells"} else None


def body(operation: Operation[Any, Any]) -> dict[str, Any]:
    """Return the JSON schema of an operation's request."""
    schema = inlined(taken(operation))
    for item in operation.takes.of("options"):
        schema["properties"][item.name]["anyOf"][0] = TypeAdapter(ScoreOptions).json_schema()
    return schema


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a model without references, so that it can stand anywhere in a document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
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
