"""Lists of genes that are known again: never for what they are not."""

import gc
import json

import numpy as np
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import LARGEST, GeneLists, GeneResolver, PerArray
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import MalformedMatrixError, PerturbScopeError
from perturbscope.protocol import EmbedRequest, checks


def genes(*names):
    array = np.array(names)
    array.setflags(write=False)
    return array


def body(names, **cells):
    return json.dumps({"cells": {"gene_ids": names, "indptr": [0, 1], "indices": [0], "data": [1], **cells}}).encode()


def read(content):
    """Return the result of decoding a body, as text."""
    try:
        cells = protocol.request_from_json(protocol.EmbedRequest, content).cells
    except PerturbScopeError as error:
        return type(error).__name__, error.message, error.field
    return cells.gene_ids.tolist(), cells.counts.toarray().tolist(), cells.totals.tolist()


def test_the_same_names_are_the_same_array():
    request = EmbedRequest(cells=CountMatrix.from_matrix([[1, 2]], ["ONCE", "MORE"]))
    proto = protocol.request_to_proto(request)
    found = [protocol.request_from_proto(protocol.EmbedRequest, proto).cells.gene_ids for _ in range(3)]
    found += [
        protocol.request_from_json(protocol.EmbedRequest, protocol.request_to_json(request)).cells.gene_ids
        for _ in range(3)
    ]
    found += [
        protocol.request_from_arrow(protocol.EmbedRequest, protocol.request_to_arrow(request)).cells.gene_ids
        for _ in range(3)
    ]
    assert all(array is found[0] for array in found)
    assert found[0].tolist() == ["ONCE", "MORE"]


def test_a_known_array_cannot_be_changed():
    cells = CountMatrix.from_matrix([[1, 2]], ["A", "B"])
    with pytest.raises(ValueError, match="read-only"):
        cells.gene_ids[0] = "C"


@pytest.mark.parametrize("other", [["a", "b\0c"], ["a", "b", "c"], ["a\0b\0c"], "a", [], [1], None, {"a": 1}, ["a", 1]])
def test_other_names_are_not_taken_for_known_ones(other):
    lists = GeneLists()
    lists.keep(["a\0b", "c"], genes("a\0b", "c"))
    lists.keep(["a"], genes("a"))
    assert lists.find(other) is None


def test_a_text_is_not_a_list_of_its_letters():
    assert read(body(["A", "B"])) == (["A", "B"], [[1, 0]], [1.0])
    assert read(body("AB"))[0] == MalformedMatrixError.__name__


@pytest.mark.parametrize(
    "content",
    [
        body(["X]", "Y"]),
        body(["X"], first_row=1),
        body(["X", "Y"], data=[1.5]),
        body(["X", "Y"], data="1"),
        body(["X", "X"]),
        body(["X", "Y"])[:-1],
        body(["X", "Y"])[:-1] + b'\xff"}',
        body(["X", "Y"]).replace(b'"indptr"', b'"gene_ids": ["X", "Y"], "indptr"'),
        body(["X", "Y"]).replace(b'"gene_ids"', rb'"\"gene_ids"'),
        body(["X", "Y"]).replace(b'"cells"', b'"model": {"gene_ids": ["X", "Y"]}, "cells"'),
        b'{"gene_ids": ["X", "Y"]}',
        b'{"cells": {"gene_ids": [["X", "Y"]]}}',
        b'["gene_ids", {"gene_ids": ["X", "Y"]}]',
    ],
    ids=range(13),
)
def test_what_comes_of_a_body_does_not_depend_on_what_came_before(content, monkeypatch):
    monkeypatch.setattr(checks, "RECENT", GeneLists())
    first = read(content)
    for _ in range(3):
        read(body(["X", "Y"]))
        read(body(["X]", "Y"]))
        assert read(content) == first


def test_lists_used_last_are_kept_within_bounds():
    lists = GeneLists(max_lists=2)
    for name in "abc":
        lists.keep([name], genes(name))
        lists.find(["a"])
    assert lists.find(["a"]) is not None
    assert lists.find(["b"]) is None
    assert lists.find(["c"]) is not None
    small = GeneLists(max_bytes=100)
    for name in "abc":
        small.keep([name * 10], genes(name * 10))
    assert small.find(["a" * 10]) is None
    assert small.find(["c" * 10]) is not None
    lists.keep(["x" * LARGEST], genes("x" * LARGEST))
    assert lists.find(["x" * LARGEST]) is None


def test_values_of_arrays_go_with_them():
    values = PerArray()
    array, writable = genes("a"), np.array(["a"])
    values.put(array, 1)
    values.put(writable, 2)
    assert values.get(array) == 1
    assert values.get(genes("a")) is None
    assert values.get(writable) is None
    array.setflags(write=True)
    assert values.get(array) is None
    del array
    gc.collect()
    assert not values._entries


def test_a_shared_array_is_mapped_once():
    vocabulary = GeneVocabulary(("ENSG00000000001",), np.array([2]), np.array([1.0]), {"<pad>": 0, "<mask>": 1}, "")
    resolver = GeneResolver({"X": ("ENSG00000000001", False)})
    array = CountMatrix.from_matrix([[1, 2]], ["X", "ENSG00000000009"]).gene_ids
    found = resolver.map(array, vocabulary)
    assert resolver.map(array, vocabulary) is found
    assert found.rows.tolist() == resolver.map(array.tolist(), vocabulary).rows.tolist() == [0, -1]
    assert GeneResolver({}).map(array, vocabulary).rows.tolist() == [-1, -1]
