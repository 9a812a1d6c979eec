"""The forms of messages, those of embeddings and scores in particular, and the parts that all formats read alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError
from perturbscope.inference.embeddings import Embeddings, OutputValues
from perturbscope.protocol import checks as check
from perturbscope.protocol.fields import Field, Form, Kind, Meta, plain_form
from perturbscope.protocol.messages import CompareAnswer, ScoreAnswer
from perturbscope.scoring.results import COMPARE_COLUMNS, SCORE_COLUMNS, CompareResult, ScoreResult
from perturbscope.threads import checkpoint

_STEP = 4096
"""Rows that are read between two checkpoints."""
_TEXT = {"perturbation", "a", "b", "metric", "flags", "p_source", "p_tail_source", "fired"}
_INTEGER = {"n_cells", "n_controls", "n_a", "n_b", "n_used", "n_used_a", "n_used_b", "exchanges"}
_ADDED = {"n_used", "n_used_a", "n_used_b", "p_source", "exchanges", "p_tail", "p_tail_source"}
_ADDED |= {"p_omnibus", "q_omnibus", "fired", "effect_similarity"}
"""Columns that answers of older servers lack."""
_ABSENT: dict[Kind, Any] = {"text": "", "integer": 0, "number": None}


def _kinds(columns: Sequence[str]) -> dict[str, Kind]:
    return {name: "text" if name in _TEXT else "integer" if name in _INTEGER else "number" for name in columns}


SCORE_KINDS = _kinds(SCORE_COLUMNS)
"""Type of each column of a table of scores."""
COMPARE_KINDS = _kinds(COMPARE_COLUMNS)
"""Type of each column of a table of pairs."""
_CASTS: dict[Kind, Any] = {"text": str, "integer": int, "number": float}
_DTYPES: dict[Kind, Any] = {"text": object, "integer": np.int64, "number": np.float64}


def meta_to_dict(meta: Meta) -> dict[str, Any]:
    """Return the JSON form of an answer's meta."""
    found = {
        "model_id": meta.model_id,
        "vocabulary_hash": meta.vocabulary_hash,
        "coverage": meta.coverage.to_dict() if meta.coverage else None,
        "warnings": list(meta.warnings),
        "timings": meta.timings,
        "variant": meta.variant,
    }
    return found if meta.provenance is None else {**found, "provenance": meta.provenance}


def meta_from_dict(value: Any) -> Meta:
    """Read the meta of an answer. Fields that a newer server adds are ignored."""
    if not isinstance(value, Mapping):
        raise InvalidParameterError(f"meta must be an object; got {check.shown(value)}.", field="meta")
    timings = value.get("timings") or {}
    provenance = value.get("provenance")
    if not isinstance(timings, Mapping):
        raise InvalidParameterError("timings must be an object of numbers.", field="timings")
    if provenance is not None and not isinstance(provenance, Mapping):
        raise InvalidParameterError("provenance must be an object.", field="provenance")
    return Meta(
        model_id=check.optional_text(value.get("model_id"), "model_id"),
        vocabulary_hash=check.optional_text(value.get("vocabulary_hash"), "vocabulary_hash"),
        coverage=_coverage(value.get("coverage")),
        timings={str(stage): check.number(seconds, "timings") for stage, seconds in timings.items()},
        variant=check.optional_text(value.get("variant"), "variant"),
        warnings=check.texts(value.get("warnings") or [], "warnings", longest=100_000),
        provenance=None if provenance is None else dict(provenance),
    )


def _coverage(value: Any) -> GeneCoverage | None:
    if value is None:
        return None
    try:
        return GeneCoverage.from_dict(value)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InvalidParameterError(f"coverage cannot be read: {error!r}.", field="coverage") from error


def rows_of(table: pd.DataFrame, kinds: Mapping[str, Kind]) -> list[dict[str, Any]]:
    """Return one dict of plain Python values a row, with the columns in their order."""
    columns = [[_CASTS[kind](item) for item in table[name].tolist()] for name, kind in kinds.items()]
    return [dict(zip(kinds, row, strict=True)) for row in zip(*columns, strict=True)]


def table_of(rows: Any, kinds: Mapping[str, Kind]) -> pd.DataFrame:
    """Build a table from rows; None in a column of numbers becomes NaN.

    Fields that a newer server adds are ignored, and those that an older one lacks are empty.
    """
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InvalidParameterError("results must be a list of objects.", field="results")
    missing = [name for row in rows for name in kinds if name not in row and name not in _ADDED]
    if missing:
        raise InvalidParameterError(f"results lack {missing[0]!r}.", field=missing[0])
    return pd.DataFrame(
        {
            name: np.array([_read(row.get(name, _ABSENT[kind]), name, kind) for row in rows], dtype=_DTYPES[kind])
            for name, kind in kinds.items()
        },
        columns=list(kinds),
    )


def embeddings_of(
    meta: Meta,
    values: NDArray[np.float32],
    lengths: NDArray[Any],
    n_detected: NDArray[Any],
    known_share: NDArray[Any],
    outputs: Mapping[str, OutputValues],
) -> Embeddings:
    """Build embeddings from the parts of an answer, after checking that they agree."""
    for name, array, kinds in (
        ("lengths", lengths, "iu"),
        ("n_detected", n_detected, "iu"),
        ("known_share", known_share, "iuf"),
    ):
        if array.shape != (len(values),) or array.dtype.kind not in kinds:
            raise InvalidParameterError(
                f"{name} has shape {array.shape} and dtype {array.dtype} for {len(values)} cells.", field=name
            )
    if not np.isfinite(values).all():
        raise InvalidEmbeddingError("embeddings hold NaN or infinity.", field="embeddings")
    if meta.model_id is None or meta.vocabulary_hash is None or meta.coverage is None:
        raise InvalidParameterError("meta names no model, or no gene coverage.", field="meta")
    return Embeddings(
        values,
        lengths.astype(np.int32),
        n_detected.astype(np.int32),
        known_share.astype(np.float32),
        meta.coverage,
        meta.model_id,
        meta.vocabulary_hash,
        meta.timings,
        meta.variant,
        outputs,
    )


