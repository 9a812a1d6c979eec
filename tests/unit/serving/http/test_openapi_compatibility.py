"""The JSON bodies of /v1 keep what they promised, as the messages of the proto do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.serving.http.openapi_snapshot import SNAPSHOT, broken, current

EMBED = "POST /v1/embed"


def test_nothing_that_was_promised_has_changed() -> None:
    assert broken(json.loads(SNAPSHOT.read_text()), current()) == []


def test_the_snapshot_is_up_to_date() -> None:
    assert json.loads(SNAPSHOT.read_text()) == current(), "run python -m tests.unit.serving.http.openapi_snapshot"


def test_the_snapshot_holds_what_clients_use() -> None:
    promise = current()[EMBED]
    assert promise["takes"]["cells.gene_ids[]"] == "string"
    assert promise["takes"]["model"] == "null|string"
    assert set(promise["needs"]) == {"cells", *(f"cells.{name}" for name in ("gene_ids", "indptr", "indices", "data"))}
    assert promise["gives"]["embeddings[][]"] == "number"
    assert "meta.coverage.n_matched" in promise["gives"]


BREAKING: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a route": (lambda p: p.pop(EMBED), f"{EMBED} is gone"),
    "a content type": (lambda p: p[EMBED]["reads"].remove("application/json"), "no longer reads application/json"),
    "an answer's type": (lambda p: p[EMBED]["writes"].remove("application/json"), "no longer writes"),
    "a field taken": (lambda p: p[EMBED]["takes"].pop("model"), "no longer takes model"),
    "a field given": (lambda p: p[EMBED]["gives"].pop("lengths"), "no longer gives lengths"),
    "a field needed": (lambda p: p[EMBED]["needs"].append("model"), "now needs model"),
    "a type taken": (lambda p: p[EMBED]["takes"].update(model="string"), "takes model as string"),
    "a type given": (lambda p: p[EMBED]["gives"].update(lengths="array|null"), "gives lengths as array|null"),
    "a parameter": (lambda p: p[EMBED]["parameters"].remove("layer"), "lost layer"),
}


@pytest.mark.parametrize("case", BREAKING)
def test_a_change_that_breaks_clients_is_seen(case: str) -> None:
    change, text = BREAKING[case]
    new = copy.deepcopy(current())
    change(new)
    found = broken(current(), new)
    assert len(found) == 1
    assert text in found[0]


def test_an_addition_breaks_nobody() -> None:
    new = copy.deepcopy(current())
    new[EMBED]["takes"].update(new="string", model="integer|null|string")
    new[EMBED]["gives"]["new"] = "string"
    new["POST /v1/new"] = new[EMBED]
    assert broken(current(), new) == []
