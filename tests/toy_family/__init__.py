"""A second model family, for tests alone: what it needs is what any family needs.

A cell is its genes in the order of the vocabulary, with the magnitude of their counts, and its depth. The model gives
a vector and class logits for each cell, and a value for each gene. The torch-free half is in
:mod:`tests.toy_family.tokens`, the torch half in :mod:`tests.toy_family.model`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import perturbscope.families

NAME = "toy"


@contextmanager
def registered() -> Iterator[None]:
    """Make both halves known under :data:`NAME`; the torch half only where torch is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(perturbscope.families.FAMILIES, NAME, "tests.toy_family.tokens")
        try:
            import training.families
        except ImportError:
            pass
        else:
            patch.setitem(training.families.FAMILIES, NAME, "tests.toy_family.model")
        yield
