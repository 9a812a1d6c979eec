"""Files and directories are complete or absent, and look like ordinary ones."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from perturbscope.cells.files import atomic, atomic_directory, write_json


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.csv"
    path.write_text("old")

    def write_half() -> None:
        with atomic(path) as staging:
            staging.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [item.name for item in tmp_path.iterdir()] == ["result.csv"]
    assert path.read_text() == "old"


def test_a_directory_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bundle"
    for text in ("first", "second"):
        with atomic_directory(path) as staging:
            (staging / text).write_text(text)
    assert [item.name for item in path.iterdir()] == ["second"]
    assert [item.name for item in path.parent.iterdir()] == ["bundle"]


def test_an_error_leaves_the_older_directory_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic_directory(path):
        raise KeyboardInterrupt
    assert [item.name for item in tmp_path.rglob("*")] == ["bundle", "old"]


def test_a_directory_that_cannot_be_renamed_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "old").touch()

    def refuse(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"), atomic_directory(path):
        patch.setattr(Path, "rename", refuse)
    assert [item.name for item in tmp_path.rglob("*")] == ["bundle", "old"]


def test_permissions_are_those_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    write_json(tmp_path / "values.json", {"b": 1, "a": 2}, sort_keys=True)
    with atomic_directory(tmp_path / "made"):
        pass
    modes = {item.name: stat.S_IMODE(item.stat().st_mode) for item in tmp_path.iterdir()}
    assert modes["values.json"] == modes["plain"]
    assert modes["made"] == modes["folder"]
    assert list(json.loads((tmp_path / "values.json").read_text())) == ["a", "b"]
