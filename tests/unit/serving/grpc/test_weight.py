"""The memory of a message is estimated from its bytes: by its items, which are found wherever they are."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from perturbscope.protocol.proto import open_inference_pb2 as oi
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from serving.grpc.weight import MESSAGE, NUMBER, TEXT, UNKNOWN, weigh

MOST = 2**40


def of(message: object, more: bytes = b"") -> int:
    return weigh(message.SerializeToString() + more, message.DESCRIPTOR, MOST)  # type: ignore[attr-defined]


@given(st.lists(st.text(max_size=300)), st.lists(st.text(max_size=200)), st.binary(max_size=5000))
def test_each_item_has_its_price_and_arrays_have_none(genes: list[str], labels: list[str], data: bytes) -> None:
    cells = pb.CountMatrix(gene_ids=genes, indptr=data, indices=data, data=data, data_type=1, first_row=-1)
    assert of(cells) == TEXT * len(genes)
    request = pb.CompareRequest(cells=cells, perturbations=labels, options=pb.ScoreOptions(metrics=labels, seed=-1))
    assert of(request) == MESSAGE * 2 + TEXT * (len(genes) + 2 * len(labels))
    assert of(pb.CompareRequest(pairs=[pb.Pair()] * len(labels))) == MESSAGE * len(labels)


def test_numbers_are_counted_together_and_alone() -> None:
    values = [0, 1, 300, -1, 2**40]
    contents = oi.InferTensorContents(int64_contents=values, fp32_contents=values, fp64_contents=values)
    assert of(contents) == 3 * 5 * NUMBER
    assert weigh(b"\x18\x01" * 7, oi.InferTensorContents.DESCRIPTOR, MOST) == 7 * NUMBER
    tensor = oi.ModelInferRequest.InferInputTensor(name="x", shape=[1, 2], contents=contents)
    assert of(oi.ModelInferRequest(inputs=[tensor] * 3)) == 3 * (2 * MESSAGE + 17 * NUMBER)
    named = oi.ModelInferRequest(parameters={"a": oi.InferParameter(bool_param=True)})
    assert of(named) > MESSAGE


def test_fields_that_the_message_does_not_have_are_counted() -> None:
    unknown = b"\xa0\x06\x01" + b"\xa1\x06" + bytes(8) + b"\xa2\x06\x02ab" + b"\xa5\x06" + bytes(4)
    assert of(pb.CompareRequest(perturbations=["a"]), unknown * 10) == TEXT + 40 * UNKNOWN
    assert pb.CompareRequest.FromString(unknown)


def test_counting_ends_beyond_what_there_is() -> None:
    assert MOST > weigh(b"\x1a\x00" * 10_000, pb.CompareRequest.DESCRIPTOR, 1000) > 1000


@pytest.mark.parametrize(
    "data",
    [b"\x1a", b"\x1a\x02a", b"\x0a\x03\x0a\x05a", b"\xff" * 11, b"\x1b\x1c", b"\x28", b"\x39\x00", b"\x0a\x02\x0a\x80"],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        weigh(data, pb.CompareRequest.DESCRIPTOR, MOST)


@given(st.binary(max_size=60))
def test_what_protobuf_reads_is_weighed_to_its_end(data: bytes) -> None:
    try:
        message = pb.CompareRequest.FromString(data)
    except DecodeError:
        return
    if any(tag & 7 in (3, 4) for tag in np.frombuffer(data, np.uint8)):
        return  # perhaps a group
    n_items = len(message.pairs) + len(message.perturbations) + len(message.cells.gene_ids)
    assert weigh(data, pb.CompareRequest.DESCRIPTOR, MOST) >= TEXT * n_items
