"""Random messages, and whether two are the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import sparse

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import Embeddings, OutputValues
from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
models = st.none() | names
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
NUMBERS = st.floats(allow_nan=True, allow_infinity=False)


@st.composite
def cells(draw: st.DrawFn, n: int | None = None) -> CountMatrix:
    n = n or draw(st.integers(1, 5))
    genes = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    counts = draw(arrays.arrays(np.int32, (n, len(genes)), elements=st.integers(0, 2**31 - 1) | st.integers(0, 2)))
    counts[:, 0] = np.maximum(counts[:, 0], 1)
    extra = draw(arrays.arrays(np.float64, n, elements=st.floats(0, 1e6)))
    totals = counts.sum(axis=1, dtype=np.float64) + extra
    return CountMatrix.from_matrix(counts, genes, totals=totals, first_row=draw(st.integers(0, 2**40)))


def vectors(n: int) -> st.SearchStrategy[Any]:
    return st.integers(1, 4).flatmap(lambda width: arrays.arrays(np.float32, (n, width), elements=FLOATS))


@st.composite
def options(draw: st.DrawFn) -> ScoreOptions:
    return ScoreOptions(
        metrics=tuple(draw(st.lists(st.sampled_from(["e_distance", "wasserstein"]), min_size=1, unique=True))),
        estimator=draw(st.sampled_from(["U", "V"])),
        permutations=draw(st.integers(1, 1000)),
        normalize=draw(st.booleans()),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@st.composite
def labelled(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(1, 5))
    source = draw(st.sampled_from(["cells", "embeddings"]))
    labels = st.lists(names, min_size=n, max_size=n).map(tuple)
    return {
        source: draw(cells(n) if source == "cells" else vectors(n)),
        "perturbations": draw(labels),
        "batches": draw(st.none() | labels),
        "options": draw(options()),
        "model": draw(models),
    }


embed_requests = st.builds(
    protocol.EmbedRequest,
    cells=cells(),
    model=models,
    outputs=st.none() | st.lists(names, min_size=1, max_size=2).map(tuple),
)
controls = names | st.lists(names, min_size=2, max_size=4).map(tuple)
"""One label of control cells, or several."""
score_requests = st.builds(lambda parts, control: protocol.ScoreRequest(**parts, control=control), labelled(), controls)
compare_requests = st.builds(
    lambda parts, pairs, control: protocol.CompareRequest(**parts, pairs=pairs, control=control),
    labelled(),
    st.none() | st.lists(st.tuples(names, names), min_size=1, max_size=3).map(tuple),
    st.none() | controls,
)
coverages = st.builds(
    GeneCoverage,
    n_genes=st.integers(0, 2**40),
    n_matched=st.integers(0, 100),
    n_ambiguous=st.integers(0, 5),
    ambiguous=st.lists(st.tuples(names, names), max_size=3).map(tuple),
    unmatched=st.lists(names, max_size=3).map(tuple),
)
timings = st.dictionaries(names, st.floats(0, 1e6), max_size=3)
metas = st.builds(
    protocol.Meta,
    model_id=models,
    vocabulary_hash=models,
    coverage=st.none() | coverages,
    timings=timings,
    variant=st.none() | names,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
provenances = st.dictionaries(names, json_values, max_size=3)
warnings = st.lists(names, max_size=2)


@st.composite
def embed_answers(draw: st.DrawFn) -> Embeddings:
    n = draw(st.integers(1, 5))
    whole = arrays.arrays(np.int32, n, elements=st.integers(0, 2**31 - 1))
    return Embeddings(
        draw(vectors(n)),
        draw(whole),
        draw(whole),
        draw(arrays.arrays(np.float32, n, elements=st.floats(0, 1, width=32))),
        draw(coverages),
        draw(names),
        draw(names),
        draw(timings),
        draw(st.none() | names),
        draw(st.just({}) | outputs(n)),
    )


@st.composite
def outputs(draw: st.DrawFn, n: int) -> dict[str, OutputValues]:
    """Outputs per cell, with names of their columns, and per token, which all have the same genes."""
    lengths = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    genes = tuple(draw(st.lists(names, min_size=1, max_size=4, unique=True)))
    codes = draw(arrays.arrays(np.int32, int(offsets[-1]), elements=st.integers(0, len(genes) - 1)))
    found = {}
    for name in draw(st.lists(st.sampled_from(["gene_embedding", "logits", "x_1"]), min_size=1, unique=True)):
        per = draw(st.sampled_from(["cell", "token"]))
        width = draw(st.integers(1, 3))
        columns = draw(st.none() | st.lists(names, min_size=width, max_size=width).map(tuple))
        spec = OutputSpec(name=name, per=per, width=width, meaning="logits", names=columns)
        rows = n if per == "cell" else int(offsets[-1])
        values = draw(arrays.arrays(np.float32, (rows, width), elements=FLOATS))
        found[name] = OutputValues(spec, values, *((offsets, codes, genes) if per == "token" else ()))
    return found


def _tables(kinds: dict[str, str]) -> st.SearchStrategy[pd.DataFrame]:
    cell = {"text": names, "integer": st.integers(0, 2**62), "number": NUMBERS}
    dtypes = {"text": object, "integer": np.int64, "number": np.float64}
    rows = st.lists(st.tuples(*(cell[kind] for kind in kinds.values())), max_size=4)
    return rows.map(
        lambda rows: pd.DataFrame(
            {
                name: np.array([row[at] for row in rows], dtype=dtypes[kind])
                for at, (name, kind) in enumerate(kinds.items())
            }
        )
    )


def score_answers() -> st.SearchStrategy[protocol.ScoreAnswer]:
    from perturbscope.protocol.tables import SCORE_KINDS

    results = st.builds(ScoreResult, _tables(dict(SCORE_KINDS)), provenances, warnings)
    return st.builds(protocol.ScoreAnswer, result=results, meta=metas)


def compare_answers() -> st.SearchStrategy[protocol.CompareAnswer]:
    from perturbscope.protocol.tables import COMPARE_KINDS

    results = st.builds(CompareResult, _tables(dict(COMPARE_KINDS)), provenances, warnings)
    return st.builds(protocol.CompareAnswer, result=results, meta=metas)


_many = st.lists(names, max_size=3).map(tuple)
_whole = st.integers(0, 2**40)
_model_kinds: dict[str, st.SearchStrategy[Any]] = {
    "str": names,
    "int": _whole,
    "tuple[str, ...]": _many,
    "tuple[OutputInfo, ...]": st.lists(
        st.builds(protocol.OutputInfo, name=names, per=names, width=_whole, meaning=names, names=_many), max_size=3
    ).map(tuple),
}
model_infos = st.builds(
    protocol.ModelInfo,
    **{name: _model_kinds[str(kind)] for name, kind in protocol.ModelInfo.__annotations__.items()}
    | {"capabilities": st.lists(names, min_size=1, max_size=3).map(tuple)},
)
models_answers = st.builds(
    protocol.ModelsAnswer,
    models=st.lists(model_infos, max_size=3).map(tuple),
    problems=st.lists(st.builds(protocol.ModelProblem, name=names, problem=names), max_size=2).map(tuple),
)

MESSAGES: dict[str, st.SearchStrategy[Any]] = {
    "embed_request": embed_requests,
    "score_request": score_requests,
    "compare_request": compare_requests,
    "embed_answer": embed_answers(),
    "score_answer": score_answers(),
    "compare_answer": compare_answers(),
    "models_answer": models_answers,
}


def same(one: Any, other: Any) -> bool:
    """Equal in type, shape, dtype and every value; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
        )
    if sparse.issparse(one):
        return one.shape == other.shape and all(
            np.array_equal(getattr(one, part), getattr(other, part)) for part in ("data", "indices", "indptr")
        )
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
        return True
    if isinstance(one, OutputValues):
        # Only genes that occur travel, so their places differ.
        parts = ("spec", "values", "offsets", "gene_ids")
        return all(same(getattr(one, part), getattr(other, part)) for part in parts)
    if isinstance(one, dict) and one and isinstance(next(iter(one.values())), OutputValues):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return bool(one == other)
