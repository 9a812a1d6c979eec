"""The engine: limits, model names, contents of answers, cancellation, readiness, shutdown."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import (
    ControlLabelMissingError,
    CorruptBundleError,
    InferenceError,
    InvalidParameterError,
    LimitExceededError,
    OverloadedError,
    ProviderUnavailableError,
    UnknownModelError,
)
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import CompareRequest, EmbedRequest, ScoreRequest
from perturbscope.scoring.results import ScoreOptions
from serving.engine.engine import Engine
from serving.models.registry import ModelRegistry
from serving.settings import Settings
from tests.bundles import TINY_WIDTH, write_outputs_bundle, write_tiny_bundle
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import FAST, LABELS, MakeEngine, served

OPTIONS = ScoreOptions(**FAST)


def encoder_of(embedder: Embedder) -> FakeEncoder:
    assert isinstance(embedder.encoder, FakeEncoder)
    return embedder.encoder


async def test_an_answer_says_what_made_it(engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder) -> None:
    answer = await engine.embed(EmbedRequest(cells=tiny_cells))
    np.testing.assert_array_equal(answer.values, fake_embedder.embed(tiny_cells).values)
    assert answer.model_id == fake_embedder.model_id
    assert answer.vocabulary_hash == fake_embedder.vocabulary_hash
    assert answer.coverage.n_matched == 40
    assert set(answer.timings) == {"tokenize", "queue", "inference"}
    assert all(seconds >= 0 for seconds in answer.timings.values())


async def test_scores_of_cells_carry_the_model_and_its_warnings(engine: Engine, tiny_cells: CountMatrix) -> None:
    request = ScoreRequest(cells=tiny_cells, perturbations=LABELS, control="control", options=OPTIONS)
    answer = await engine.scores.score(request)
    assert answer.result.table["perturbation"].tolist() == ["KO"]
    assert answer.result.provenance["options"]["seed"] == 0
    assert answer.meta.model_id is not None
    assert answer.meta.coverage is not None
    assert set(answer.meta.timings) == {"tokenize", "queue", "inference", "score"}
    assert any("fewer than 500 genes" in warning for warning in answer.result.warnings)


async def test_scores_of_embeddings_need_no_model(
    engine: Engine, fake_embedder: Embedder, rng: np.random.Generator
) -> None:
    vectors = rng.standard_normal((24, 3)).astype(np.float32)
    request = ScoreRequest(embeddings=vectors, perturbations=LABELS, control="control", options=OPTIONS)
    answer = await engine.scores.score(request)
    assert answer.meta.model_id is None
    assert answer.meta.coverage is None
    assert set(answer.meta.timings) == {"score"}
    assert encoder_of(fake_embedder).batches == []


async def test_compare_takes_pairs(engine: Engine, tiny_cells: CountMatrix) -> None:
    labels = ("control",) * 8 + ("A",) * 8 + ("B",) * 8
    every = await engine.scores.compare(
        CompareRequest(cells=tiny_cells, perturbations=labels, control="control", options=OPTIONS)
    )
    assert every.result.table[["a", "b"]].to_numpy().tolist() == [["A", "B"]]
    chosen = await engine.scores.compare(
        CompareRequest(cells=tiny_cells, perturbations=labels, pairs=(("control", "A"),), options=OPTIONS)
    )
    assert chosen.result.table[["a", "b"]].to_numpy().tolist() == [["control", "A"]]


async def test_an_unknown_output_names_the_models_that_have_it(
    fake_embedder: Embedder, tiny_cells: CountMatrix, tmp_path: Path
) -> None:
    rich = Embedder.from_bundle(Bundle.open(write_outputs_bundle(tmp_path / "rich")), threads=1)
    models = [served(fake_embedder, "plain"), served(rich, "rich")]
    engine = Engine(ModelRegistry(Settings(), models), Settings())
    ask = functools.partial(EmbedRequest, cells=tiny_cells, model="plain")
    with pytest.raises(
        InvalidParameterError, match=r"has no output 'gene_value'; .* models that have it: rich"
    ) as caught:
        await engine.embed(ask(outputs=("gene_value",)))
    assert caught.value.field == "outputs"
    with pytest.raises(InvalidParameterError, match=r"has no output 'nothing'; .* No model here has it"):
        await engine.embed(ask(outputs=("nothing",)))
    assert set((await engine.embed(ask(outputs=("gene_value",), model="rich"))).outputs) == {"gene_value"}
    await engine.close()


async def test_wrong_labels_cost_no_embedding(engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder) -> None:
    with pytest.raises(ControlLabelMissingError, match="ctrl"):
        await engine.scores.score(ScoreRequest(cells=tiny_cells, perturbations=LABELS, control="ctrl", options=OPTIONS))
    assert encoder_of(fake_embedder).batches == []


async def test_models_are_found_by_name_and_by_id(fake_embedder: Embedder, tiny_cells: CountMatrix) -> None:
    second = Embedder(fake_embedder.family, FakeEncoder(4), model_id="second-1.0-0", vocabulary_hash="0")
    registry = ModelRegistry(Settings(), [served(fake_embedder, "first"), served(second, "second")])
    engine = Engine(registry, Settings())
    assert [model.name for model in engine.models().models] == ["first", "second"]
    for name, width in ((None, TINY_WIDTH), ("first", TINY_WIDTH), ("second", 4), ("second-1.0-000000000000", 4)):
        assert (await engine.embed(EmbedRequest(cells=tiny_cells, model=name))).values.shape == (24, width)
    with pytest.raises(UnknownModelError, match="No model 'third' is served here; there is first, second"):
        await engine.embed(EmbedRequest(cells=tiny_cells, model="third"))
    await engine.close()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_cells": 23}, "24 cells; this server takes 23"),
        ({"max_genes": 39}, "40 genes; this server takes 39"),
        ({"max_values": 100}, "stored counts; this server takes 100"),
    ],
    ids=["cells", "genes", "values"],
)
async def test_too_large_a_request_names_the_limit(
    make_engine: MakeEngine, tiny_cells: CountMatrix, limits: dict[str, int], message: str
) -> None:
    with pytest.raises(LimitExceededError, match=message):
        await make_engine(**limits).embed(EmbedRequest(cells=tiny_cells))


@pytest.mark.parametrize(
    ("limits", "options", "message"),
    [
        ({"max_permutations": 10}, {"permutations": 11}, "permutations is 11; this server takes 10"),
        ({"max_permutations": 500}, {"null_draws": 501}, "null_draws is 501"),
        ({"max_group_cells": 4000}, {}, "max_cells is 5,000; this server takes 4,000"),
    ],
    ids=["permutations", "draws", "group"],
)
async def test_too_costly_a_score_names_the_limit(
    make_engine: MakeEngine, limits: dict[str, int], options: dict[str, int], message: str
) -> None:
    vectors = np.ones((24, 2), dtype=np.float32)
    request = ScoreRequest(
        embeddings=vectors, perturbations=LABELS, control="control", options=ScoreOptions(**{**FAST, **options})
    )
    with pytest.raises(LimitExceededError, match=message):
        await make_engine(**{"max_permutations": 100_000, **limits}).scores.score(request)


async def test_too_many_vectors_are_refused(make_engine: MakeEngine) -> None:
    request = ScoreRequest(embeddings=np.ones((24, 2), dtype=np.float32), perturbations=LABELS, control="control")
    with pytest.raises(LimitExceededError, match="24 vectors; this server takes 23"):
        await make_engine(max_vectors=23).scores.score(request)


async def test_a_full_queue_is_noticed_before_tokenizing(
    make_engine: MakeEngine, tiny_cells: CountMatrix, fake_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = encoder_of(fake_embedder).gate = threading.Event()
    engine = make_engine(max_queued_tokens=4)
    first = asyncio.gather(*(engine.embed(EmbedRequest(cells=tiny_cells)) for _ in range(3)))
    dispatcher = engine.registry.default.dispatcher
    async with asyncio.timeout(60):
        while dispatcher.pending_callers < 3:
            await asyncio.sleep(0.001)

    def never(cells: CountMatrix) -> None:
        raise AssertionError(len(cells))

    monkeypatch.setattr(fake_embedder, "tokenize", never)
    with pytest.raises(OverloadedError):
        await engine.embed(EmbedRequest(cells=tiny_cells))
    gate.set()
    assert [len(answer) for answer in await first] == [24] * 3


async def test_requests_in_progress_are_bounded(make_engine: MakeEngine) -> None:
    admit = make_engine(max_requests=1).admission.admit
    with (
        admit(),
        pytest.raises(OverloadedError, match="1 requests are in progress"),
        admit(),
    ):
        pass
    with admit():
        pass


async def test_bytes_in_progress_are_bounded(make_engine: MakeEngine) -> None:
    admit = make_engine(max_body_bytes=10, max_held_bytes=15).admission.admit
    with admit() as first:
        first(10)
        with pytest.raises(LimitExceededError, match="larger than the 10 bytes"):
            first(1)
        with (
            pytest.raises(OverloadedError, match="Requests of 10 bytes are in progress"),
            admit() as second,
        ):
            second(6)
    with admit() as third:
        third(10)


async def test_a_scoring_caller_that_goes_away_stops_the_computation(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, proceed, ended = threading.Event(), threading.Event(), threading.Event()
    finished = []

    def slow(*_: Any, progress: Callable[[str, int, int], None], **__: Any) -> None:
        reached.set()
        proceed.wait(10)
        try:
            progress("score", 1, 2)
            finished.append("went on")
        finally:
            ended.set()

    monkeypatch.setattr("perturbscope.scoring.control.score_perturbations", slow)
    request = ScoreRequest(embeddings=np.ones((24, 2), dtype=np.float32), perturbations=LABELS, control="control")
    task = asyncio.create_task(make_engine().scores.score(request))
    await asyncio.to_thread(reached.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    proceed.set()
    await asyncio.to_thread(ended.wait, 10)
    assert finished == []


async def test_a_model_that_failed_is_probed_until_it_recovers(
    engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    assert await engine.ready()
    encoder = encoder_of(fake_embedder)
    encoder.error = RuntimeError("out of memory")
    assert await engine.ready()  # nothing failed yet
    with pytest.raises(InferenceError):
        await engine.embed(EmbedRequest(cells=tiny_cells))
    assert not await engine.ready()
    encoder.error = None
    assert await engine.ready()
    assert encoder.batches[-1] == (1, 1)


async def test_closing_finishes_what_was_accepted(
    engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    gate = encoder_of(fake_embedder).gate = threading.Event()
    accepted = asyncio.create_task(engine.embed(EmbedRequest(cells=tiny_cells)))
    async with asyncio.timeout(60):
        while not encoder_of(fake_embedder).batches:
            await asyncio.sleep(0.001)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="shutting down"), engine.admission.admit():
        pass
    assert not await engine.ready()
    gate.set()
    await closing
    assert len(await accepted) == 24


async def test_a_bundle_is_loaded_and_warm(tiny_bundle: Path, tiny_cells: CountMatrix) -> None:
    engine = Engine.load(Settings(bundle=str(tiny_bundle), threads=1))
    (model,) = engine.models().models
    assert (model.name, model.width, model.variant, model.device) == ("tiny", TINY_WIDTH, "fp32", "cpu")
    assert (await engine.embed(EmbedRequest(cells=tiny_cells))).values.shape == (24, TINY_WIDTH)
    await engine.close()


async def test_two_bundles_are_two_models(tiny_bundle: Path, tmp_path: Path) -> None:
    other = write_tiny_bundle(tmp_path / "other", seed=1, name="other")
    engine = Engine.load(Settings(bundle=f"{tiny_bundle}:{other}", threads=1))
    assert [model.name for model in engine.models().models] == ["tiny", "other"]
    await engine.close()


def test_what_cannot_be_served_is_not_loaded(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(CorruptBundleError, match="cannot be read"):
        Engine.load(Settings(bundle=str(tmp_path)))
    with pytest.raises(ProviderUnavailableError, match="'cuda' was asked for"):
        Engine.load(replace(Settings(bundle=str(tiny_bundle)), device="cuda"))
