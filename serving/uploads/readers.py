"""Uploaded files are read in processes of their own.

A damaged HDF5 file can send libhdf5 into a loop that never ends, or make it crash, and no check of ours comes before
it: the loop holds Python's global lock, so a thread would freeze the whole server. So each file is read in a process
that may take a bounded time and memory, and whose end, however it comes, is one caller's error.

A reader (:mod:`serving.uploads.child`) waits with everything imported, and forks for each file. What it read comes
back in the codecs of the wire, which check it as they check callers: nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO

from perturbscope.errors import UnreadableFileError
from perturbscope.threads import usable_cores
from serving.settings import ROOT, Settings
from serving.uploads.pipe import LENGTH, upload_from_parts
from serving.uploads.requests import Upload

MOST_READERS = max(2, min(4, usable_cores()))
"""Files that are read at a time; so many processes (of 150 MiB each) wait for the next ones, once they were needed."""


class _Reader:
    """A process that reads one file at a time."""

    def __init__(self) -> None:
        known = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *([known] if known else [])]),
            # It forks, so it must not have threads.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serving.uploads.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def ask(self, question: bytes) -> tuple[dict[str, object], list[bytes]]:
        """The answer to one line: its head and its parts. Raises EOFError if the process ended instead."""
        source, target = self._process.stdout, self._process.stdin
        assert source is not None and target is not None  # noqa: S101, PT018  both are pipes
        try:
            target.write(question + b"\n")
            target.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        head = json.loads(_exactly(source, LENGTH.unpack(_exactly(source, LENGTH.size))[0]))
        return head, [_exactly(source, int(length)) for length in head["parts"]]

    def kill(self) -> None:
        """End it and what it started; may be called from any thread, and twice."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def bury(self) -> int:
        """Kill it, and wait for its end. Returns its exit status, of which 128 and more are signals."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101, PT018
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self.kill()
        status = self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        return status


class _Reading:
    """One file that is read; `cancel` may come at any time, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader: _Reader | None = None
        self.cancelled = False

    def by(self, reader: _Reader) -> None:
        with self._lock:
            self._reader = reader
            if self.cancelled:
                reader.kill()

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._reader is not None:
                self._reader.kill()


class FileReaders:
    """Reads files, some at a time.

    Parameters
    ----------
    most
        How many at a time; further ones wait.
    """

    def __init__(self, most: int = MOST_READERS) -> None:
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="perturbscope-reader")
        self._lock = threading.Lock()
        self._idle: list[_Reader] = []

    async def read(self, route: str, path: Path, parameters: Mapping[str, str], settings: Settings) -> Upload:
        """The request that an uploaded file and its parameters make; when cancelled, its reading ends at once.

        Raises
        ------
        UnreadableFileError
            The file took too long to read, or its reader did not survive it.
        PerturbScopeError
            As :func:`serving.uploads.requests.read_upload`.
        """
        reading = _Reading()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._read, reading, route, path, dict(parameters), settings
            )
        except asyncio.CancelledError:
            reading.cancel()
            raise

    def close(self) -> None:
        """End all idle readers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for reader in idle:
            reader.kill()
            reader.bury()

    def warm(self) -> None:
        """Start a reader before the first file comes."""
        with self._lock:
            if not self._idle:
                self._idle.append(_Reader())

    def _read(
        self, reading: _Reading, route: str, path: Path, parameters: Mapping[str, str], settings: Settings
    ) -> Upload:
        if reading.cancelled:
            raise UnreadableFileError("The caller went away.", field="file")
        with self._lock:
            reader = self._idle.pop() if self._idle else None
        reader = reader or _Reader()
        question = {"route": route, "path": str(path), "parameters": parameters, "settings": asdict(settings)}
        reading.by(reader)
        try:
            head, parts = reader.ask(json.dumps(question).encode())
        except EOFError:
            raise _unreadable(reader.bury(), settings) from None
        except BaseException:
            reader.kill()
            reader.bury()
            raise
        with self._lock:
            self._idle.append(reader)
        return upload_from_parts(head, parts)


@functools.cache
def file_readers() -> FileReaders:
    """Those of this process: they keep nothing of a file, so that all engines share them."""
    readers = FileReaders()
    atexit.register(readers.close)
    return readers


def _unreadable(status: int, settings: Settings) -> UnreadableFileError:
    if status == 128 + signal.SIGALRM:
        why = f"could not be read within {settings.file_timeout} seconds"
    else:
        why = f"ended the process that read it (status {status})"
    return UnreadableFileError(
        f"The file {why}. It is likely damaged: check that h5py opens it, or write it anew with adata.write_h5ad().",
        field="file",
    )


def _exactly(source: IO[bytes], length: int) -> bytes:
    found = source.read(length)
    if len(found) < length:
        raise EOFError
    return found
