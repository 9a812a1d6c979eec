"""Readers of files in processes of their own: their answers, and hostile files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest

from perturbscope.errors import LimitExceededError, OverloadedError, PerturbScopeError, UnreadableFileError
from perturbscope.report import Absent
from serving.engine.columns import Columns
from serving.settings import Settings
from serving.uploads.pipe import LENGTH, upload_from_parts, upload_to_frame
from serving.uploads.readers import MAX_READERS, FileReaders, bytes_of_a_reader
from serving.uploads.requests import Upload, read_upload
from tests.fuzz.seeds import h5ad

LABELLED = {"perturbation_key": "perturbation", "control": "control"}
REQUESTS: list[tuple[str, dict[str, str]]] = [
    ("embed", {"model": "some"}),
    ("columns", {}),
    ("score", {**LABELLED, "batch_key": "batch"}),
    ("compare", {"perturbation_key": "perturbation", "use_rep": "X_pca", "pairs": '[["KO", "control"]]'}),
    ("report", {**LABELLED, "title": "Seen"}),
    ("report", {**LABELLED, "use_rep": "X_pca"}),
]
LOOP = Path(__file__).resolve().parents[3] / "fuzz" / "corpus" / "h5ad" / "attribute-loop"
"""An upload with an attribute that libhdf5 reads in an endless loop; found by fuzzing."""


@pytest.fixture(scope="module")
def readers() -> Iterator[FileReaders]:
    made = FileReaders(2)
    yield made
    made.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "upload.h5ad").write_bytes(h5ad())
    return tmp_path / "upload.h5ad"


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    (tmp_path / "loop.h5ad").write_bytes(LOOP.read_bytes()[1:])
    return tmp_path / "loop.h5ad"


def same(a: Any, b: Any) -> bool:
    """Whether two requests hold the same, arrays and matrices included."""
    if hasattr(a, "counts") and hasattr(a, "totals"):
        return (a.counts != b.counts).nnz == 0 and same(a.totals, b.totals) and same(a.gene_ids, b.gene_ids)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return bool(a == b)


@pytest.mark.parametrize(("route", "parameters"), REQUESTS, ids=lambda item: item if isinstance(item, str) else "")
async def test_what_comes_back_is_what_was_read(
    readers: FileReaders, path: Path, route: str, parameters: dict[str, str]
) -> None:
    there = await readers.read(route, path, parameters, Settings())
    here = read_upload(route, path, parameters, Settings())
    assert same(there, here)


async def test_an_error_is_the_same_error(readers: FileReaders, path: Path) -> None:
    with pytest.raises(PerturbScopeError) as here:
        read_upload("embed", path, {"layer": "nope"}, Settings())
    with pytest.raises(type(here.value)) as there:
        await readers.read("embed", path, {"layer": "nope"}, Settings())
    assert there.value.to_dict() == here.value.to_dict()
    with pytest.raises(LimitExceededError, match="takes 3"):
        await readers.read("embed", path, {}, Settings(max_cells=3))


async def test_a_file_that_never_ends_is_one_callers_error(readers: FileReaders, path: Path, loop: Path) -> None:
    hostile = asyncio.ensure_future(readers.read("embed", loop, {}, Settings(file_timeout=2)))
    good = await readers.read("embed", path, {}, Settings())
    assert len(good.request.cells) == 8  # type: ignore[union-attr, arg-type]
    with pytest.raises(UnreadableFileError, match="within 2 seconds"):
        await hostile


async def test_a_caller_that_leaves_ends_the_reading(loop: Path) -> None:
    readers = FileReaders(1)
    reading = asyncio.ensure_future(readers.read("embed", loop, {}, Settings()))
    me, end = psutil.Process(), time.monotonic() + 30
    while not any(child.children() for child in me.children()) and time.monotonic() < end:
        await asyncio.sleep(0.01)
    (reader,) = [child for child in me.children() if child.children()]
    family = [reader, *reader.children()]
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not psutil.wait_procs(family, timeout=30)[1]
    readers.close()


async def test_a_reader_that_dies_is_replaced(readers: FileReaders, path: Path) -> None:
    await readers.read("embed", path, {}, Settings())
    for reader in readers._idle:
        os.kill(reader._process.pid, signal.SIGKILL)
        reader._process.wait()
    # As the kernel does when memory runs out.
    with pytest.raises(LimitExceededError, match="was ended: it needed more memory"):
        await readers.read("embed", path, {}, Settings())
    readers.close()
    assert (await readers.read("embed", path, {}, Settings())).request is not None


async def test_memory_is_bounded(readers: FileReaders, path: Path) -> None:
    """A file that needs too much memory ends in an error; the kernel kills no process."""
    bomb = path.with_name("bomb.h5ad")
    bomb.write_bytes(path.read_bytes())
    with h5py.File(bomb, "r+") as file:
        file["obs"].create_dataset("bomb", shape=(2**37,), dtype="f8", chunks=(2**27,), compression="gzip")
    with pytest.raises(PerturbScopeError):
        await readers.read("columns", bomb, {}, Settings(max_values=1000))


def shared_texts(path: Path, n: int, size: int) -> None:
    """Let the n entries of an attribute of obs share one string of `size` bytes, as HDF5's format allows."""
    with h5py.File(path, "r+", libver="latest") as file:
        del file["obs"].attrs["column-order"]
        texts = np.array(["Z" * size] + [f"q{i:07d}" for i in range(n - 1)], dtype=object)
        file["obs"].attrs.create("column-order", texts, dtype=h5py.string_dtype())
    content = bytearray(path.read_bytes())
    # An entry is a length, the place of a heap and a number in it: the first of n that follow each other.
    start = content.find(struct.pack("<I", size))
    while (
        struct.unpack_from("<I", content, start + 16)[0] != 8 or struct.unpack_from("<I", content, start + 32)[0] != 8
    ):
        start = content.find(struct.pack("<I", size), start + 1)
    content[start : start + 16 * n] = bytes(content[start : start + 16]) * n
    path.write_bytes(content)


