"""Uploads that a killed server left on disk are removed at the next start, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from serving.uploads import child
from serving.uploads.folder import PREFIX, UploadFolder
from tests.integration.server import ROOT, environment

SERVER = """
import sys, time
from pathlib import Path
from serving.uploads.folder import UploadFolder
folder = UploadFolder(Path(sys.argv[1]))
(folder.path() / "cells.h5ad").write_bytes(b"secret")
print("ready", flush=True)
time.sleep(600)
"""


def test_only_folders_of_dead_servers_are_removed(tmp_path: Path) -> None:
    theirs, killed = (
        subprocess.Popen(
            [sys.executable, "-c", SERVER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, env=environment()
        )
        for _ in range(2)
    )
    try:
        for server in (theirs, killed):
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
        own = UploadFolder(tmp_path)
        (own.path() / "cells.h5ad").touch()
        for name in (f"{PREFIX}unlocked", "perturbscope-other", "somebody-elses"):
            (tmp_path / name).mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "lock").touch()
        (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / f"{PREFIX}linked-lock").mkdir()
        (tmp_path / f"{PREFIX}linked-lock" / "lock").symlink_to(tmp_path / "elsewhere" / "lock")
        (tmp_path / f"{PREFIX}file").touch()
        before = {path.name for path in tmp_path.iterdir()}
        assert own.remove_left_behind() == []
        killed.kill()
        killed.wait()
        (removed,) = UploadFolder(tmp_path).remove_left_behind()
        assert before - {path.name for path in tmp_path.iterdir()} == {removed.name}
        assert len(list(tmp_path.glob(f"{PREFIX}*/cells.h5ad"))) == 2
        own.remove()
        assert len(list(tmp_path.glob(f"{PREFIX}*/cells.h5ad"))) == 1
    finally:
        for server in (theirs, killed):
            server.kill()
            server.communicate()


def test_a_folder_that_something_else_removed_is_made_anew(tmp_path: Path) -> None:
    folder = UploadFolder(tmp_path)
    first = folder.path()
    assert folder.path() == first
    (first / "lock").unlink()
    first.rmdir()
    assert folder.path() != first
    assert folder.path().stat().st_mode & 0o777 == 0o700
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_readers_outlive_the_signal_that_stops_the_server() -> None:
    """The supervisor sends it to the worker's children too, while accepted files are read."""
    code = f"import os, signal, {child.__name__} as c; import sys; sys.stdin = open(os.devnull); c.main();"
    code += "os.kill(os.getpid(), signal.SIGTERM); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, check=False)
    assert done.stdout == b"alive\n", done.stderr
