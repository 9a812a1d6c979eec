"""The parts of answers: tables with the type of each column, and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol import checks as check
from perturbscope.protocol.messages import CompareAnswer, Meta, ScoreAnswer
from perturbscope.scoring.results import COMPARE_COLUMNS, SCORE_COLUMNS, CompareResult, ScoreResult

Kind = Literal["text", "integer", "number"]
_TEXT = {"perturbation", "a", "b", "metric", "flags"}
_INTEGER = {"n_cells", "n_controls", "n_a", "n_b"}


def _kinds(columns: Sequence[str]) -> dict[str, Kind]:
    return {name: "text" if name in _TEXT else "integer" if name in _INTEGER else "number" for name in columns}


SCORE_KINDS = _kinds(SCORE_COLUMNS)
"""Type of each column of a table of scores."""
COMPARE_KINDS = _kinds(COMPARE_COLUMNS)
"""Type of each column of a table of pairs."""
_CASTS: dict[Kind, Any] = {"text": str, "integer": int, "number": float}
_DTYPES: dict[Kind, Any] = {"text": object, "integer": np.int64, "number": np.float64}


def meta_to_dict(meta: Meta, warnings: Sequence[str]) -> dict[str, Any]:
    """Return the JSON form of an answer's meta and warnings."""
    return {
        "model_id": meta.model_id,
        "vocabulary_hash": meta.vocabulary_hash,
        "coverage": meta.coverage.to_dict() if meta.coverage else None,
        "warnings": list(warnings),
        "timings": meta.timings,
        "variant": meta.variant,
    }


def meta_from_dict(value: Any) -> tuple[Meta, list[str], dict[str, Any]]:
    """Read the meta, warnings and provenance of an answer. Fields that a newer server adds are ignored."""
    if not isinstance(value, Mapping):
        raise InvalidParameterError(f"meta must be an object; got {check.shown(value)}.", field="meta")
    timings = value.get("timings") or {}
    provenance = value.get("provenance") or {}
    if not isinstance(timings, Mapping):
        raise InvalidParameterError("timings must be an object of numbers.", field="timings")
    if not isinstance(provenance, Mapping):
        raise InvalidParameterError("provenance must be an object.", field="provenance")
    meta = Meta(
        model_id=check.optional_text(value.get("model_id"), "model_id"),
        vocabulary_hash=check.optional_text(value.get("vocabulary_hash"), "vocabulary_hash"),
        coverage=_coverage(value.get("coverage")),
        timings={str(stage): check.number(seconds, "timings") for stage, seconds in timings.items()},
        variant=check.optional_text(value.get("variant"), "variant"),
    )
    return meta, list(check.texts(value.get("warnings") or [], "warnings", longest=100_000)), dict(provenance)


def _coverage(value: Any) -> GeneCoverage | None:
    if value is None:
        return None
    try:
        return GeneCoverage.from_dict(value)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InvalidParameterError(f"coverage cannot be read: {error!r}.", field="coverage") from error


def kinds_of(kind: type[Any]) -> Mapping[str, Kind]:
    """Return the type of each column of the table in an answer of this kind."""
    return SCORE_KINDS if kind is ScoreAnswer else COMPARE_KINDS


def result_answer(
    kind: type[Any], rows: Any, meta: tuple[Meta, list[str], dict[str, Any]]
) -> ScoreAnswer | CompareAnswer:
    """Build an answer from the rows of its table, and its meta, warnings and provenance."""
    about, warnings, provenance = meta
    if kind is ScoreAnswer:
        return ScoreAnswer(result=ScoreResult(table_of(rows, SCORE_KINDS), provenance, warnings), meta=about)
    return CompareAnswer(result=CompareResult(table_of(rows, COMPARE_KINDS), provenance, warnings), meta=about)


def rows_of(table: pd.DataFrame, kinds: Mapping[str, Kind]) -> list[dict[str, Any]]:
    """Return one dict of plain Python values a row, with the columns in their order."""
    columns = [[_CASTS[kind](item) for item in table[name].tolist()] for name, kind in kinds.items()]
    return [dict(zip(kinds, row, strict=True)) for row in zip(*columns, strict=True)]


def table_of(rows: Any, kinds: Mapping[str, Kind]) -> pd.DataFrame:
    """Build a table from rows; None in a column of numbers becomes NaN. Fields that a newer server adds are ignored."""
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InvalidParameterError("results must be a list of objects.", field="results")
    missing = [name for row in rows for name in kinds if name not in row]
    if missing:
        raise InvalidParameterError(f"results lack {missing[0]!r}.", field=missing[0])
    return pd.DataFrame(
        {
            name: np.array([_read(row[name], name, kind) for row in rows], dtype=_DTYPES[kind])
            for name, kind in kinds.items()
        },
        columns=list(kinds),
    )


def embed_meta(answer: Embeddings) -> Meta:
    """Return the model behind embeddings."""
    return Meta(
        model_id=answer.model_id,
        vocabulary_hash=answer.vocabulary_hash,
        coverage=answer.coverage,
        timings=answer.timings,
        variant=answer.variant,
    )


def embeddings_of(
    meta: Meta,
    values: NDArray[np.float32],
    lengths: NDArray[Any],
    n_detected: NDArray[Any],
    known_share: NDArray[Any],
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
    )


def _read(value: Any, name: str, kind: Kind) -> Any:
    if kind == "text":
        return check.text(value, name)
    if kind == "integer":
        return check.integer(value, name)
    return np.nan if value is None else check.number(value, name)
