"""``python -m training download NAME DIR``: fetch a public data set, resumable and checked.

Received bytes are kept as ``<name>.part`` and continued (HTTP range requests) after a lost connection, a kill or a
restart of the machine. The file gets its name only when its size and MD5 are right; ``<name>.md5`` beside it serves
``md5sum -c``.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

import httpx
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from perturbscope.errors import InvalidParameterError
from training import console
from training.errors import DownloadError

SPARE_BYTES = 2**28
"""Disk space that must stay free after the download."""
_BLOCK = 2**20
_TIMEOUT = httpx.Timeout(60.0)
_MOVED_ON = (404, 410)
_DENIED = (401, 403)
Report = Callable[[str, int, int | None], None]
"""Called with the name of the work, the bytes done, and all bytes or None."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file to fetch.

    Attributes
    ----------
    name
        Name on disk.
    url
        Address.
    size, md5
        Bytes and MD5 that the publisher lists; None if they are not known.
    about
        Description, with the origin of size and MD5.
    """

    name: str
    url: str
    size: int | None = None
    md5: str | None = None
    about: str = ""


FILES: Mapping[str, RemoteFile] = {
    "replogle-k562-gwps": RemoteFile(
        name="ReplogleWeissman2022_K562_gwps.h5ad",
        url="https://zenodo.org/api/records/13350497/files/ReplogleWeissman2022_K562_gwps.h5ad/content",
        size=8_805_466_154,
        md5="13db594f8f1d2ccb88fec44a13e414dc",
        about="Replogle et al. 2022, K562 genome-scale, as harmonised by scPerturb (Peidli et al. 2024), Zenodo record "
        "13350497; size and MD5 as public repositories quote them from that record",
    ),
    "replogle-k562-gwps-authors": RemoteFile(
        name="K562_gwps_raw_singlecell_01.h5ad",
        url="https://ndownloader.figshare.com/files/35775507",
        size=65_830_941_948,
        md5="887e3e6a8c8df6eadf7a3030a53c9546",
        about="The same cells as the authors published them, uncompressed: Figshare+ article 20029387; size and MD5 as "
        "public repositories quote them from that article",
    ),
}


def fetch(
    file: RemoteFile,
    folder: Path,
    *,
    report: Report | None = None,
    say: Callable[[str], None] = lambda _: None,
    attempts: int = 10,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch a file into a folder, and continue an earlier attempt.

    Parameters
    ----------
    file
        File to fetch. Without an MD5, that in ``<name>.md5`` is used if it exists; else the MD5 of the received file is
        written there, to be compared with the publisher's.
    folder
        Directory for the file; made if it does not exist.
    report, say
        Functions that take the progress, and messages for people.
    attempts
        Attempts in a row without a new byte after which to give up.
    sleep
        Function that waits a number of seconds.

    Raises
    ------
    DownloadError
        The server has no such file, refuses it, or offers another size; no byte arrives any more; or the MD5 is wrong.
    InvalidParameterError
        The folder has too little space or another file of that name, or another process fetches the same file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.name
    wanted = file.md5 or _recorded(folder, file.name)
    if target.exists():
        if wanted is None or _md5(target, report) == wanted:
            say(f"{target} is there already{'' if wanted else '; its MD5 is not known'}.")
            return target
        raise InvalidParameterError(
            f"{target} exists and is another file: its MD5 is not {wanted}. Move it away and run the command again.",
            field="folder",
        )
    with _part(folder / f"{file.name}.part") as part:
        _Transfer(file, part, report, say, attempts, sleep).run()
        received = _md5(Path(part.name), report)
        if wanted is not None and received != wanted:
            _forget(Path(part.name))
            raise DownloadError(
                f"{file.url} gave {target.name} with MD5 {received}, but {wanted} is expected. The file was removed; "
                "run the command again, and if it repeats, the publisher has changed the file.",
                field="url",
            )
        part.flush()
        os.fsync(part.fileno())
        os.replace(part.name, target)
    _forget(Path(part.name))
    record = folder / f"{file.name}.md5"
    if wanted is None:
        say(f"No MD5 is known for {file.name}. That of what arrived is in {record}: compare it with the publisher's.")
    record.write_text(f"{received}  {file.name}\n", encoding="utf-8")
    return target


class _Transfer:
    """A series of attempts to complete a ``.part`` file."""

    def __init__(
        self,
        file: RemoteFile,
        part: IO[bytes],
        report: Report | None,
        say: Callable[[str], None],
        attempts: int,
        sleep: Callable[[float], None],
    ) -> None:
        self._file = file
        self._part = part
        self._notes = Path(f"{part.name}.json")
        self._report = report
        self._say = say
        self._attempts = attempts
        self._sleep = sleep

    def run(self) -> None:
        failures = 0
        with httpx.Client(follow_redirects=True, timeout=_TIMEOUT) as client:
            while True:
                before = self._length()
                try:
                    if self._is_complete() or self._attempt(client):
                        return
                    reason, pause = "the connection closed early", None
                except _RetryableError as error:
                    reason, pause = str(error), error.pause
                except httpx.TransportError as error:
                    reason, pause = str(error) or type(error).__name__, None
                failures = 0 if self._length() > before else failures + 1
                if failures >= self._attempts:
                    raise DownloadError(
                        f"{self._file.url}: {reason}, {failures} times in a row. {self._length():,} bytes are kept in "
                        f"{self._part.name}; run the command again to go on.",
                        field="url",
                    )
                wait = min(60.0, 2.0**failures) if pause is None else min(pause, 600.0)
                self._say(f"{reason} at byte {self._length():,}; trying again in {wait:.0f} s")
                self._sleep(wait)

    def _attempt(self, client: httpx.Client) -> bool:
        """Make one request. Returns whether the file is complete after it."""
        start, known = self._length(), self._read_notes()
        headers = {"Accept-Encoding": "identity", "User-Agent": "perturbscope"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if known.get("etag"):
                headers["If-Range"] = known["etag"]
        with client.stream("GET", self._file.url, headers=headers) as answer:
            self._check_status(answer)
            if answer.status_code == 416:
                self._restart("what is there does not fit the server's file")
                return False
            etag = answer.headers.get("ETag", "")
            total = _total(answer)
            self._check_size(total)
            begins = _range_start(answer) if answer.status_code == 206 else 0
            changed = bool(known) and (known.get("total"), known.get("etag")) != (total, etag)
            if start and answer.status_code == 206 and (changed or begins != start):
                self._restart("the file on the server has changed")
                return False
            if start and answer.status_code == 200:
                self._restart("the server sends the whole file again")
            self._check_space(total)
            self._notes.write_text(json.dumps({"total": total, "etag": etag}), encoding="utf-8")
            for block in answer.iter_raw():
                self._part.write(block)
                if self._report:
                    self._report("fetch", self._length(), total)
            self._part.flush()
        return total is None or self._length() == total

    def _check_status(self, answer: httpx.Response) -> None:
        status = answer.status_code
        if status in {200, 206, 416}:
            return
        if status == 429 or status >= 500:
            pause = answer.headers.get("Retry-After", "")
            raise _RetryableError(f"the server answered {status}", float(pause) if pause.isdigit() else None)
        if status in _MOVED_ON:
            raise DownloadError(
                f"There is nothing at {self._file.url} (HTTP {status}). It may have moved: look for {self._file.name} "
                "and give its address instead of the name.",
                field="url",
            )
        if status in _DENIED:
            raise DownloadError(
                f"{self._file.url} refuses to be read by a program (HTTP {status}). Fetch it with a browser, put it "
                f"beside {self._part.name} as {self._file.name}, and run the command again: it checks what is there.",
                field="url",
            )
        raise DownloadError(f"{self._file.url} answered HTTP {status}.", field="url")

    def _check_size(self, total: int | None) -> None:
        if self._file.size is not None and total is not None and total != self._file.size:
            raise DownloadError(
                f"{self._file.url} offers {total:,} bytes, but {self._file.name} has {self._file.size:,}: the "
                "publisher has changed the file, or this is a notice in its place.",
                field="url",
            )

    def _check_space(self, total: int | None) -> None:
        free = shutil.disk_usage(Path(self._part.name).parent).free
        needed = (total or 0) - self._length() + SPARE_BYTES
        if free < needed:
            raise InvalidParameterError(
                f"{Path(self._part.name).parent} has {free:,} bytes left, but {needed:,} more are needed. Make room, "
                "or give another folder; what has arrived is kept.",
                field="folder",
            )

    def _is_complete(self) -> bool:
        total = self._file.size or self._read_notes().get("total")
        if total is not None and self._length() > total:
            self._restart("what is there is longer than the file")
        return total is not None and self._length() == total

    def _restart(self, reason: str) -> None:
        self._say(f"{reason}; starting from the beginning")
        self._part.truncate(0)
        self._part.seek(0)
        self._notes.unlink(missing_ok=True)

    def _length(self) -> int:
        return self._part.seek(0, os.SEEK_END)

    def _read_notes(self) -> dict[str, Any]:
        try:
            notes = json.loads(self._notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}


class _RetryableError(Exception):
    """The request is worth another attempt, after `pause` seconds if the server gives a time."""

    def __init__(self, message: str, pause: float | None) -> None:
        super().__init__(message)
        self.pause = pause


@contextmanager
def _part(path: Path) -> Iterator[IO[bytes]]:
    """Open the growing file for this process alone."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidParameterError(f"Another process fetches {path}. Wait for it.", field="folder") from error
        yield file


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(f"{part.name}.json").unlink(missing_ok=True)


