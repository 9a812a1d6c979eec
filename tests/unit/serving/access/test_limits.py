"""Room for requests and for what becomes of them."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidInputError, LimitExceededError, OverloadedError
from perturbscope.protocol import EmbedRequest, ScoreRequest
from perturbscope.protocol.checks import parse_json
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.cost import Cost, compare_cost, score_cost
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions
from serving.access.limits import (
    Admission,
    check_cost,
    check_options,
    check_pairs,
    check_shape,
    check_vectors,
    decoded_bytes,
)
from serving.call import Call
from serving.engine.engine import LARGE, size_of
from serving.settings import Settings
from tests.unit.serving.conftest import MakeEngine


def admission(**settings: Any) -> Admission:
    return Admission(Settings(**settings))


LIMITED: dict[str, tuple[str, Any]] = {
    "cells": ("max_cells", lambda settings, n: check_shape(settings, n, 1, 1)),
    "gene_ids": ("max_genes", lambda settings, n: check_shape(settings, 1, n, 1)),
    "data": ("max_values", lambda settings, n: check_shape(settings, 1, 1, n)),
    "embeddings": ("max_vectors", check_vectors),
    "pairs": ("max_pairs", check_pairs),
    "permutations": ("max_permutations", lambda s, n: check_options(s, ScoreOptions(permutations=n))),
    "wasserstein_permutations": (
        "max_permutations",
        lambda s, n: check_options(s, ScoreOptions(permutations=7, wasserstein_permutations=n)),
    ),
    "null_draws": ("max_permutations", lambda s, n: check_options(s, ScoreOptions(permutations=7, null_draws=n))),
    "max_cells": ("max_group_cells", lambda s, n: check_options(s, ScoreOptions(permutations=7, max_cells=n))),
}


@pytest.mark.parametrize("field", LIMITED)
def test_each_limit_takes_n_and_refuses_one_more(field: str) -> None:
    name, check = LIMITED[field]
    settings = Settings(**{name: 1000})
    check(settings, 1000)
    with pytest.raises(LimitExceededError, match=r"1,001|1001") as caught:
        check(settings, 1001)
    assert caught.value.field == field


def test_the_cost_limit_takes_n_seconds_and_refuses_more() -> None:
    def cost(seconds: float) -> Cost:
        found = Cost()
        found.parts["permutations"] = seconds
        return found

    settings = Settings(max_score_seconds=100)
    check_cost(settings, cost(100.0))
    with pytest.raises(LimitExceededError, match="permutations"):
        check_cost(settings, cost(100.01))


def test_one_key_leaves_room_for_the_requests_of_another() -> None:
    room = admission(max_requests=8)
    entered = [room.admit("bulk") for _ in range(6)]
    for one in entered:
        one.__enter__()
    with pytest.raises(OverloadedError, match="6 requests are in progress, which is the limit for one API key"):
        room.admit("bulk").__enter__()
    with room.admit("small"):
        assert room.in_progress == 7
    for one in entered:
        one.__exit__(None, None, None)
    assert room.in_progress == 0


def test_without_keys_all_of_the_room_is_used() -> None:
    room = admission(max_requests=3)
    with (
        room.admit(),
        room.admit(),
        room.admit(),
        pytest.raises(OverloadedError, match=r"3 requests are in progress, which is the limit\."),
    ):
        room.admit().__enter__()


def test_a_large_body_leaves_room_for_a_small_one() -> None:
    room = admission(max_body_bytes=100, max_held_bytes=200)
    with room.admit() as first, room.admit() as second, room.admit() as small:
        first(100)
        second(70)
        with pytest.raises(OverloadedError, match="of which a request leaves room to others"):
            second(10)
        small(10)
        assert room.held_bytes == 180
    assert room.held_bytes == 0


def test_what_is_reserved_counts_for_all_but_not_as_the_body() -> None:
    room = admission(max_body_bytes=100, max_held_bytes=1000)
    with room.admit() as held:
        held(90)
        held.reserve(700)
        assert (room.held_bytes, held.n_bytes, held.n_reserved) == (790, 90, 700)
        held(10)
        with room.admit() as other, pytest.raises(OverloadedError):
            other.reserve(600)
        held.release_reserved(600)
        assert room.held_bytes == 200
        with pytest.raises(LimitExceededError, match=r"would need about 1,201 bytes of memory.*or as Arrow"):
            held.reserve(1001)
        held.release()
        assert room.held_bytes == 100
    assert room.held_bytes == 0


async def test_drained_waits_for_the_last_request() -> None:
    room = admission()
    assert await room.drained(0)
    with room.admit():
        assert not await room.drained(0.01)
    assert await room.drained(0)
    room.closed = True
    with pytest.raises(OverloadedError, match="shutting down"):
        room.admit().__enter__()


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(list(range(100_000))),
        json.dumps([0] * 200_000),
        json.dumps([0.123456789] * 50_000),
        json.dumps([f"{i:x}" for i in range(50_000)]),
        json.dumps([[]] * 50_000),
        json.dumps([{}] * 50_000),
        json.dumps([{f"{i:x}": 0} for i in range(50_000)]),
        json.dumps({f"{i:x}": 0 for i in range(50_000)}),
        json.dumps([[0.5, 1.5]] * 50_000),
        '["\U0001f600' + "x" * 1_000_000 + '"]',
        '["\\ud83d\\ude00' + "x" * 1_000_000 + '"]',
        "[" * 500 + "]" * 500,
    ],
    ids=[
        "integers",
        "zeros",
        "floats",
        "strings",
        "lists",
        "objects",
        "named",
        "names",
        "pairs",
        "wide",
        "escaped",
        "nested",
    ],
)
def test_decoding_json_takes_no_more_than_was_held(body: str) -> None:
    data = body.encode()
    tracemalloc.start()
    parsed = parse_json(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parsed is not None
    assert peak <= decoded_bytes(protocol.JSON, data) + 100_000


def test_decoding_a_request_takes_no_more_than_was_held(rng: np.random.Generator) -> None:
    genes = [f"ENSG{i:011d}" for i in range(400)]
    cells = CountMatrix.from_matrix(1 + rng.poisson(0.5, size=(500, 400)), genes)
    vectors = rng.standard_normal((3000, 40)).astype(np.float32)
    labels = ("a", "b") * 1500
    request = EmbedRequest(cells=cells)
    score = ScoreRequest(embeddings=vectors, perturbations=labels, control="a")
    bodies = [
        (protocol.JSON, protocol.request_to_json(request), partial(protocol.request_from_json, protocol.EmbedRequest)),
        (protocol.JSON, protocol.request_to_json(score), partial(protocol.request_from_json, protocol.ScoreRequest)),
        (
            protocol.ARROW,
            protocol.request_to_arrow(request),
            partial(protocol.request_from_arrow, protocol.EmbedRequest),
        ),
        (protocol.ARROW, protocol.request_to_arrow(score), partial(protocol.request_from_arrow, protocol.ScoreRequest)),
    ]
    for media_type, body, decode in bodies:
        decode(body)  # what is loaded once is not the request's
        tracemalloc.start()
        try:
            decode(body)
        except InvalidInputError as error:  # pragma: no cover
            raise AssertionError from error
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= decoded_bytes(media_type, body) + 200_000


def test_sizes_of_what_is_worked_on(rng: np.random.Generator) -> None:
    cells = CountMatrix.from_matrix(1 + rng.poisson(1.0, size=(300, 1000)), [f"g{i}" for i in range(1000)])
    assert size_of(cells) == cells.counts.data.nbytes >= LARGE
    assert size_of(EmbedRequest(cells=cells)) == size_of(cells)
    assert size_of(b"12345") == 5
    assert size_of(protocol.request_to_proto(EmbedRequest(cells=cells))) > LARGE
    assert size_of("a name") == size_of(None) == 0
    vectors = np.ones((10, 10), dtype=np.float32)
    assert size_of(ScoreRequest(embeddings=vectors, perturbations=("a",) * 10, control="a")) == 400


@pytest.mark.parametrize("batched", [False, True], ids=["", "batches"])
@pytest.mark.parametrize("pairs", [False, True], ids=["score", "compare"])
@pytest.mark.parametrize(("n_controls", "n_cells", "width"), [(900, 500, 16), (1500, 60, 64), (100, 1200, 16)])
def test_a_score_takes_no_more_than_was_held(
    batched: bool, pairs: bool, n_controls: int, n_cells: int, width: int
) -> None:
    sizes = {"control": n_controls, **dict.fromkeys("abcd", n_cells), "tiny": 30}
    labels = [name for name, n in sizes.items() for _ in range(n)]
    values = np.random.default_rng(0).standard_normal((len(labels), width)).astype(np.float32)
    options = ScoreOptions(permutations=1000, max_cells=1000)
    run = compare_perturbations if pairs else score_perturbations
    batches = [f"b{i % 3}" for i in range(len(labels))] if batched else None
    some = slice(n_controls - 50, n_controls + n_cells + 50)
    part = None if batches is None else batches[some]
    run(
        values[some], labels[some], batches=part, control="control", options=options
    )  # what is imported, and kept, counts for nobody
    tracemalloc.start()
    run(values, labels, batches=batches, control="control", options=options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = compare_cost if pairs else score_cost
    held = estimate(Counter(labels), "control", options, width=width, batches=3 if batched else 0).n_bytes
    assert held / 8 < peak < held


async def test_scores_that_wait_hold_their_memory(make_engine: MakeEngine) -> None:
    engine = make_engine(max_held_bytes=300_000_000)
    labels = ("control",) * 2000 + ("a",) * 2000
    values = np.random.default_rng(0).standard_normal((4000, 4)).astype(np.float32)
    request = ScoreRequest(embeddings=values, perturbations=labels, control="control")

    async def score() -> None:
        call = Call("/v1/score", "http")
        async with engine.front.admitted(call):
            await engine.scores.score(request, call)

    answers = await asyncio.gather(score(), score(), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["NoneType", "OverloadedError"]
    engine = make_engine(max_body_bytes=1000, max_held_bytes=1000)
    with pytest.raises(LimitExceededError, match="Ask for smaller groups"):
        await score()
