"""Processes that read uploaded files.

A damaged HDF5 file can send libhdf5 into an endless loop, or crash it, before any check of ours can notice; and the
loop holds Python's global lock, so that a thread would freeze the whole server. So each file is read in a process with
bounded time and memory. If it ends, however that comes, one caller gets an error.

A reader (:mod:`serving.uploads.child`) waits with everything imported, and forks for each file. The request that it
read comes back in the codecs of the protocol, which check it as they check callers: nothing is unpickled.
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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO

from perturbscope import container
from perturbscope.errors import LimitExceededError, UnreadableFileError
from perturbscope.operations import OPERATIONS
from perturbscope.threads import usable_cores
from serving.settings import ROOT, Settings
from serving.uploads.pipe import LENGTH, upload_from_parts
from serving.uploads.requests import Upload

GIB = 2**30
_PATIENCE = 60
"""Seconds within which the event loop says whether there is room."""
MAX_READERS = max(1, min(4, max(2, usable_cores()), container.memory() // (2 * GIB)))
"""Files that are read at a time: fewer where there is little memory. A process (of 150 MiB) is started when it is
needed, and then waits for more files."""
_RESTING = 192 * 2**20
"""Bytes of a reader that waits."""
_SERVER = 768 * 2**20
"""Bytes of the server beside what requests hold: the default model, its batches, Python and its libraries."""
_LEAST = 384 * 2**20
_BYTES_A_VALUE = 32
"""Bytes of memory that a stored count can take while it is read."""


def bytes_of_a_reader(settings: Settings, memory: int | None = None) -> int:
    """Return the bytes of memory that one reader may take for a file, beside what it takes when it rests.

    All readers together have what ``max_reader_bytes`` says, or, where it says nothing, what the container has beside
    the server, the memory that requests may hold, and an eighth that is left free; at most what ``max_values`` need.

    Parameters
    ----------
    settings
        Settings of the server.
    memory
        Bytes of the container; default: those of this one.
    """
    memory = container.memory() if memory is None else memory
    server = max(_SERVER, settings.max_model_bytes) + settings.max_held_bytes
    together = settings.max_reader_bytes or memory - memory // 8 - server
    return max(_LEAST, min(GIB + _BYTES_A_VALUE * settings.max_values, together // MAX_READERS - _RESTING))


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
            # Arrow's other allocators map a gigabyte before they give any of it, and a reader may map little.
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serving.uploads.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def ask(self, question: bytes, hold: Callable[[int], None]) -> tuple[dict[str, object], list[bytes]]:
        """Send one line, and return the head and parts of the answer. Raises EOFError if the process ended instead.

        `hold` is called with the bytes of the parts, before they are read; it may raise.
        """
        source, target = self._process.stdout, self._process.stdin
        assert source is not None and target is not None  # noqa: S101, PT018  both are pipes
        try:
            target.write(question + b"\n")
            target.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        head = json.loads(_exactly(source, LENGTH.unpack(_exactly(source, LENGTH.size))[0]))
        hold(sum(map(int, head["parts"])))
        return head, [_exactly(source, int(length)) for length in head["parts"]]

    def kill(self) -> None:
        """Kill the process and its forks; may be called from any thread, and twice."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Kill the process, wait for its end, and return its exit status, of which 128 and more are signals."""
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
    """The reading of one file; `cancel` may be called at any time, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader: _Reader | None = None
        self.cancelled = False

    def begin(self, reader: _Reader) -> None:
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
    """Reads files in processes, a few at a time.

    Parameters
    ----------
    max_readers
        Number of files that are read at a time; further ones wait.
    """

    def __init__(self, max_readers: int = MAX_READERS) -> None:
        self._threads = ThreadPoolExecutor(max_readers, thread_name_prefix="perturbscope-reader")
        self._lock = threading.Lock()
        self._idle: list[_Reader] = []

    async def read(
        self,
        route: str,
        path: Path,
        parameters: Mapping[str, str],
        settings: Settings,
        hold: Callable[[int], None] = lambda n_bytes: None,
        *,
        name: str = "",
    ) -> Upload:
        """Return the request that an uploaded file and its parameters make; cancelling ends the reading at once.

        Parameters
        ----------
        route, path, parameters, settings
            See :func:`serving.uploads.requests.read_upload`.
        hold
            Called on the event loop with the bytes that the request will take, before this process takes them; it may
            raise.
        name
            Name of the file, by which messages call it.

        Raises
        ------
        UnreadableFileError
            The file took too long to read, or its reader did not survive it.
        LimitExceededError
            The reader was ended for want of memory.
        PerturbScopeError
            See `hold`, and :func:`serving.uploads.requests.read_upload`.
        """
        reading = _Reading()
        loop = asyncio.get_running_loop()

        async def held(n_bytes: int) -> None:
            hold(n_bytes)

        def ask(n_bytes: int) -> None:
            asyncio.run_coroutine_threadsafe(held(n_bytes), loop).result(_PATIENCE)

        try:
            return await loop.run_in_executor(
                self._threads, self._read, reading, route, path, dict(parameters), settings, ask, name
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
            reader.end()

    def _read(
        self,
        reading: _Reading,
        route: str,
        path: Path,
        parameters: Mapping[str, str],
        settings: Settings,
        hold: Callable[[int], None],
        name: str,
    ) -> Upload:
        if reading.cancelled:
            raise UnreadableFileError("The caller went away.", field="file")
        with self._lock:
            reader = self._idle.pop() if self._idle else None
        reader = reader or _Reader()
        operation = OPERATIONS.get(route)
        question = {
            "route": route,
            "module": operation.request.__module__ if operation else None,
            "path": str(path),
            "name": name,
            "parameters": parameters,
            "settings": asdict(settings),
            "bytes": bytes_of_a_reader(settings),
        }
        reading.begin(reader)
        try:
            head, parts = reader.ask(json.dumps(question).encode(), hold)
        except EOFError:
            raise _unreadable(reader.end(), settings, name) from None
        except BaseException:
            reader.kill()
            reader.end()
            raise
        with self._lock:
            self._idle.append(reader)
        return upload_from_parts(head, parts)


@functools.cache
def file_readers() -> FileReaders:
    """Return the readers of this process, which all engines share: they keep nothing of a file."""
    readers = FileReaders()
    atexit.register(readers.close)
    return readers


def _unreadable(status: int, settings: Settings, name: str) -> UnreadableFileError | LimitExceededError:
    if status in (128 + signal.SIGKILL, -signal.SIGKILL):
        return LimitExceededError(
            "The process that read the file was ended: it needed more memory than this server has left. Send the cells "
            "in several requests, or as Arrow; or try again later.",
            field="file",
        )
    if status == 128 + signal.SIGALRM:
        why = f"could not be read within {settings.file_timeout} seconds"
    else:
        why = f"ended the process that read it (status {status})"
    return UnreadableFileError(
        f"{name or 'The file'} {why}. It is likely damaged: check that h5py opens it, or write it anew "
        "with adata.write_h5ad().",
        field="file",
    )


def _exactly(source: IO[bytes], length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        raise EOFError
    return data
