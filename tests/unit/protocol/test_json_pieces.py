"""Large answers are encoded in pieces: the same text as in one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from perturbscope import protocol
from perturbscope.cells.genes import GeneCoverage
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol import checks


@pytest.mark.parametrize("shape", [(0, 4), (1, 3), (64, 256), (65, 256), (3, 40_000)])
def test_an_answer_in_pieces_is_the_text_of_the_whole(shape: tuple[int, int]) -> None:
    n_cells = shape[0]
    answer = Embeddings(
        np.random.default_rng(0).standard_normal(shape).astype(np.float32),
        np.ones(n_cells, dtype=np.int32),
        np.ones(n_cells, dtype=np.int32),
        np.ones(n_cells, dtype=np.float32),
        GeneCoverage(n_genes=1, n_matched=1),
        "model",
        "hash",
    )
    text = protocol.answer_to_json(answer)
    found = json.loads(text)
    assert found["embeddings"] == checks.short_floats(answer.values)
    assert list(found) == ["embeddings", "lengths", "n_detected", "known_share", "below_min_genes", "meta"]
    assert json.dumps(found, separators=(",", ":")).encode() == text
