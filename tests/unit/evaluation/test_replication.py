"""Replicates, random halves and known relations of one embedding, context by context."""

import numpy as np
import pytest

from evaluation.replication import ReplicationOptions, measure_replication
from evaluation.screens import EvaluationScreen
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidEmbeddingError

OPTIONS = ReplicationOptions(permutations=49, draws=99, power_repeats=0)
NAMES = ["control", *"ABCDEFGH"]
N = 24 * len(NAMES)


def screen(**columns):
    labels = [name for name in NAMES for _ in range(24)]
    cells = CountMatrix.from_matrix(np.ones((len(labels), 2), dtype=int), ["x", "y"])
    guides = [f"{label}_{i % 2}" if i % 24 else "unknown" for i, label in enumerate(labels)]
    return EvaluationScreen("s", cells, labels, "control", guides=guides, **columns)


@pytest.fixture
def values(rng):
    """A and B are alike, and so are C and D, E and F, G and H."""
    directions = np.repeat(rng.normal(size=(4, 10)), 2, axis=0)
    directions[1::2] *= 1.1
    means = np.vstack([np.zeros(10), directions])
    return (np.repeat(means, 24, axis=0) * 3 + rng.normal(size=(N, 10))).astype(np.float32)


def test_an_embedding_with_effects_replicates_and_one_without_does_not(values, rng):
    relations = {"one": ["A", "B"], "other": ["C", "D"], "third": ["E", "F"], "fourth": ["G", "H"]}
    found = measure_replication(values, screen(), relations=relations, options=OPTIONS)
    numbers = found.numbers
    # A perturbation and its like share the first two places.
    assert 0.5 <= numbers["map_guide"] <= 1
    assert numbers["map_guide"] > 1.4 * numbers["map_guide_chance"]
    assert numbers["split_half_correlation"] > 0.8
    assert numbers["consistency_detected"] == 1.0
    assert numbers["relations_nearest"] == 1.0
    noise = measure_replication(rng.normal(size=values.shape).astype(np.float32), screen(), options=OPTIONS).numbers
    assert noise["map_guide"] < numbers["map_guide"]
    assert noise["split_half_correlation"] < 0.5
    assert "relations_recall" not in noise
    # Cells without a guide are no replicate of any.
    assert found.tables["retrieval"].query("replicate == 'guide'")["n_cells"].sum() == 8 * 23
    assert found.tables["retrieval"].query("replicate == 'half'")["n_cells"].sum() == 8 * 24


def test_contexts_are_judged_apart_and_one_with_a_single_perturbation_is_passed_over(values):
    contexts = ["left" if i % 2 else "right" for i in range(N)]
    found = measure_replication(values, screen(contexts=contexts), options=OPTIONS)
    assert set(found.tables["split_half"]["context"]) == {"left", "right"}
    alone = screen()[np.arange(48)]
    assert measure_replication(values[:48], alone, options=OPTIONS).tables == {}


def test_what_a_screen_does_not_allow_is_named_and_bad_vectors_are_an_error(values):
    few = screen()[np.concatenate([np.arange(24), np.arange(24, 33), np.arange(48, 57)])]
    found = measure_replication(values[:42], few, options=OPTIONS)
    assert any(text.startswith("consistency:") for text in found.warnings)
    broken = values.copy()
    broken[3, 2] = np.nan
    with pytest.raises(InvalidEmbeddingError):
        measure_replication(broken, screen(), options=OPTIONS)
