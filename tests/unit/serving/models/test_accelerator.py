"""Options of a model on an accelerator; none is needed, as only the arguments are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perturbscope.errors import ProviderUnavailableError
from perturbscope.inference.embedder import Embedder
from serving.models.loading import ServedModel
from serving.settings import DEFAULT_BUNDLE, Settings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments that embedders were made with."""
    found: dict[str, Any] = {}

    def from_bundle(bundle: object, **options: Any) -> Embedder:
        found.update(options)
        raise ProviderUnavailableError("no GPU", field="device")

    monkeypatch.setattr(Embedder, "from_bundle", from_bundle)
    return found


def test_batches_have_few_shapes_and_are_large(asked: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings(device="tensorrt", engine_cache=str(tmp_path))
    with pytest.raises(ProviderUnavailableError):
        ServedModel.load(DEFAULT_BUNDLE, settings)
    assert asked["device"] == "tensorrt"
    assert asked["gpu"].engine_cache == tmp_path
    assert asked["limits"].max_tokens == 65_536
    assert asked["limits"].buckets.lengths[-1] == 512  # the longest cell of the bundle's model
    assert asked["limits"].capacity(512) == 32


def test_the_processor_keeps_its_batches(asked: dict[str, Any]) -> None:
    with pytest.raises(ProviderUnavailableError):
        ServedModel.load(DEFAULT_BUNDLE, Settings())
    assert asked["gpu"].engine_cache is None
    assert asked["limits"].max_tokens == 4096
    assert asked["limits"].buckets is None
