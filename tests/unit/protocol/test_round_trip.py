from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.protocol.checks import short_floats
from perturbscope.scoring.results import ScoreOptions
from tests.unit.protocol.messages import MESSAGES, same

FORMATS = ["json", "arrow", "proto"]
ROUTES = [(name, form) for name in MESSAGES for form in FORMATS if (name, form) != ("models_answer", "arrow")]


@pytest.mark.parametrize(("name", "form"), ROUTES, ids=[f"{name}-{form}" for name, form in ROUTES])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_written_is_read_back(name: str, form: str, data: st.DataObject) -> None:
    message = data.draw(MESSAGES[name])
    what = name.rpartition("_")[2]
    sent = getattr(protocol, f"{what}_to_{form}")(message)
    if form == "proto":
        sent = type(sent).FromString(sent.SerializeToString())
    assert same(getattr(protocol, f"{what}_from_{form}")(type(message), sent), message)


def test_the_reader_of_round_trips_notices_a_difference(tiny_cells: CountMatrix) -> None:
    request = protocol.EmbedRequest(cells=tiny_cells)
    assert same(request, protocol.EmbedRequest(cells=tiny_cells[:]))
    assert not same(request, protocol.EmbedRequest(cells=tiny_cells[1:]))
    assert not same(request, protocol.EmbedRequest(cells=tiny_cells, model="other"))


def test_json_of_curl(tiny_cells: CountMatrix) -> None:
    body = json.dumps({"cells": {"gene_ids": ["TP53", "GATA1"], "indptr": [0, 2], "indices": [0, 1], "data": [3, 1.0]}})
    request = protocol.request_from_json(protocol.EmbedRequest, body.encode())
    assert request.model is None
    assert request.cells.counts.toarray().tolist() == [[3, 1]]
    assert request.cells.totals.tolist() == [4.0]


def test_options_that_are_left_out_keep_their_defaults() -> None:
    body = {"embeddings": [[1, 2], [3, 4]], "perturbations": ["a", "b"], "control": "a", "options": {"seed": 7}}
    request = protocol.request_from_json(protocol.ScoreRequest, json.dumps(body).encode())
    assert request.options == ScoreOptions(seed=7)
    assert request.embeddings is not None
    assert request.embeddings.dtype == np.float32


def test_arrow_takes_categories_wider_types_and_several_batches() -> None:
    schema = pa.schema(
        {
            "indices": pa.large_list(pa.int64()),
            "counts": pa.large_list(pa.float64()),
            "perturbation": pa.dictionary(pa.int8(), pa.string()),
        },
        metadata={b"perturbscope": json.dumps({"gene_ids": ["A", "B"], "control": "x"}).encode(), b"pandas": b"{}"},
    )
    labels = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int8()), pa.array(["x", "y"]))
    batch = pa.record_batch(
        [pa.array([[0], [0, 1], [1]], schema.types[0]), pa.array([[1], [2, 3], [4]], schema.types[1]), labels],
        schema=schema,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch.slice(1))
    request = protocol.request_from_arrow(protocol.ScoreRequest, sink.getvalue().to_pybytes())
    assert request.cells is not None
    assert request.cells.counts.toarray().tolist() == [[1, 0], [2, 3], [0, 4], [2, 3], [0, 4]]
    assert request.perturbations == ("y", "x", "y", "x", "y")


def test_nan_travels_as_null(rng: np.random.Generator) -> None:
    from perturbscope.scoring.control import score_perturbations

    labels = ["a"] * 3 + ["b"] * 20 + ["c"] * 40
    values = rng.normal(size=(len(labels), 3)).astype(np.float32)
    result = score_perturbations(values, labels, control="c", options=ScoreOptions(permutations=20, repeats=1))
    answer = protocol.ScoreAnswer(result=result)
    body = protocol.answer_to_json(answer)
    rows = json.loads(body, parse_constant=pytest.fail)["results"]
    sent = {row["perturbation"]: row["z"] for row in rows}
    assert sent["a"] is None, "three cells are below the floor"
    assert isinstance(sent["b"], float)
    assert same(protocol.answer_from_json(protocol.ScoreAnswer, body).result.table, result.table)


def test_every_score_option_is_in_the_proto() -> None:
    from dataclasses import fields

    from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb

    assert {field.name for field in pb.ScoreOptions.DESCRIPTOR.fields} == {item.name for item in fields(ScoreOptions)}


def test_every_column_of_a_result_is_in_the_proto() -> None:
    from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
    from perturbscope.scoring.results import COMPARE_COLUMNS, SCORE_COLUMNS

    assert tuple(field.name for field in pb.Score.DESCRIPTOR.fields) == SCORE_COLUMNS
    assert tuple(field.name for field in pb.Comparison.DESCRIPTOR.fields) == COMPARE_COLUMNS


def test_arrow_vectors_are_not_copied_from_the_request() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    request = protocol.ScoreRequest(embeddings=values, perturbations=("a", "b", "a", "b"), control="a")
    read = protocol.request_from_arrow(protocol.ScoreRequest, protocol.request_to_arrow(request))
    assert read.embeddings is not None
    assert not read.embeddings.flags.owndata


def test_embeddings_of_an_answer_may_be_changed_by_the_caller(fake_embedder, tiny_cells) -> None:
    answer = fake_embedder.embed(tiny_cells)
    for form in FORMATS:
        sent = getattr(protocol, f"answer_to_{form}")(answer)
        read = getattr(protocol, f"answer_from_{form}")(protocol.EmbedAnswer, sent)
        read.values[0, 0] = 1.0
        assert read.values.flags.writeable, form


@settings(max_examples=300)
@given(arrays.arrays(np.uint32, 20))
def test_nine_digits_are_the_same_float32(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    read = json.loads(json.dumps(short_floats(values)))
    assert np.array_equal(np.array(read, dtype=np.float32), values)


def test_no_more_than_nine_digits_are_written(rng: np.random.Generator) -> None:
    values = rng.normal(size=1000).astype(np.float32)
    digits = [len(repr(abs(value)).replace(".", "").lstrip("0")) for value in short_floats(values)]
    assert max(digits) <= 9
