"""A release starts from a base image by digest and from a commit; the digest is asked for and written down."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DIGEST = "sha256:" + "5e" * 32


@pytest.fixture
def checkout(tmp_path):
    """A checkout of the scripts alone, all in one commit, with no engine on its path."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Dockerfile", folder)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *words: str) -> None:
    settings = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")


def run(folder: Path, *command: str, **environ: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("BASE_IMAGE", "BUNDLE", "RELEASE")}
    return subprocess.run(command, cwd=folder, env={**kept, **environ}, capture_output=True, text=True, timeout=60)


def stand_in(folder: Path, name: str, script: str) -> str:
    """Put a program before all others on the path, which is returned."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return f"{folder}:{os.environ['PATH']}"


def test_a_release_refuses_a_tag(checkout):
    result = run(checkout, "scripts/image.sh", "--release", "cpu", BASE_IMAGE="python:3.11-slim-bookworm")
    assert result.returncode == 1
    assert "a release needs a base image by digest, and python:3.11-slim-bookworm is a tag" in result.stderr
    assert "scripts/pin_base.sh" in result.stderr


def test_a_release_refuses_changes_that_are_in_no_commit(checkout):
    (checkout / "scripts" / "new.py").touch()
    result = run(checkout, "scripts/image.sh", "--release", BASE_IMAGE=f"python@{DIGEST}")
    assert result.returncode == 1
    assert "changes that are in none" in result.stderr


def test_a_release_by_digest_gets_to_the_build(checkout):
    """It then misses the bundle, which this checkout has not."""
    result = run(checkout, "scripts/image.sh", "--release", BASE_IMAGE=f"registry.example.com/python:3.11@{DIGEST}")
    assert "bundles/ holds no bundle" in result.stderr


def test_the_digest_is_asked_for_and_written_into_the_dockerfile(checkout, tmp_path):
    path = stand_in(
        tmp_path / "bin", "docker", f'case "$2" in version) ;; imagetools) echo "{DIGEST}";; *) exit 9;; esac'
    )
    before = (checkout / "Dockerfile").read_text()
    for _ in range(2):  # again, on a name that has a digest already
        result = run(checkout, "scripts/pin_base.sh", PATH=path)
        assert result.returncode == 0, result.stderr
    after = (checkout / "Dockerfile").read_text()
    assert after == before.replace("slim-bookworm\n", f"slim-bookworm@{DIGEST}\n", 1)
    commit(checkout)
    assert "bundles/ holds no bundle" in run(checkout, "scripts/image.sh", "--release").stderr


@pytest.mark.parametrize("answer", ["exit 1", "echo sha256:short", "echo"])
def test_no_digest_is_made_up(answer, checkout, tmp_path):
    path = stand_in(tmp_path / "bin", "docker", f'[ "$2" = version ] && exit 0; {answer}')
    before = (checkout / "Dockerfile").read_text()
    result = run(checkout, "scripts/pin_base.sh", PATH=path)
    assert result.returncode == 1
    assert "the Dockerfile is as it was" in result.stderr
    assert (checkout / "Dockerfile").read_text() == before