def _take_embeddings(answer: Embeddings) -> dict[str, Any]:
    return {
        "embeddings": answer.values,
        "lengths": answer.lengths,
        "n_detected": answer.n_detected,
        "known_share": answer.known_share,
        "below_min_genes": answer.below_min_genes,
        "meta": Meta(
            model_id=answer.model_id,
            vocabulary_hash=answer.vocabulary_hash,
            coverage=answer.coverage,
            timings=answer.timings,
            variant=answer.variant,
            warnings=tuple(answer.warnings()),
        ),
        "outputs": answer.outputs or None,
    }


_EMBEDDINGS = Form(
    "EmbedAnswer",
    (
        Field(name="embeddings", kind="vectors", column="embedding", doc="Vectors, in the order of the cells."),
        Field(
            name="lengths",
            kind="numbers",
            column="length",
            dtype=np.dtype(np.int32),
            doc="Tokens that the model saw of each cell.",
        ),
        Field(
            name="n_detected",
            kind="numbers",
            column="n_detected",
            dtype=np.dtype(np.int32),
            doc="Genes of the vocabulary that each cell expresses.",
        ),
        Field(
            name="known_share",
            kind="numbers",
            column="known_share",
            dtype=np.dtype(np.float32),
            doc="Share of each cell's counts in genes of the vocabulary.",
            finite=True,
        ),
        Field(
            name="below_min_genes",
            kind="numbers",
            dtype=np.dtype(np.bool_),
            doc="Cells that express fewer than 500 genes.",
            derived=True,
        ),
        Field(name="meta", kind="meta", doc="The model behind them, and warnings about doubtful cells."),
        Field(
            name="outputs",
            kind="outputs",
            required=False,
            doc="Values of the outputs that were asked for, by name; absent if none were.",
        ),
    ),
    _take_embeddings,
    lambda embeddings, lengths, n_detected, known_share, meta, outputs=None: embeddings_of(
        meta, embeddings, lengths, n_detected, known_share, outputs or {}
    ),
)


def _result_form(answer: type[Any], result: type[Any], kinds: Mapping[str, Kind]) -> Form:
    """Return the form of a table of results: its warnings and its provenance travel in the meta."""

    def take(value: Any) -> dict[str, Any]:
        found = value.result
        meta = replace(value.meta, warnings=tuple(found.warnings), provenance=found.provenance)
        return {"results": found.table, "meta": meta}

    def make(results: pd.DataFrame, meta: Meta) -> Any:
        found = result(results, meta.provenance or {}, list(meta.warnings))
        return answer(result=found, meta=replace(meta, warnings=(), provenance=None))

    fields = (
        Field(name="results", kind="table", columns=kinds, doc="The table; a number that is not defined is null."),
        Field(name="meta", kind="meta", doc="The model behind it, its options and warnings."),
    )
    return Form(answer.__name__, fields, take, make)


_FORMS: dict[type[Any], Form] = {
    Embeddings: _EMBEDDINGS,
    ScoreAnswer: _result_form(ScoreAnswer, ScoreResult, SCORE_KINDS),
    CompareAnswer: _result_form(CompareAnswer, CompareResult, COMPARE_KINDS),
}


def _form(message: Any) -> Form:
    return _FORMS.get(message) or plain_form(message)


form_of: Callable[[Any], Form] = functools.cache(_form)
"""Returns the form of a type of message. Raises TypeError if it has a field that no message can have."""


def record_to_dict(row: Any) -> dict[str, Any]:
    """Return one row of ``records`` as plain values."""
    return {name: _plain(value) for name, value in vars(row).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [record_to_dict(item) if is_dataclass(item) else item for item in value]
    return value


def record_of(record: type[Any], values: Mapping[str, Any]) -> Any:
    """Build one row of ``records`` from plain values. Fields that a newer server adds are ignored.

    Raises
    ------
    InvalidParameterError
        A field without a default is missing, or one has the wrong form.
    """
    form = form_of(record)
    for name in form.required:
        if values.get(name) is None:
            raise InvalidParameterError(f"A row of {record.__name__} lacks {name!r}.", field=name)
    given = (item for item in form.fields if values.get(item.name) is not None)
    return form.make(**{item.name: _read_field(values[item.name], item) for item in given})


def records_of(record: type[Any], rows: Any, name: str) -> tuple[Any, ...]:
    """Build the rows of ``records`` in the field `name` from a list of objects. Raises InvalidParameterError."""
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InvalidParameterError(f"{name} must be a list of objects.", field=name)
    found = []
    for number, row in enumerate(rows):
        if number % _STEP == 0:
            checkpoint()
        found.append(record_of(record, row))
    return tuple(found)


def _read_field(value: Any, item: Field) -> Any:
    if item.kind == "records":
        return records_of(item.record, value, item.name)
    return check.READERS[item.kind](value, item.name)


def _read(value: Any, name: str, kind: Kind) -> Any:
    if kind == "text":
        return check.text(value, name)
    if kind == "integer":
        return check.integer(value, name)
    return np.nan if value is None else check.number(value, name)
