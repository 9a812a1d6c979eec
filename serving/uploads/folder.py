"""The folder of this server's uploads, and those that killed servers left behind.

A file that a caller uploads lies on disk until it is read, and a server that is killed (SIGKILL, or the kernel for want
of memory) removes nothing. So each server keeps its uploads in a folder of its own, beside a file that it has locked:
the kernel gives the lock back however the server ends, and then the next server that starts here removes the folder.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "perturbscope-uploads-"
_LOCK = "lock"


class UploadFolder:
    """The folder of one server, made when it is first needed.

    Parameters
    ----------
    parent
        Folder of temporary files; default: that of the system, or TMPDIR.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._given = parent
        self._path: Path | None = None
        self._lock = -1

    def path(self) -> Path:
        """Return the folder. Raises OSError if it cannot be made."""
        parent = self._parent
        # Something may clean up old temporary files.
        if self._path is None or self._path.parent != parent or not self._path.is_dir():
            self.remove()
            # Locked under a name that no other server looks for, and renamed: a folder without a lock has no owner.
            made = Path(tempfile.mkdtemp(prefix=".perturbscope-new-", dir=parent))
            try:
                self._lock = _locked(made / _LOCK, os.O_CREAT)
                self._path = made.rename(parent / f"{PREFIX}{made.name.rpartition('-')[2]}")
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)
                raise
        return self._path

    @property
    def _parent(self) -> Path:
        return Path(tempfile.gettempdir()) if self._given is None else self._given

    def remove(self) -> None:
        """Remove the folder, at the end of the server."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._path = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove_left_behind(self) -> list[Path]:
        """Remove the folders of servers of this user that do not live any more, and return them."""
        removed = []
        for path in sorted(self._parent.glob(f"{PREFIX}*")):
            with contextlib.suppress(OSError):  # in use, somebody else's, or just removed by another server
                found = path.lstat()
                if path == self._path or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                    continue
                lock = _locked(path / _LOCK)
                try:
                    shutil.rmtree(path)
                finally:
                    os.close(lock)
                removed.append(path)
        return removed


@functools.cache
def upload_folder() -> UploadFolder:
    """Return the folder of this process."""
    folder = UploadFolder()
    atexit.register(folder.remove)
    return folder


def _locked(path: Path, flags: int = 0) -> int:
    """Open and lock a file, for this process alone. Raises OSError if another process has it, or it is a link."""
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(file)
        raise
    return file
