"""The estimate of a model's memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from perturbscope.errors import CorruptBundleError
from perturbscope.inference.bundle import MANIFEST
from perturbscope.inference.memory import estimate_bytes

DEFAULT = Path(__file__).resolve().parents[3] / "bundles" / "default"


def changed(bundle: Path, path: Path, **fields: Any) -> Path:
    """A copy of a bundle whose manifest has other fields."""
    shutil.copytree(bundle, path)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | fields))
    return path


def test_the_estimate_of_the_default_bundle_is_near_what_was_measured() -> None:
    """The measured memory is 364 MiB with batches of 16,384 tokens, 304 MiB of it for the batches."""
    estimate = estimate_bytes(DEFAULT, batch_tokens=16_384)
    assert estimate == pytest.approx(364 * 2**20, rel=0.1)
    small = estimate_bytes(DEFAULT, batch_tokens=1024)
    assert estimate - small == pytest.approx(304 * 2**20 * 15 / 16, rel=0.1)
    eight_bit = estimate_bytes(DEFAULT, "int8", batch_tokens=16_384)
    assert estimate - eight_bit == 2 * (14_892_913 - 3_781_718)


def test_a_longer_context_costs_more(tiny_bundle: Path, tmp_path: Path) -> None:
    costs = [
        estimate_bytes(changed(tiny_bundle, tmp_path / f"{number}", family_config=config))
        for number, config in enumerate(({"max_length": 512}, {"max_length": 2048}, {}))
    ]
    assert costs[0] < costs[1] == costs[2]


def test_what_the_manifest_says_of_the_network_counts(tiny_bundle: Path, tmp_path: Path) -> None:
    """Width 8, so one head if the manifest does not say; 2,048 tokens in a cell, 4,096 in a batch."""
    network = {"hidden": 8, "heads": 2, "feed_forward": 32}
    plain = changed(tiny_bundle, tmp_path / "plain", family_config={"max_length": 2048})
    known = changed(plain, tmp_path / "known", training={"model_config": network})
    assert estimate_bytes(known) - estimate_bytes(plain) == 8 * 4096 * 2048
    wider = changed(plain, tmp_path / "wider", training={"model_config": network | {"feed_forward": 64}})
    assert estimate_bytes(wider) - estimate_bytes(known) == 4096 * 4 * 2 * 32
    odd = changed(plain, tmp_path / "odd", training={"model_config": {"heads": "many", "hidden": -1}})
    assert estimate_bytes(odd) == estimate_bytes(plain)


def test_outputs_per_token_and_weights_beside_the_graph_count(tiny_bundle: Path, tmp_path: Path) -> None:
    plain = changed(tiny_bundle, tmp_path / "plain", family_config={"max_length": 2048})
    manifest = json.loads((plain / MANIFEST).read_text())
    logits = {"name": "gene_logits", "per": "token", "width": 3, "meaning": "logits", "names": ["a", "b", "c"]}
    more = changed(plain, tmp_path / "more", outputs=[*manifest["outputs"], logits])
    assert estimate_bytes(more) - estimate_bytes(plain) == 2 * 4096 * 3 * 4
    graph = manifest["variants"]["fp32"] | {"data": ["model.onnx.data"]}
    data = changed(plain, tmp_path / "data", variants={"fp32": graph})
    (data / "model.onnx.data").write_bytes(bytes(1000))
    assert estimate_bytes(data) - estimate_bytes(plain) == 2 * 1000


def test_what_cannot_be_read_has_no_estimate(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptBundleError, match="cannot be read"):
        estimate_bytes(tmp_path)
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (path / "vocabulary.tsv").unlink()
    with pytest.raises(CorruptBundleError, match="Fetch the bundle again"):
        estimate_bytes(path)
    assert estimate_bytes(tiny_bundle, "fp16") == 0
