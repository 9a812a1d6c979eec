"""``python -m serving.uploads.child``: reads the files that its parent names, each in a fork of its own.

It has a limit of memory, which its parent gives, and most of which it gets once the file is checked. When memory runs
out in the container all the same, the kernel ends a reader first, and not the server: its ``oom_score_adj`` says so.
It reads lines of JSON and writes frames (:mod:`serving.uploads.pipe`). If a fork is ended by a signal (the alarm, a
crash, the kernel for want of memory), this process ends too, with 128 + the signal, and the parent starts another.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path

import pyarrow as pa

from perturbscope.errors import LimitExceededError, PerturbScopeError
from perturbscope.operations import OPERATIONS
from serving.settings import Settings
from serving.uploads.pipe import error_to_frame, frame, upload_to_frame
from serving.uploads.requests import read_upload

_TO_CHECK = 384 * 2**20
"""Bytes of memory that checking a file may take, and reading any that is small."""
_BYTES_A_BYTE = 12
"""Bytes of memory that reading a file may take for each byte of its parts, unpacked. Counts as CSR take 8 bytes; their
arrays as they are stored, as int32, joined and encoded are at most five times that at once, and a dense matrix less."""
LIKELY = 1000
"""The largest ``oom_score_adj``: the first to be ended."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """Read files until the parent closes the pipe. Returns 0, or the status that the last fork ended with."""
    # A process may always make itself more likely to be ended; where there is no such file, there is no such choice.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(f"{LIKELY}")
    # Whoever stops the server signals its children too; a file that was accepted is read all the same.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        child = os.fork()
        if not child:
            _read(line)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            return 128 - status if status < 0 else status
    return 0


def _read(line: bytes) -> None:
    """Read one file, and end the process."""
    question = json.loads(line)
    settings = Settings(**question["settings"])
    # The default action of SIGALRM ends the process, wherever it is: no handler of Python would run inside of libhdf5.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(settings.file_timeout)
    # A matrix that is stored by columns is turned in temporary files, of at most 8 bytes a count.
    most = int(question["bytes"])
    _bound(min(most, _TO_CHECK), most, largest_file=8 * settings.max_values)
    try:
        if question["route"] not in (*OPERATIONS, "report", "columns"):
            # The table of the server has one that was added after its start.
            OPERATIONS.add(import_module(question["module"]).OPERATION)
        upload = read_upload(
            question["route"], Path(question["path"]), question["parameters"], settings, _grow, name=question["name"]
        )
        parts = upload_to_frame(upload)
    except PerturbScopeError as error:
        parts = error_to_frame(error)
    except (MemoryError, pa.ArrowMemoryError):
        parts = error_to_frame(
            LimitExceededError(
                "The file needs more memory to be read than this server allows. Send the cells in several requests.",
                field="data",
            )
        )
    except Exception:  # noqa: BLE001  the parent logs it as what it is: a bug of ours
        parts = frame({"bug": traceback.format_exc()})
    signal.alarm(0)
    for part in parts:
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()
    os._exit(0)


def _grow(n_bytes: int) -> None:
    """Allow the memory that reading parts of `n_bytes` takes, within the limit that the parent gave."""
    now, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (min(now + _BYTES_A_BYTE * n_bytes, most), most))


def _bound(now: int, most: int, *, largest_file: int) -> None:
    """Limit the memory to `now`, later `most` bytes beyond what is mapped, and the size of files; no core dumps."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + now, mapped + most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(main())
