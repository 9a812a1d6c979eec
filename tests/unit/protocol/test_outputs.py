"""Answers with outputs that do not fit are refused in each format, and name the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from perturbscope import protocol
from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidInputError
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import Embeddings, OutputValues
from perturbscope.protocol.arrow_ipc import read_stream, write_stream


def answer() -> Embeddings:
    """Two cells with two genes and one, of a vocabulary of which only two genes occur."""
    ones = np.ones(2, dtype=np.int32)
    token = OutputSpec(name="gene_value", per="token", width=1, meaning="value")
    cell = OutputSpec(name="logits", per="cell", width=2, meaning="logits", names=("a", "b"))
    names = ("ENSG1", "ENSG2", "ENSG3")
    offsets, genes = np.array([0, 2, 3]), np.array([2, 0, 2], dtype=np.int32)
    return Embeddings(
        np.ones((2, 3), dtype=np.float32), ones, ones, ones.astype(np.float32),
        GeneCoverage(n_genes=3, n_matched=3), "m-1-0", "0" * 8, {}, "fp32",
        {
            "gene_value": OutputValues(token, np.array([[1], [2], [3]], dtype=np.float32), offsets, genes, names),
            "logits": OutputValues(cell, np.array([[0, 1], [1, 0.5]], dtype=np.float32)),
        },
    )  # fmt: skip


def test_json_shows_each_cell_with_its_genes() -> None:
    outputs = json.loads(protocol.answer_to_json(answer()))["outputs"]
    assert outputs == {
        "gene_value": {
            "per": "token",
            "width": 1,
            "meaning": "value",
            "names": None,
            "values": [[[1.0], [2.0]], [[3.0]]],
            "gene_ids": [["ENSG3", "ENSG1"], ["ENSG3"]],
        },
        "logits": {
            "per": "cell",
            "width": 2,
            "meaning": "logits",
            "names": ["a", "b"],
            "values": [[0.0, 1.0], [1.0, 0.5]],
        },
    }


def test_only_genes_that_occur_travel() -> None:
    message = protocol.answer_to_proto(answer())
    assert list(message.outputs[0].gene_ids) == ["ENSG1", "ENSG3"]
    found = protocol.answer_from_proto(Embeddings, message).outputs["gene_value"]
    assert found.gene_ids.tolist() == ["ENSG3", "ENSG1", "ENSG3"]
    found.values[0] = 7  # as those of a model in this process


SPOILT: dict[str, Callable[[Any], Any]] = {
    "not an object": lambda outputs: [1],
    "no width": lambda outputs: outputs["logits"].pop("width"),
    "a width of none": lambda outputs: outputs["logits"].update(width=0),
    "another width": lambda outputs: outputs["logits"].update(width=3, names=None),
    "an unknown kind": lambda outputs: outputs["logits"].update(per="gene"),
    "an unknown meaning": lambda outputs: outputs["logits"].update(meaning="guess"),
    "names too few": lambda outputs: outputs["logits"].update(names=["a"]),
    "cells too few": lambda outputs: outputs["logits"]["values"].pop(),
    "a null": lambda outputs: outputs["logits"]["values"][0].__setitem__(0, None),
    "a text": lambda outputs: outputs["gene_value"]["values"][0][0].__setitem__(0, "1"),
    "cells of tokens too few": lambda outputs: [outputs["gene_value"][key].pop() for key in ("values", "gene_ids")],
    "genes too few": lambda outputs: outputs["gene_value"]["gene_ids"][0].pop(),
    "no genes": lambda outputs: outputs["gene_value"].pop("gene_ids"),
    "genes flat": lambda outputs: outputs["gene_value"].update(gene_ids=["a", "b"]),
    "a gene that is a number": lambda outputs: outputs["gene_value"]["gene_ids"][0].__setitem__(0, 1),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_json(case: str) -> None:
    body = json.loads(protocol.answer_to_json(answer()))
    changed = SPOILT[case](body["outputs"])
    if case == "not an object":
        body["outputs"] = changed
    with pytest.raises(InvalidInputError):
        protocol.answer_from_json(Embeddings, json.dumps(body).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda output: setattr(output, "values", output.values[:-1]),
        lambda output: setattr(output, "values", output.values[:-4]),
        lambda output: setattr(output, "values", np.full(3, np.nan, "<f4").tobytes()),
        lambda output: setattr(output, "offsets", np.array([0, 2, 4], "<i8").tobytes()),
        lambda output: setattr(output, "offsets", np.array([0, 3, 2], "<i8").tobytes()),
        lambda output: setattr(output, "offsets", np.array([0, 3], "<i8").tobytes()),
        lambda output: output.ClearField("offsets"),
        lambda output: setattr(output, "genes", np.array([0, 1, 2], "<i4").tobytes()),
        lambda output: setattr(output, "genes", np.array([0, 1, -1], "<i4").tobytes()),
        lambda output: setattr(output, "genes", b""),
        lambda output: setattr(output.output, "width", 0),
        lambda output: setattr(output.output, "name", "no name"),
    ],
)  # fmt: skip
def test_spoilt_protobuf(change: Callable[[Any], Any]) -> None:
    message = protocol.answer_to_proto(answer())
    change(message.outputs[0])
    with pytest.raises(InvalidInputError):
        protocol.answer_from_proto(Embeddings, message)


LISTS = pa.array([[1.0], [2.0]], pa.list_(pa.float32()))
VALUES = "outputs.gene_value"


@pytest.mark.parametrize(
    "columns",
    [
        {VALUES: None},
        {VALUES: LISTS},
        {VALUES: pa.array([1.0, 2.0])},
        {VALUES: pa.array([[[], []], [[]]], pa.list_(pa.list_(pa.float32(), 0)))},
        {VALUES: pa.array([[["a"], ["b"]], [["c"]]], pa.list_(pa.list_(pa.string(), 1)))},
        {"gene_ids": None},
        {"gene_ids": pa.array([["a", "b"], ["a"]])},
        {"gene_ids": pa.array([["a"], ["a", "b"]], pa.list_(pa.dictionary(pa.int32(), pa.string())))},
        {"gene_ids": pa.array([["a", None], ["a"]], pa.list_(pa.dictionary(pa.int32(), pa.string())))},
        {"outputs.logits": pa.array([[1.0, 2.0, 3.0]] * 2, pa.list_(pa.float32(), 3))},
    ],
)
def test_spoilt_arrow(columns: dict[str, Any]) -> None:
    table, meta = read_stream(protocol.answer_to_arrow(answer()))
    found = {name: table.column(name) for name in table.column_names} | columns
    body = write_stream({name: column for name, column in found.items() if column is not None}, meta)
    with pytest.raises(InvalidInputError):
        protocol.answer_from_arrow(Embeddings, body)


@pytest.mark.parametrize("outputs", [7, [7], [{"name": "x"}], {"gene_value": {}}])
def test_spoilt_descriptions_in_arrow(outputs: Any) -> None:
    table, meta = read_stream(protocol.answer_to_arrow(answer()))
    columns = {name: table.column(name) for name in table.column_names}
    with pytest.raises(InvalidInputError):
        protocol.answer_from_arrow(Embeddings, write_stream(columns, {**meta, "outputs": outputs}))
