"""What is checked of a family before its bundle is used."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import UnsupportedBundleError, VocabularyMismatchError
from perturbscope.families import FAMILIES, load_family, rank

VOCABULARY = GeneVocabulary.geneformer_gc30m()


class Whole:
    """Everything that the contract asks for."""

    def __init__(self, **changes: Any) -> None:
        right = rank.build({}, VOCABULARY)
        names = (
            "name",
            "vocabulary",
            "inputs",
            "max_length",
            "edits",
            "tokenize",
            "bound",
            "cost",
            "gene_rows",
            "edit",
        )
        vars(self).update({name: getattr(right, name) for name in names} | changes)
        for name in [name for name, value in changes.items() if value is None]:
            del vars(self)[name]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of the family "other"; its `build` is to be set."""
    module = types.ModuleType("other_family")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FAMILIES, "other", module.__name__)
    return module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenize": None, "inputs": None}, "it has no inputs, it has no tokenize. Correct that module"),
        ({"inputs": ()}, r"its inputs is \(\)"),
        ({"max_length": "long", "edits": ["mask"]}, r"its max_length is 'long', its edits is \['mask'\]"),
        ({"bound": 3}, "its bound is no method"),
    ],
)
def test_a_family_says_what_it_lacks(made: types.ModuleType, changes: dict[str, Any], message: str) -> None:
    made.build = lambda config, vocabulary: Whole(**changes)  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedBundleError, match=rf"The family 'other' \(other_family\) does not keep .*{message}"):
        load_family("other", {}, VOCABULARY)


def test_a_whole_one_is_taken(made: types.ModuleType) -> None:
    made.build = lambda config, vocabulary: Whole()  # type: ignore[attr-defined]
    assert load_family("other", {}, VOCABULARY).max_length == 2048


def test_a_module_that_fails_is_named(made: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedBundleError, match=r"'other' .* cannot be built \(AttributeError: .*build"):
        load_family("other", {}, VOCABULARY)
    monkeypatch.setitem(FAMILIES, "other", "no_such_module")
    with pytest.raises(UnsupportedBundleError, match="No module named 'no_such_module'"):
        load_family("other", {}, VOCABULARY)


def test_errors_of_the_tree_pass(made: types.ModuleType) -> None:
    def build(config: Any, vocabulary: Any) -> None:
        raise VocabularyMismatchError("Other genes.")

    made.build = build  # type: ignore[attr-defined]
    with pytest.raises(VocabularyMismatchError, match="Other genes"):
        load_family("other", {}, VOCABULARY)
