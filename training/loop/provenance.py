"""Facts for the provenance of a checkpoint: code, hardware and data."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training.data.shards import Corpus

_PACKAGES = ("torch", "transformers", "deepspeed", "numpy")


def code() -> dict[str, Any]:
    """Return the git revision (None outside a checkout), whether the tree differs from it, and package versions."""
    revision = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"git_revision": revision, "modified": bool(status) if revision else None, "packages": _versions()}


def hardware(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return the number of processes, the device and the processor."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "processes": world_size,
        "device": device.type,
        "gpu": gpu,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def data(corpus: Corpus) -> dict[str, Any]:
    """Return the manifest of a corpus, without its bulk."""
    manifest = corpus.manifest
    wanted = ("family", "family_config", "vocabulary_hash", "vocabulary_source", "cells", "tokens", "length_quantiles")
    sources = [
        {name: source[name] for name in ("name", "path", "sha256", "cells", "kept", "dropped", "tokens")}
        for source in manifest["sources"]
    ]
    return {**{name: manifest[name] for name in wanted}, "sources": sources, "fingerprint": manifest["fingerprint"]}


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    done = subprocess.run(  # noqa: S603, fixed arguments
        [program, "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
