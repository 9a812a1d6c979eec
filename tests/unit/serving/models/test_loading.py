"""The estimate of a model's memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from perturbscope.errors import CorruptBundleError
from perturbscope.inference.bundle import MANIFEST
from serving.models.loading import estimate_bytes
from serving.settings import DEFAULT_BUNDLE, Settings


def test_the_estimate_of_the_default_bundle_is_near_what_was_measured() -> None:
    """The measured memory is 364 MiB with batches of 16,384 tokens, 304 MiB of it for the batches."""
    estimate = estimate_bytes(DEFAULT_BUNDLE, Settings(max_batch_tokens=16_384))
    assert estimate == pytest.approx(364 * 2**20, rel=0.1)
    small = estimate_bytes(DEFAULT_BUNDLE, Settings(max_batch_tokens=1024))
    assert estimate - small == pytest.approx(304 * 2**20 * 15 / 16, rel=0.1)
    eight_bit = estimate_bytes(DEFAULT_BUNDLE, Settings(variant="int8", max_batch_tokens=16_384))
    assert estimate - eight_bit == 2 * (14_892_913 - 3_781_718)


def test_a_longer_context_costs_more(tiny_bundle: Path, tmp_path: Path) -> None:
    costs: list[int] = []
    for config in ({"max_length": 512}, {"max_length": 2048}, {}):
        path = Path(shutil.copytree(tiny_bundle, tmp_path / f"{len(costs)}"))
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps(manifest | {"family_config": config}))
        costs.append(estimate_bytes(path, Settings()))
    assert costs[0] < costs[1] == costs[2]


def test_what_cannot_be_read_has_no_estimate(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptBundleError, match="cannot be read"):
        estimate_bytes(tmp_path, Settings())
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (path / "vocabulary.tsv").unlink()
    with pytest.raises(CorruptBundleError, match="Fetch the bundle again"):
        estimate_bytes(path, Settings())
    assert estimate_bytes(tiny_bundle, Settings(variant="fp16")) == 0
