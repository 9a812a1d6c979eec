from __future__ import annotations

import os
from pathlib import Path

import pytest

from perturbscope.tasks import resume
from perturbscope.tasks.resume import fingerprint


@pytest.mark.parametrize("size", [100, 3 * 2**20], ids=["small", "of several samples"])
def test_a_fingerprint_changes_with_the_content_alone(tmp_path: Path, size: int) -> None:
    """Size and time of change can stay as they were: rsync and cp -p keep the time."""
    path = tmp_path / "cells.h5ad"
    path.write_bytes(bytes(size))
    facts = path.stat()
    before = fingerprint(path)
    assert fingerprint(path) == before
    path.write_bytes(bytes(size - 1) + b"1")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert fingerprint(path) != before


def test_a_fingerprint_of_a_folder_covers_names_and_times(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    before = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = fingerprint(tmp_path)
    assert renamed != before
    os.utime(tmp_path / "b", ns=(1, 1))
    assert fingerprint(tmp_path) != renamed


def test_room_for_mapped_vectors_is_taken_at_once(tmp_path: Path) -> None:
    """A file of holes would let a full disk kill the process, at the first vector that finds no room."""
    path = tmp_path / "values.f32"
    values = resume._mapped(path, 1000, 256)
    assert values.shape == (1000, 256)
    assert path.stat().st_blocks * 512 >= values.nbytes
