"""The registry: leases, versions, swaps under load, memory, a repository that changes; nothing waits for a clock."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import (
    CorruptBundleError,
    GoldenMismatchError,
    InvalidParameterError,
    LimitExceededError,
    OverloadedError,
    UnknownModelError,
)
from perturbscope.families.outputs import CELL_EMBEDDING
from perturbscope.inference.bundle import GOLDEN, MANIFEST, Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.golden_making import add_golden, make_golden
from perturbscope.protocol import EmbedRequest
from serving.engine.engine import Engine
from serving.models.loading import ServedModel
from serving.models.registry import ModelRegistry
from serving.settings import Settings
from serving.telemetry import log
from tests.bundles import TINY_WIDTH, tiny_files, write_tiny_bundle
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import served


class FakeBundles:
    """A repository of folders whose manifest is one line, and the models that are made of them.

    The line is ``name version width``; ``corrupt`` stands for a bundle that does not verify.
    """

    def __init__(self, root: Path, embedder: Embedder) -> None:
        self.root, self._embedder = root, embedder
        self.loads: list[str] = []
        self.encoders: dict[str, FakeEncoder] = {}
        self.gate: threading.Event | None = None
        root.mkdir()

    def put(self, folder: str, line: str) -> Path:
        path = self.root / folder
        path.mkdir(exist_ok=True)
        (path / MANIFEST).write_text(line)
        return path

    def load(self, path: Path, settings: Settings) -> ServedModel:
        line = (path / MANIFEST).read_text()
        self.loads.append(line)
        if self.gate is not None:
            assert self.gate.wait(30)
        if line == "corrupt":
            raise CorruptBundleError(f"{path} has other checksums.")
        name, version, width = line.split()
        encoder = self.encoders[line] = FakeEncoder(int(width))
        family = self._embedder.family
        embedder = Embedder(family, encoder, model_id=f"{name}-{version}-0", vocabulary_hash="0")
        model = served(embedder, name)
        return replace(model, info=replace(model.info, version=version, model_id=embedder.model_id))

    @staticmethod
    def estimate(path: Path, settings: Settings) -> int:
        return 100


MakeRegistry = Callable[..., ModelRegistry]


@pytest.fixture
def bundles(tmp_path: Path, fake_embedder: Embedder) -> FakeBundles:
    return FakeBundles(tmp_path / "models", fake_embedder)


@pytest.fixture
async def make_registry(bundles: FakeBundles) -> AsyncIterator[MakeRegistry]:
    made: list[ModelRegistry] = []

    def make(**settings: Any) -> ModelRegistry:
        chosen = Settings(repository=str(bundles.root), **settings)
        made.append(ModelRegistry(chosen, load=bundles.load, estimate=bundles.estimate))
        return made[-1]

    yield make
    if bundles.gate is not None:
        bundles.gate.set()
    for registry in made:
        await registry.close()


@pytest.fixture
def registry(make_registry: MakeRegistry) -> ModelRegistry:
    return make_registry()


@pytest.fixture
async def loaded(bundles: FakeBundles, registry: ModelRegistry) -> ModelRegistry:
    """Model "m" of version 1, and width 8, from the folder "a"."""
    bundles.put("a", "m 1 8")
    await registry.load("a")
    return registry


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def names(registry: ModelRegistry) -> list[str]:
    return [f"{info.name}@{info.version}" for info in registry.infos()]


# Names and versions


async def test_a_version_beside_an_old_one_gets_no_traffic_that_does_not_name_it(
    loaded: ModelRegistry, bundles: FakeBundles
) -> None:
    bundles.put("b", "m 2 4")
    await loaded.load("b")
    assert names(loaded) == ["m@1", "m@2"]
    for name, version, width in (
        (None, None, 8),
        ("m", None, 8),
        ("m", "1", 8),
        ("m", "2", 4),
        ("m@2", None, 4),
        ("m-2-0", None, 4),
        ("m@1", "1", 8),
    ):
        with loaded.lease(name, version) as model:
            assert model.embedder.width == width
    await loaded.unload("m", "1")
    assert loaded.default.embedder.width == 4


@pytest.mark.parametrize(("name", "version"), [("x", None), ("m", "3"), ("m@3", None), ("m@1", "2"), ("a", None)])
async def test_a_model_that_is_not_there(loaded: ModelRegistry, name: str, version: str | None) -> None:
    with pytest.raises(UnknownModelError, match="there is m"):
        loaded.lease(name, version)


async def test_versions_are_spelled_out_where_a_name_has_several(loaded: ModelRegistry, bundles: FakeBundles) -> None:
    bundles.put("b", "m 2 4")
    await loaded.load("b")
    with pytest.raises(UnknownModelError, match="there is m@1, m@2"):
        loaded.lease("x")
    with pytest.raises(InvalidParameterError, match=r"has the versions 1, 2\. Name one"):
        await loaded.unload("m")


async def test_one_version_from_two_folders_is_refused(loaded: ModelRegistry, bundles: FakeBundles) -> None:
    bundles.put("b", "m 1 4")
    with pytest.raises(InvalidParameterError, match="served already, from another folder"):
        await loaded.load("b")
    assert names(loaded) == ["m@1"]
    assert loaded.default.embedder.width == 8


async def test_nothing_is_loaded(registry: ModelRegistry) -> None:
    assert not await registry.ready()
    with pytest.raises(UnknownModelError, match="no model is loaded"):
        registry.lease()


# Swaps


async def test_requests_in_progress_finish_on_the_old_model_and_new_ones_find_the_new(
    loaded: ModelRegistry, bundles: FakeBundles, tiny_cells: CountMatrix
) -> None:
    engine = Engine(loaded, Settings())
    gate = bundles.encoders["m 1 8"].gate = threading.Event()
    old = [asyncio.create_task(engine.embed(EmbedRequest(cells=tiny_cells))) for _ in range(5)]
    await until(lambda: bool(bundles.encoders["m 1 8"].batches))
    bundles.put("a", "m 2 4")
    await loaded.load("a")
    assert names(loaded) == ["m@2"]
    new = await engine.embed(EmbedRequest(cells=tiny_cells))
    assert new.values.shape == (24, 4)
    assert new.model_id == "m-2-0"
    assert not any(task.done() for task in old)
    gate.set()
    for answer in await asyncio.gather(*old):
        assert answer.values.shape == (24, 8)
        assert answer.model_id == "m-1-0"
    await engine.close()


async def test_no_request_fails_or_mixes_models_while_they_are_swapped_all_the_time(
    loaded: ModelRegistry, bundles: FakeBundles, tiny_cells: CountMatrix
) -> None:
    engine = Engine(loaded, Settings())
    stop = asyncio.Event()
    seen: set[str] = set()

    async def call() -> int:
        n = 0
        while not stop.is_set():
            answer = await engine.embed(EmbedRequest(cells=tiny_cells))
            version = answer.model_id.split("-")[1]
            assert answer.values.shape == (24, 3 + int(version))
            np.testing.assert_array_equal(answer.values[:, 0], answer.lengths)
            seen.add(version)
            n += 1
        return n

    bundles.put("a", "m 0 3")
    await loaded.load("a")
    callers = [asyncio.create_task(call()) for _ in range(8)]
    for version in range(1, 21):
        bundles.put("a", f"m {version} {3 + version}")
        await loaded.load("a")
        answered = await engine.embed(EmbedRequest(cells=tiny_cells))
        assert answered.model_id == f"m-{version}-0"
    stop.set()
    assert sum(await asyncio.gather(*callers)) >= 8
    assert len(seen) > 1
    await engine.close()


async def test_a_lease_keeps_its_model_through_unload_and_the_model_is_freed_after_it(
    loaded: ModelRegistry, bundles: FakeBundles, tiny_cells: CountMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(log, "event", lambda name, level="info", **_: events.append(name))
    with loaded.lease("m") as model:
        encoder = weakref.ref(bundles.encoders.pop("m 1 8"))
        await loaded.unload("m")
        assert names(loaded) == []
        assert loaded.model_bytes == 100
        tokens = model.embedder.tokenize(tiny_cells)
        values, _ = await model.dispatcher.submit(tokens)
        assert values.cell_embedding.shape == (24, 8)
        assert "model_freed" not in events
    await until(lambda: "model_freed" in events)
    assert loaded.model_bytes == 0
    with pytest.raises(OverloadedError):
        await model.dispatcher.submit(tokens)
    del model
    gc.collect()
    assert encoder() is None


async def test_a_freed_model_lets_go_of_its_session(tiny_bundle: Path) -> None:
    model = await asyncio.to_thread(ServedModel.load, tiny_bundle, Settings(threads=1))
    session = weakref.ref(model.embedder.encoder._session)  # type: ignore[attr-defined]
    await model.close()
    await model.close()
    assert session() is None


async def test_a_freed_model_is_gone_without_the_garbage_collector(
    loaded: ModelRegistry, bundles: FakeBundles, tiny_cells: CountMatrix
) -> None:
    gc.collect()
    gc.disable()
    try:
        with loaded.lease() as model:
            await model.dispatcher.submit(model.embedder.tokenize(tiny_cells))
            embedder = weakref.ref(model.embedder)
        del model
        bundles.encoders.clear()
        await loaded.unload("m")
        await until(lambda: loaded.model_bytes == 0)
        await until(lambda: embedder() is None)
    finally:
        gc.enable()


async def test_a_corrupt_bundle_leaves_the_old_model_serving_and_says_why(
    loaded: ModelRegistry, bundles: FakeBundles, tiny_cells: CountMatrix
) -> None:
    bundles.put("a", "corrupt")
    with pytest.raises(CorruptBundleError, match="other checksums"):
        await loaded.load("a")
    assert names(loaded) == ["m@1"]
    assert await loaded.ready()
    (listed,) = loaded.index()
    assert (listed.name, listed.version, listed.state) == ("m", "1", "READY")
    assert "other checksums" in listed.reason
    bundles.put("a", "m 2 4")
    await loaded.load("a")
    assert [(item.version, item.reason) for item in loaded.index()] == [("2", "")]


async def test_others_are_served_while_a_model_is_loaded(
    loaded: ModelRegistry, bundles: FakeBundles, tiny_cells: CountMatrix
) -> None:
    engine = Engine(loaded, Settings())
    bundles.gate = threading.Event()
    bundles.put("b", "other 1 4")
    loading = asyncio.create_task(loaded.load("b"))
    await until(lambda: "other 1 4" in bundles.loads)
    assert (await engine.embed(EmbedRequest(cells=tiny_cells))).values.shape == (24, 8)
    assert not loading.done()
    assert names(loaded) == ["m@1"]
    bundles.gate.set()
    await loading
    assert names(loaded) == ["m@1", "other@1"]
    await engine.close()


async def test_models_are_loaded_one_at_a_time(registry: ModelRegistry, bundles: FakeBundles) -> None:
    bundles.gate = threading.Event()
    bundles.put("a", "m 1 8")
    bundles.put("b", "n 1 8")
    loads = [asyncio.create_task(registry.load(folder)) for folder in ("a", "b")]
    await until(lambda: bool(bundles.loads))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(bundles.loads) == 1  # either: their folders are looked up in threads
    bundles.gate.set()
    await asyncio.gather(*loads)
    assert sorted(names(registry)) == ["m@1", "n@1"]


async def test_a_caller_that_goes_away_does_not_stop_the_loading(registry: ModelRegistry, bundles: FakeBundles) -> None:
    bundles.gate = threading.Event()
    bundles.put("a", "m 1 8")
    loading = asyncio.create_task(registry.load("a"))
    await until(lambda: bool(bundles.loads))
    loading.cancel()
    bundles.gate.set()
    await until(lambda: names(registry) == ["m@1"])


async def test_what_is_loaded_already_is_not_loaded_again(loaded: ModelRegistry, bundles: FakeBundles) -> None:
    model = loaded.default
    assert (await loaded.load("a")).name == "m"
    assert loaded.default is model
    assert bundles.loads == ["m 1 8"]


async def test_a_model_that_is_unloaded_while_it_is_loaded_stays_unloaded(
    loaded: ModelRegistry, bundles: FakeBundles
) -> None:
    bundles.gate = threading.Event()
    bundles.put("a", "m 2 4")
    loading = asyncio.create_task(loaded.load("a"))
    await until(lambda: "m 2 4" in bundles.loads)
    await loaded.unload("a")
    bundles.gate.set()
    with pytest.raises(UnknownModelError, match="was unloaded while it was being loaded"):
        await loading
    assert names(loaded) == []


async def test_closing_waits_for_a_load_and_serves_it_not(loaded: ModelRegistry, bundles: FakeBundles) -> None:
    bundles.gate = threading.Event()
    bundles.put("b", "n 1 4")
    loading = asyncio.create_task(loaded.load("b"))
    await until(lambda: "n 1 4" in bundles.loads)
    closing = asyncio.create_task(loaded.close())
    await asyncio.sleep(0)
    bundles.gate.set()
    with pytest.raises(OverloadedError, match="shutting down"):
        await loading
    await closing
    with pytest.raises(OverloadedError, match="shutting down"):
        await loaded.load("b")


# Memory


async def test_a_model_beyond_the_memory_limit_is_refused_with_numbers(
    make_registry: MakeRegistry, bundles: FakeBundles
) -> None:
    registry = make_registry(max_model_bytes=250)
    for folder in ("a", "b", "c"):
        bundles.put(folder, f"{folder} 1 4")
    await registry.load("a")
    await registry.load("b")
    with pytest.raises(LimitExceededError, match="about 100 bytes, and the loaded ones take 200; the limit is 250"):
        await registry.load("c")
    assert bundles.loads == ["a 1 4", "b 1 4"]
    await registry.unload("a")
    await until(lambda: registry.model_bytes == 100)
    await registry.load("c")
    assert names(registry) == ["b@1", "c@1"]


async def test_a_model_that_is_still_used_counts(make_registry: MakeRegistry, bundles: FakeBundles) -> None:
    registry = make_registry(max_model_bytes=250)
    bundles.put("a", "m 1 4")
    await registry.load("a")
    with registry.lease():
        bundles.put("a", "m 2 5")
        await registry.load("a")
        bundles.put("a", "m 3 6")
        with pytest.raises(LimitExceededError, match="until its last request is done"):
            await registry.load("a")
    await until(lambda: registry.model_bytes == 100)
    await registry.load("a")
    assert names(registry) == ["m@3"]


# The repository


async def test_new_changed_and_removed_bundles_are_noticed(registry: ModelRegistry, bundles: FakeBundles) -> None:
    bundles.put("a", "m 1 8")
    bundles.put("b", "n 1 4")
    await registry.poll()
    assert names(registry) == ["m@1", "n@1"]
    bundles.put("a", "m 2 5")
    await registry.poll()
    assert names(registry) == ["m@2", "n@1"]
    await registry.poll()
    assert bundles.loads == ["m 1 8", "n 1 4", "m 2 5"]
    shutil.rmtree(bundles.root / "a")
    await registry.poll()
    assert names(registry) == ["m@2", "n@1"]  # it may be in the middle of being replaced
    await registry.poll()
    assert names(registry) == ["n@1"]


async def test_a_folder_that_is_back_at_the_next_look_keeps_its_model(
    registry: ModelRegistry, bundles: FakeBundles
) -> None:
    bundles.put("a", "m 1 8")
    bundles.put("b", "n 1 4")
    await registry.poll()
    (bundles.root / "a").rename(bundles.root / ".a")
    await registry.poll()
    (bundles.root / ".a").rename(bundles.root / "a")
    await registry.poll()
    (bundles.root / "a").rename(bundles.root / ".a")
    await registry.poll()
    assert names(registry) == ["m@1", "n@1"]
    assert bundles.loads == ["m 1 8", "n 1 4"]


async def test_a_bundle_that_does_not_verify_is_tried_again_when_its_files_have_changed(
    loaded: ModelRegistry, bundles: FakeBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(log, "event", lambda name, level="info", **_: events.append(name))
    path = bundles.put("b", "corrupt")
    for _ in range(3):
        await loaded.poll()
    assert bundles.loads.count("corrupt") == 1
    assert events.count("model_not_loaded") == 1
    (path / "model.onnx").write_bytes(b"half")
    await loaded.poll()
    assert bundles.loads.count("corrupt") == 2
    assert events.count("model_not_loaded") == 1
    assert [(item.name, item.state) for item in loaded.index()] == [("m", "READY"), ("b", "UNAVAILABLE")]
    bundles.put("b", "n 1 4")
    await loaded.poll()
    assert names(loaded) == ["m@1", "n@1"]


async def test_a_file_that_arrives_while_the_bundle_is_tried_is_not_missed(
    loaded: ModelRegistry, bundles: FakeBundles
) -> None:
    bundles.gate = threading.Event()
    path = bundles.put("b", "corrupt")
    look = asyncio.create_task(loaded.poll())
    await until(lambda: "corrupt" in bundles.loads)
    (path / "model.onnx").write_bytes(b"the rest")
    bundles.gate.set()
    await look
    await loaded.poll()
    assert bundles.loads.count("corrupt") == 2


async def test_a_folder_without_a_manifest_is_not_a_bundle_yet(registry: ModelRegistry, bundles: FakeBundles) -> None:
    (bundles.root / "a").mkdir()
    (bundles.root / "a" / "model.onnx").write_bytes(b"first")
    (bundles.root / "note.txt").write_text("not a folder")
    await registry.poll()
    assert registry.index() == ()
    with pytest.raises(UnknownModelError, match="no bundle folder 'a'"):
        await registry.load("a")


async def test_all_bundles_of_a_repository_are_served_and_what_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    monkeypatch.setattr(
        log, "event", lambda name, level="info", **facts: events.append((name, facts.get("folder", "")))
    )
    root = tmp_path / "bundles"
    for name in ("another", "default", "third"):
        write_tiny_bundle(root / name, name=name)
    (root / "notes").mkdir()
    (root / "README.md").write_text("not a folder")
    (root / ".staged").mkdir()
    (root / "outside").symlink_to(tmp_path)
    manifest = json.loads((root / "third" / MANIFEST).read_text())
    (root / "third" / MANIFEST).write_text(json.dumps(manifest | {"format_version": 99}))
    monkeypatch.setattr("serving.settings.BUNDLES", root)
    registry = ModelRegistry.open(Settings(threads=1))
    assert names(registry) == ["default@0.1", "another@0.1"]
    assert await registry.ready()
    problems = {item.name: item.problem for item in registry.problems()}
    assert list(problems) == ["third", "notes", "outside"]
    assert problems["third"].startswith("third/manifest.json has format 99; this perturbscope reads up to")
    assert "The folder has no manifest.json, so it is no bundle." in problems["notes"]
    assert "a link that leads out of the repository" in problems["outside"]
    assert str(root) not in str(problems)
    assert [event for event in events if event[0] in ("folder_ignored", "model_not_loaded")] == [
        ("folder_ignored", "notes"),
        ("folder_ignored", "outside"),
        ("model_not_loaded", "third"),
    ]
    assert registry.capable("embed") == ("default", "another")
    assert registry.capable("classify_cells") == ()
    (info, _) = registry.infos()
    assert [(spec.name, spec.per, spec.width) for spec in info.outputs] == [("cell_embedding", "cell", TINY_WIDTH)]
    assert (info.capabilities, info.task, info.memory_bytes) == (("embed",), "embedding", registry.model_bytes // 2)
    assert registry.default.capabilities == ("embed",)
    await registry.close()


async def test_a_folder_that_is_being_copied_is_not_in_the_log(
    registry: ModelRegistry, bundles: FakeBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(log, "event", lambda name, level="info", **_: events.append(name))
    (bundles.root / "a").mkdir()
    await registry.poll()
    assert [item.name for item in registry.problems()] == ["a"]
    bundles.put("a", "m 1 8")
    await registry.poll()
    assert registry.problems() == ()
    assert "folder_ignored" not in events
    (bundles.root / "b").mkdir()
    for _ in range(3):
        await registry.poll()
    assert events.count("folder_ignored") == 1


async def test_what_is_loaded_and_not_served_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[ServedModel] = []
    load = ServedModel.load

    def recorded(path: Path, settings: Settings) -> ServedModel:
        loaded.append(load(path, settings))
        return loaded[-1]

    def sessions() -> list[bool]:
        return [model.embedder.encoder._session is not None for model in loaded]  # type: ignore[attr-defined]

    # The registry takes its functions when it is made.
    monkeypatch.setattr(ModelRegistry.__init__, "__kwdefaults__", {"load": recorded, "estimate": lambda *_: 100})
    first, second = (write_tiny_bundle(tmp_path / name) for name in ("a", "b"))
    with pytest.raises(InvalidParameterError, match="served already, from another folder"):
        ModelRegistry.open(Settings(bundle=f"{first}:{second}", threads=1))
    assert sessions() == [False, False]
    loaded.clear()
    registry = ModelRegistry.open(Settings(repository=str(tmp_path), threads=1))
    assert names(registry) == ["tiny@0.1"]
    assert sessions() == [True, False]
    assert "served already, from another folder" in registry.problems()[0].problem
    await registry.close()
    assert sessions() == [False, False]


async def test_what_was_unloaded_on_request_stays_so_until_someone_asks(
    loaded: ModelRegistry, bundles: FakeBundles
) -> None:
    bundles.put("b", "n 1 4")
    await loaded.poll()
    assert (await loaded.unload("a")).name == "m"
    bundles.put("a", "m 2 4")
    await loaded.poll()
    assert names(loaded) == ["n@1"]
    assert ("a", "It was unloaded on request.") in [(item.folder, item.reason) for item in loaded.index()]
    await loaded.load("a")
    assert names(loaded) == ["n@1", "m@2"]


async def test_room_that_has_become_free_is_used_at_the_next_look(
    make_registry: MakeRegistry, bundles: FakeBundles
) -> None:
    registry = make_registry(max_model_bytes=150)
    bundles.put("a", "m 1 4")
    bundles.put("b", "n 1 4")
    await registry.poll()
    assert names(registry) == ["m@1"]
    await registry.unload("a")
    await until(lambda: registry.model_bytes == 0)
    await registry.poll()
    assert names(registry) == ["n@1"]


@pytest.mark.parametrize("lost", ["gone", "empty"])
async def test_a_repository_that_has_lost_its_disk_changes_nothing(
    loaded: ModelRegistry, bundles: FakeBundles, lost: str
) -> None:
    bundles.root.rename(bundles.root.with_name("elsewhere"))
    if lost == "empty":
        bundles.root.mkdir()
    for _ in range(3):
        await loaded.poll()
    assert names(loaded) == ["m@1"]
    assert await loaded.ready()


async def test_a_repository_that_is_lost_at_the_start_is_looked_for_later(tmp_path: Path) -> None:
    settings = Settings(repository=str(tmp_path / "later"))
    registry = ModelRegistry.open(settings)
    assert not await registry.ready()
    await registry.poll()
    write_tiny_bundle(tmp_path / "later" / "a")
    await registry.poll()
    assert names(registry) == ["tiny@0.1"]
    assert await registry.ready()
    await registry.close()


async def test_the_watch_looks_from_time_to_time_and_outlives_a_bug(
    make_registry: MakeRegistry, bundles: FakeBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(repository_poll=1)
    looks: list[int] = []

    async def poll() -> None:
        looks.append(len(looks))
        if len(looks) == 1:
            raise RuntimeError("a bug")

    sleep = asyncio.sleep
    monkeypatch.setattr(registry, "poll", poll)
    monkeypatch.setattr("serving.models.registry.asyncio.sleep", lambda _: sleep(0))
    registry.watch()
    async with asyncio.timeout(30):
        while len(looks) < 3:
            await sleep(0)


async def test_no_watch_without_an_interval(make_registry: MakeRegistry) -> None:
    registry = make_registry(repository_poll=0)
    before = asyncio.all_tasks()
    registry.watch()
    assert asyncio.all_tasks() == before


# Names are never paths


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../a", "/etc", "a/", "./a", "..\\a", ".hidden", "a\0", "a\n", "x" * 256, "~/a/b"],
)
async def test_a_name_that_is_a_path_is_refused(loaded: ModelRegistry, name: str) -> None:
    with pytest.raises(InvalidParameterError, match="no slashes, no leading dot"):
        await loaded.load(name)
    assert names(loaded) == ["m@1"]


async def test_links_that_lead_out_are_not_followed(
    loaded: ModelRegistry, bundles: FakeBundles, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / MANIFEST).write_text("n 1 4")
    (bundles.root / "link").symlink_to(secret)
    (bundles.root / "self").symlink_to(bundles.root)
    (bundles.root / "ring").symlink_to(bundles.root / "ring")
    for name in ("link", "self", "ring"):
        with pytest.raises(UnknownModelError, match=f"no bundle folder '{name}'"):
            await loaded.load(name)
    path = bundles.put("b", "n 1 4")
    (path / "model.onnx").symlink_to(secret / MANIFEST)
    with pytest.raises(CorruptBundleError, match=r"'model.onnx' of the bundle 'b' is a link that leads out"):
        await loaded.load("b")
    await loaded.poll()
    assert names(loaded) == ["m@1"]
    assert "secret" not in str(loaded.index())


async def test_a_link_inside_the_repository_is_a_folder(loaded: ModelRegistry, bundles: FakeBundles) -> None:
    bundles.put("n-v1", "n 1 4")
    (bundles.root / "current").symlink_to("n-v1")
    await loaded.load("current")
    assert names(loaded) == ["m@1", "n@1"]


async def test_without_a_repository_only_the_named_bundles_are_known(tmp_path: Path, fake_embedder: Embedder) -> None:
    bundles = FakeBundles(tmp_path / "models", fake_embedder)
    first, second = bundles.put("a", "m 1 4"), tmp_path / "b" / "a"
    second.mkdir(parents=True)
    (second / MANIFEST).write_text("n 1 5")
    registry = ModelRegistry(Settings(bundle=f"{first}:{second}"), load=bundles.load, estimate=bundles.estimate)
    await registry.load("a")
    await registry.load("a-2")
    assert names(registry) == ["m@1", "n@1"]
    with pytest.raises(UnknownModelError, match="has no model repository"):
        await registry.load("b")
    await registry.poll()
    registry.watch()
    assert names(registry) == ["m@1", "n@1"]
    await registry.close()


# Golden vectors, with real bundles


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_golden(write_tiny_bundle(tmp_path_factory.mktemp("golden") / "tiny")).path


def with_other_weights(proven: Path, target: Path) -> Path:
    """A bundle whose weights do not give its golden vectors; its checksums agree."""
    bundle = Bundle.open(proven)
    files: dict[str, Path | bytes] = {name: proven / name for name in bundle.manifest.files}
    return Bundle.write(target, bundle.manifest, files | {"model.onnx": tiny_files(seed=1)["model.onnx"]}).path


async def test_a_model_that_matches_is_served_and_says_so(proven: Path) -> None:
    registry = ModelRegistry.open(Settings(bundle=str(proven), threads=1))
    assert [info.golden for info in registry.infos()] == ["matched"]
    assert registry.model_bytes > 2 * (proven / "model.onnx").stat().st_size
    assert await registry.ready()
    await registry.close()


async def test_a_model_that_does_not_match_is_not_served(proven: Path, tmp_path: Path) -> None:
    path = with_other_weights(proven, tmp_path / "other")
    settings = Settings(bundle=f"{proven}:{path}", threads=1)
    with pytest.raises(GoldenMismatchError, match="largest difference"):
        ModelRegistry.open(settings)
    registry = ModelRegistry.open(settings, strict=False)
    assert len(registry.infos()) == 1
    assert not await registry.ready()
    reasons = [item.reason for item in registry.index() if item.folder == "other"]
    assert "lowest cosine" in reasons[0]
    with pytest.raises(GoldenMismatchError):
        await registry.load("other")
    shutil.rmtree(path)
    write_tiny_bundle(path, name="other")
    await registry.load("other")
    assert await registry.ready()
    assert [info.golden for info in registry.infos()] == ["matched", "absent"]
    await registry.close()


async def test_a_swap_to_a_model_that_does_not_match_keeps_the_old(proven: Path, tmp_path: Path) -> None:
    live = tmp_path / "live"
    shutil.copytree(proven, live)
    registry = ModelRegistry.open(Settings(bundle=str(live), threads=1))
    before = registry.infos()
    shutil.rmtree(live)
    with_other_weights(proven, live)
    with pytest.raises(GoldenMismatchError):
        await registry.load("live")
    assert registry.infos() == before
    assert await registry.ready()
    await registry.close()


async def test_a_bundle_without_golden_vectors_is_served_with_a_warning(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    monkeypatch.setattr(log, "event", lambda name, level="info", **_: events.append((name, level)))
    model = await asyncio.to_thread(ServedModel.load, tiny_bundle, Settings(threads=1))
    assert model.info.golden == "absent"
    assert ("model_loaded", "warning") in events
    await model.close()


def spoil(path: Path) -> None:
    data = json.loads((path / GOLDEN).read_text())
    data["cells"][0]["vector"][0] += 0.01
    (path / GOLDEN).write_text(json.dumps(data))


async def test_a_damaged_golden_file_is_a_damaged_bundle(proven: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(proven, tmp_path / "copy"))
    spoil(path)
    with pytest.raises(CorruptBundleError, match=r"golden.json has the SHA-256"):
        ModelRegistry.open(Settings(bundle=str(path)))


async def test_after_a_failure_the_model_must_match_again(fake_embedder: Embedder, tiny_cells: CountMatrix) -> None:
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    golden = make_golden({"fp32": fake_embedder}, fake_embedder.family.vocabulary)  # type: ignore[attr-defined]
    model = replace(served(fake_embedder), golden=golden)
    registry = ModelRegistry(Settings(), [model])
    engine = Engine(registry, Settings())
    assert await engine.ready()
    encoder.error = RuntimeError("the device was lost")
    with pytest.raises(Exception, match="device was lost"):
        await engine.embed(EmbedRequest(cells=tiny_cells))
    assert not await engine.ready()
    encoder.error = None
    encoder.width = TINY_WIDTH
    right = encoder.run
    encoder.run = lambda inputs, outputs=(CELL_EMBEDDING,): {  # type: ignore[method-assign]
        name: values * np.float32(1.01) for name, values in right(inputs, outputs).items()
    }
    assert not await engine.ready()
    await engine.embed(EmbedRequest(cells=tiny_cells))
    assert not await engine.ready()  # a batch that ran does not prove the vectors
    assert [item.state for item in registry.index()] == ["UNAVAILABLE"]
    encoder.run = right  # type: ignore[method-assign]
    assert await engine.ready()
    assert model.verified
    await engine.close()
