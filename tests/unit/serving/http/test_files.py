from __future__ import annotations

import asyncio
import errno
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import starlette.formparsers

from perturbscope import protocol
from serving.http import edge
from serving.uploads.folder import PREFIX


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the server keeps uploads."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def left_in(folder: Path) -> list[Path]:
    """What lies in the folder of temporary files beside the server's own, empty folder and its lock."""
    return [path for path in folder.rglob("*") if path.name != "lock" and not path.name.startswith(PREFIX)]


def check_full(reply: httpx.Response, uploads: Path) -> None:
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "30"
    error = reply.json()["error"]
    assert error["code"] == "overloaded"
    assert "no disk left" in error["message"]
    assert str(uploads) not in error["message"]
    assert left_in(uploads) == []


async def test_a_full_disk_is_overload_and_leaves_nothing_behind(
    http: httpx.AsyncClient, h5ad: Path, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "FILE_NAME", "/dev/full")
    content = h5ad.read_bytes()
    check_full(await http.post("/v1/embed", content=content, headers={"content-type": protocol.HDF5}), uploads)
    check_full(await http.post("/v1/embed", files={"file": content}), uploads)


async def test_a_disk_too_full_for_the_form_is_overload(
    http: httpx.AsyncClient, h5ad: Path, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form is kept in memory up to a megabyte, then on disk, before its file is taken out."""

    class Full(tempfile.SpooledTemporaryFile[bytes]):
        def write(self, *args: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(starlette.formparsers, "SpooledTemporaryFile", Full)
    check_full(await http.post("/v1/embed", files={"file": h5ad.read_bytes()}), uploads)


async def test_no_directory_for_an_upload_is_overload(
    http: httpx.AsyncClient, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    check_full(await http.post("/v1/embed", content=b"x", headers={"content-type": protocol.HDF5}), uploads)


async def test_another_failure_of_the_disk_is_the_servers(
    http: httpx.AsyncClient, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tempfile, "mkdtemp", broken)
    reply = await http.post("/v1/embed", content=b"x", headers={"content-type": protocol.HDF5})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal"


async def test_a_slow_disk_does_not_hold_up_others(
    http: httpx.AsyncClient, h5ad: Path, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one upload is being written, another request is answered."""
    writing, go_on = threading.Event(), threading.Event()
    opened = Path.open

    class Slow:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> int:
            writing.set()
            assert go_on.wait(30)
            written: int = self._file.write(data)
            return written

    def slow(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(path, mode, *args, **kwargs)
        return Slow(file) if uploads in path.parents and "w" in mode else file

    monkeypatch.setattr(Path, "open", slow)
    upload = asyncio.ensure_future(
        http.post("/v1/embed", content=h5ad.read_bytes(), headers={"content-type": protocol.HDF5})
    )
    started = time.monotonic()
    while not writing.is_set() and time.monotonic() - started < 30:
        await asyncio.sleep(0.005)
    assert (await http.get("/v1/models")).status_code == 200
    assert not upload.done()
    go_on.set()
    assert (await upload).status_code == 200
    assert left_in(uploads) == []
