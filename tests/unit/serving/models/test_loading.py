"""The estimate of a model's memory, as the settings of the server make it."""

from __future__ import annotations

from perturbscope.inference.memory import CPU_BATCH_TOKENS, estimate_bytes
from serving.models import loading
from serving.settings import DEFAULT_BUNDLE, Settings


def test_the_estimate_follows_the_settings() -> None:
    assert Settings().batch_tokens == CPU_BATCH_TOKENS
    assert loading.estimate_bytes(DEFAULT_BUNDLE, Settings()) == estimate_bytes(DEFAULT_BUNDLE)
    large = loading.estimate_bytes(DEFAULT_BUNDLE, Settings(max_batch_tokens=16_384, variant="int8"))
    assert large == estimate_bytes(DEFAULT_BUNDLE, "int8", batch_tokens=16_384)