async def test_texts_that_share_their_bytes_take_no_more_than_a_reader_may(readers: FileReaders, path: Path) -> None:
    shared_texts(path, 3000, 2**20)
    most, done = 0, asyncio.Event()

    async def watch() -> None:
        nonlocal most
        while not done.is_set():
            for reader in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    most = max(most, reader.memory_info().rss)
            await asyncio.sleep(0.02)

    watching = asyncio.ensure_future(watch())
    with pytest.raises(PerturbScopeError):
        await readers.read("columns", path, {}, Settings())
    done.set()
    await watching
    assert 0 < most < 800 * 2**20
    path.write_bytes(h5ad())
    assert (await readers.read("columns", path, {}, Settings())).request.n_cells == 8


async def test_a_reader_is_ended_before_the_server(readers: FileReaders, path: Path) -> None:
    await readers.read("embed", path, {}, Settings())
    scores = [Path(f"/proc/{reader._process.pid}/oom_score_adj").read_text() for reader in readers._idle]
    assert scores
    assert {int(score) for score in scores} == {1000}


async def test_room_for_a_request_is_asked_for_before_it_is_taken(readers: FileReaders, path: Path) -> None:
    asked: list[int] = []

    def hold(n_bytes: int) -> None:
        asked.append(n_bytes)
        raise OverloadedError("full")

    with pytest.raises(OverloadedError, match="full"):
        await readers.read("embed", path, {}, Settings(), hold)
    assert asked[0] > 100
    assert (await readers.read("embed", path, {}, Settings())).request is not None


@pytest.mark.parametrize("gib", [3, 4, 8, 64])
def test_server_and_readers_fit_their_container(gib: int) -> None:
    """Readers together, what requests hold, the server itself and an eighth beside them."""
    memory, settings = gib * 2**30, Settings()
    n_readers = max(1, min(MAX_READERS, memory // 2**31))
    each = bytes_of_a_reader(settings, memory)
    assert n_readers * (each + 192 * 2**20) + settings.max_held_bytes + 768 * 2**20 <= memory * 7 / 8
    assert bytes_of_a_reader(Settings(max_reader_bytes=2**31), memory) <= 2**31 // MAX_READERS


def test_frames_that_are_cut_are_noticed() -> None:
    size, text, *parts = upload_to_frame(Upload(Columns(1, 2, (), ("X_pca",))))
    assert (LENGTH.unpack(size)[0], parts) == (len(text), [])
    with pytest.raises(RuntimeError, match="The reader of files failed:\nTraceback"):
        upload_from_parts({"bug": "Traceback", "parts": []}, [])


def test_counts_that_are_absent_say_why(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        values = file["X"]["data"][()] + 0.5
        del file["X"]["data"]
        file["X"]["data"] = values
    upload = read_upload("report", path, {**LABELLED, "use_rep": "X_pca"}, Settings())
    assert isinstance(upload.request.counts, Absent)  # type: ignore[union-attr]
    _, head, *parts = upload_to_frame(upload)
    assert same(upload_from_parts(json.loads(head), parts), upload)