def _total(answer: httpx.Response) -> int | None:
    if answer.status_code == 206:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = answer.headers.get("Content-Length", "")
    return int(total) if total.isdigit() else None


def _range_start(answer: httpx.Response) -> int:
    start = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else -1


def _recorded(folder: Path, name: str) -> str | None:
    try:
        words = (folder / f"{name}.md5").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return words[0] if words else None


def _md5(path: Path, report: Report | None) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    done, total = 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            if report:
                report("check", done, total)
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    listed = "\n".join(f"  {name}: {file.about}" for name, file in FILES.items())
    parser = argparse.ArgumentParser(
        description="Fetch a public data set, resumable and checked.",
        epilog=f"names:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="NAME|URL", help="a name from below, or an http(s) address")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to put the file")
    parser.add_argument("--md5", help="expected MD5 of an address that is not in the list")
    options = parser.parse_args(arguments)

    def get() -> None:
        file = _chosen(options.what, options.md5)
        columns = (
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console.stderr()) as bars:
            tasks: dict[str, Any] = {}

            def report(what: str, done: int, total: int | None) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            path = fetch(file, options.folder, report=report, say=bars.console.print)
        console.stderr().print(f"{path}: {path.stat().st_size:,} bytes, checked")

    return console.run(get)


def _chosen(what: str, md5: str | None) -> RemoteFile:
    if what in FILES:
        return FILES[what]
    parts = urlsplit(what)
    name = PurePosixPath(parts.path.removesuffix("/content")).name
    if parts.scheme not in {"http", "https"} or not name:
        raise InvalidParameterError(
            f"{what!r} is neither an http(s) address of a file nor one of {', '.join(FILES)}.", field="what"
        )
    return RemoteFile(name=name, url=what, md5=md5)
