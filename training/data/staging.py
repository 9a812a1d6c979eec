"""A directory that is built under another name and survives an interruption, so that the work can go on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perturbscope.errors import InvalidInputError, InvalidParameterError

_STATE = "resume.json"


class Staging:
    """The directory ``.<name>.partial`` beside `path`, which becomes `path` when it is complete.

    Parameters
    ----------
    path
        Directory to make.
    fingerprint
        Digest of the configuration and its data; what an earlier run left for another digest is removed.
    """

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        self.path = path.with_name(f".{path.name}.partial")
        self._target = path
        self._fingerprint = fingerprint

    @contextmanager
    def open(self) -> Iterator[dict[str, Any] | None]:
        """Lock the directory, yield what :meth:`save` saved last (None at a fresh start), and rename it at the end.

        After bad input the directory is removed. After any other error (a signal, a lost connection, a full disk) it
        stays if a state was saved in it.

        Raises
        ------
        InvalidParameterError
            Another process is making the same directory.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InvalidParameterError(
                    f"Another process is writing {self.path}. Wait for it, or give another path.", field="corpus.path"
                ) from error
            state = self._load()
            if state is None:
                self._clear()
            try:
                yield state
                (self.path / _STATE).unlink(missing_ok=True)
                if self._target.exists():
                    shutil.rmtree(self._target)
                self.path.rename(self._target)
            except InvalidInputError:
                shutil.rmtree(self.path, ignore_errors=True)
                raise
            except BaseException:
                if not (self.path / _STATE).exists():
                    shutil.rmtree(self.path, ignore_errors=True)
                raise
        finally:
            os.close(lock)

    def save(self, state: dict[str, Any]) -> None:
        """Save the progress of the work; everything that `state` refers to must be in closed files."""
        fresh = self.path / f"{_STATE}.new"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump({"fingerprint": self._fingerprint, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path / _STATE)

    def _load(self) -> dict[str, Any] | None:
        try:
            saved = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(saved, dict) or saved.get("fingerprint") != self._fingerprint:
            return None
        state: dict[str, Any] = saved["state"]
        return state

    def _clear(self) -> None:
        for item in self.path.iterdir():
            if item.is_dir():
                shutil.rmtree(item)
            else:
                item.unlink()
