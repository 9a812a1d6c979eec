from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perturbscope.errors import InvalidParameterError
from tests.file_server import FileServer, serve
from training.commands import download
from training.commands.download import FILES, RemoteFile, fetch
from training.errors import DownloadError

CONTENT = np.random.default_rng(0).bytes(3 * 2**20 + 17)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve(FileServer(files={"perturbed.h5ad": CONTENT})) as running:
        yield running


def remote(server: FileServer, **changes: Any) -> RemoteFile:
    given = {"size": len(CONTENT), "md5": MD5, **changes}
    return RemoteFile(name="perturbed.h5ad", url=f"{server.url}/perturbed.h5ad", **given)


class Waits(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize("redirect", [False, True])
def test_a_file_arrives_checked_and_with_its_md5(server: FileServer, tmp_path: Path, redirect: bool) -> None:
    server.redirect = redirect
    seen: list[tuple[str, int, int | None]] = []
    path = fetch(remote(server), tmp_path / "new" / "folder", report=lambda *what: seen.append(what))
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["perturbed.h5ad", "perturbed.h5ad.md5"]
    assert (path.parent / "perturbed.h5ad.md5").read_text() == f"{MD5}  perturbed.h5ad\n"
    assert ("fetch", len(CONTENT), len(CONTENT)) in seen
    assert seen[-1] == ("check", len(CONTENT), len(CONTENT))
    again: list[str] = []
    server.statuses = [500]
    assert fetch(remote(server), path.parent, say=again.append) == path
    assert "is there already" in again[0]


def test_a_broken_connection_is_continued_where_it_broke(server: FileServer, tmp_path: Path) -> None:
    server.cut_after = [2**20, 5, 2**20]
    waits = Waits()
    fetch(remote(server), tmp_path, sleep=waits)
    assert server.seen == [None, f"bytes={2**20}-", f"bytes={2**20 + 5}-", f"bytes={2**21 + 5}-"]
    assert (tmp_path / "perturbed.h5ad").read_bytes() == CONTENT
    assert waits == [1.0, 1.0, 1.0]


def test_a_killed_run_is_continued_by_the_next(server: FileServer, tmp_path: Path) -> None:
    def die(_: float) -> None:
        raise KeyboardInterrupt

    server.cut_after = [1000]
    with pytest.raises(KeyboardInterrupt):
        fetch(remote(server), tmp_path, sleep=die)
    assert names(tmp_path) == ["perturbed.h5ad.part", "perturbed.h5ad.part.json"]
    fetch(remote(server), tmp_path)
    assert server.seen == [None, "bytes=1000-"]
    assert (tmp_path / "perturbed.h5ad").read_bytes() == CONTENT


def test_what_was_complete_is_only_checked(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "perturbed.h5ad.part").write_bytes(CONTENT)
    fetch(remote(server), tmp_path)
    assert server.seen == []


def test_a_server_without_ranges_sends_it_all_again(server: FileServer, tmp_path: Path) -> None:
    server.ranges = False
    server.cut_after = [5000]
    said: list[str] = []
    fetch(remote(server), tmp_path, say=said.append, sleep=Waits())
    assert (tmp_path / "perturbed.h5ad").read_bytes() == CONTENT
    assert any("whole file again" in line for line in said)


@pytest.mark.parametrize("etag", ['"two"', None], ids=["another etag", "no etag"])
def test_a_file_that_changed_meanwhile_is_not_mixed_with_the_old_one(
    server: FileServer, tmp_path: Path, etag: str | None
) -> None:
    def swap(_: float) -> None:
        server.files["perturbed.h5ad"] = CONTENT[::-1] + b"more"
        server.etag = etag

    server.cut_after = [5000]
    path = fetch(remote(server, size=None, md5=None), tmp_path, sleep=swap)
    assert path.read_bytes() == CONTENT[::-1] + b"more"


def test_too_much_on_disk_is_thrown_away(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "perturbed.h5ad.part").write_bytes(CONTENT + b"x")
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "perturbed.h5ad.part").write_bytes(CONTENT + b"x")
    assert fetch(remote(server, size=None), tmp_path / "other", sleep=Waits()).read_bytes() == CONTENT


