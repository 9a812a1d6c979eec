"""The page of simulations: what is recorded, and the small pieces that make it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.statistics import __main__ as statistics
from benchmarks.statistics.screens import DESIGNS, cells
from benchmarks.statistics.tails import exchanged
from perturbscope.scoring.distances import e_distance


def test_the_page_is_made_of_the_recorded_numbers_and_names_each_part():
    text = statistics.page()
    assert text == statistics.PAGE.read_text()
    for path in statistics.RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert f"Commit {record['commit']}, scale {record['scale']:g}." in text
        assert f"<!-- {path.stem} -->" not in text


@pytest.mark.parametrize("kind", DESIGNS)
def test_every_kind_of_data_has_cells(rng, kind):
    assert np.isfinite(cells(kind, 30, 6, rng)).all()


def test_exchanges_are_standardised_energy_distances(rng):
    x = rng.normal(size=(30, 3))
    found = exchanged(x, 8, 50, np.random.default_rng(3))
    order = np.argpartition(np.random.default_rng(3).random((50, 30), dtype=np.float32), 8, axis=1)[:, :8]
    values = np.array([e_distance(x[some], np.delete(x, some, axis=0)) for some in order])
    np.testing.assert_allclose(found, (values - values.mean()) / values.std(), atol=1e-4)