def test_a_wrong_body_never_gets_the_name(server: FileServer, tmp_path: Path) -> None:
    server.files["perturbed.h5ad"] = b"\0" + CONTENT[1:]
    with pytest.raises(DownloadError, match=f"but {MD5} is expected"):
        fetch(remote(server), tmp_path)
    assert names(tmp_path) == []


def test_a_file_of_another_size_is_refused_at_once(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"offers 3,145,745 bytes, but perturbed\.h5ad has 5"):
        fetch(remote(server, size=5), tmp_path)
    assert "perturbed.h5ad" not in names(tmp_path)


def test_a_busy_server_is_asked_again_when_it_says(server: FileServer, tmp_path: Path) -> None:
    server.statuses, server.retry_after = [503, 429, 502], "7"
    waits = Waits()
    fetch(remote(server), tmp_path, sleep=waits)
    assert waits == [7.0, 7.0, 7.0]
    server.statuses, server.retry_after = [503, 503, 503], None
    waits.clear()
    fetch(remote(server), tmp_path / "b", sleep=waits)
    assert waits == [2.0, 4.0, 8.0]


def test_giving_up_keeps_what_arrived(server: FileServer, tmp_path: Path) -> None:
    server.cut_after = [700]
    server.statuses = []
    waits = Waits()

    def down(seconds: float) -> None:
        waits(seconds)
        server.statuses = [503]

    with pytest.raises(DownloadError, match=r"answered 503, 4 times in a row\. 700 bytes are kept"):
        fetch(remote(server), tmp_path, sleep=down, attempts=4)
    assert (tmp_path / "perturbed.h5ad.part").read_bytes() == CONTENT[:700]


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "may have moved"), (410, "nothing at"), (403, "with a browser"), (400, "answered HTTP 400")],
)
def test_final_answers_are_not_repeated(server: FileServer, tmp_path: Path, status: int, message: str) -> None:
    server.statuses = [status]
    with pytest.raises(DownloadError, match=message):
        fetch(remote(server), tmp_path, sleep=lambda _: pytest.fail("waited"))


def test_no_server_at_all(tmp_path: Path) -> None:
    file = RemoteFile(name="a", url="http://127.0.0.1:9/a")
    with pytest.raises(DownloadError, match="2 times in a row"):
        fetch(file, tmp_path, attempts=2, sleep=Waits())


def test_space_is_looked_at_first(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(InvalidParameterError, match=r"1,000 bytes left, but 271,581,201 more"):
        fetch(remote(server), tmp_path)
    assert (tmp_path / "perturbed.h5ad.part").read_bytes() == b""


def test_another_file_of_that_name_is_not_touched(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "perturbed.h5ad").write_text("mine")
    with pytest.raises(InvalidParameterError, match="is another file"):
        fetch(remote(server), tmp_path)
    assert (tmp_path / "perturbed.h5ad").read_text() == "mine"


def test_two_processes_do_not_write_one_file(server: FileServer, tmp_path: Path) -> None:
    with (tmp_path / "perturbed.h5ad.part").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InvalidParameterError, match="Another process"):
            fetch(remote(server), tmp_path)


def test_an_unknown_md5_is_recorded_on_first_use_and_holds_from_then_on(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{server.url}/perturbed.h5ad"
    assert download.main([url, str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "No MD5 is known for perturbed.h5ad" in shown
    assert "3,145,745 bytes, checked" in shown
    (tmp_path / "perturbed.h5ad").unlink()
    server.files["perturbed.h5ad"] = CONTENT[::-1]
    assert download.main([url, str(tmp_path)]) == 1
    assert "is expected" in capsys.readouterr().err
    assert names(tmp_path) == ["perturbed.h5ad.md5"]


def test_a_length_is_not_needed(server: FileServer, tmp_path: Path) -> None:
    server.send_length = False
    assert fetch(remote(server, size=None), tmp_path).read_bytes() == CONTENT


def test_the_command_names_what_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert download.main(["replogle", str(tmp_path)]) == 2
    assert "replogle-k562-gwps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        download.main(["--help"])
    assert "Zenodo record" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(FILES))
def test_listed_files_have_a_size_and_an_md5(name: str) -> None:
    file = FILES[name]
    assert file.url.startswith("https://")
    assert len(bytes.fromhex(file.md5 or "")) == 16
    assert file.size is not None
    assert file.size > 10**9
    assert download._chosen(name, None) is file
