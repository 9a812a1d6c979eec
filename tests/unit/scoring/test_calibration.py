from __future__ import annotations

import json

import anndata
import numpy as np
import pytest

from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.calibration import calibrate
from perturbscope.scoring.results import ScoreOptions

BOTH = ScoreOptions(metrics=("e_distance", "cosine_e_distance"))


@pytest.fixture
def controls(rng):
    labels = np.repeat(["control", "a"], [240, 40])
    return rng.normal(size=(280, 4)) + 1, labels, np.tile([f"well{i}" for i in range(20)], 14)


def test_controls_against_controls_are_uniform_with_standard_z(controls):
    vectors, labels, batches = controls
    found = calibrate(vectors, labels, control="control", batches=batches, options=BOTH)
    assert [(item.kind, item.metric) for item in found.sets] == [
        (kind, metric) for metric in BOTH.metrics for kind in ("cell", "batch")
    ]
    for item in found.sets:
        assert len(item.p) == 200
        assert item.uniform.p > 0.001
        assert abs(item.z_mean) < 0.4
        assert 0.75 < item.z_sd < 1.25
    # The splits by batch of 240 cells overlap, so that the share of small p scatters; uniformity was looked at above.
    assert not any("not uniform" in text for text in found.warnings)
    assert found.sets[0].n_cells == 40  # as many as the perturbation has
    json.dumps(found.to_dict())


def test_same_seed_same_splits(controls):
    one, two = (calibrate(*controls[:2], control="control", splits=5) for _ in range(2))
    assert one.sets == two.sets
    other = calibrate(*controls[:2], control="control", splits=5, options=ScoreOptions(seed=1))
    assert other.sets[0].z != one.sets[0].z


def test_batches_that_differ_are_announced(controls):
    vectors, labels, batches = controls
    shifts = dict(zip(np.unique(batches), np.random.default_rng(1).normal(size=(20, 4)), strict=True))
    vectors = vectors + np.array([shifts[name] for name in batches])
    found = calibrate(vectors, labels, control="control", batches=batches, splits=100)
    by_cell, by_batch = found.sets
    assert by_cell.uniform.p > 0.01
    assert np.mean(np.asarray(by_batch.p) < 0.05) > 0.3
    assert by_batch.z_sd > 1.5
    assert any("different batches differ" in text for text in found.warnings)


def test_few_batches_give_few_splits(controls):
    vectors, labels, _ = controls
    batches = np.tile(["x", "y", "z", "w"], 70)
    found = calibrate(vectors, labels, control="control", batches=batches, splits=50)
    assert len(found.sets[1].p) == 4
    one = calibrate(vectors, labels, control="control", batches=np.full(280, "x"), splits=5)
    assert [item.kind for item in one.sets] == ["cell"]


def test_real_controls_of_a_screen(data_dir):
    data = anndata.read_h5ad(data_dir / "papalexi2021_eccite_thp1_panel.h5ad")
    values = np.log1p(data.X.toarray() / data.obs["total_umi_full_transcriptome"].to_numpy(float)[:, None] * 1e4)
    labels = data.obs["perturbation"].to_numpy(str)
    found = calibrate(
        values, labels, control="control", options=ScoreOptions(permutations=99), splits=120, group_size=60
    )
    assert found.provenance["n_controls_used"] == 1000
    assert found.sets[0].uniform.p > 0.01
    assert abs(found.sets[0].z_mean) < 0.3
    assert 0.75 < found.sets[0].z_sd < 1.3


@pytest.mark.parametrize(
    "arguments",
    [{"options": ScoreOptions(metrics=("wasserstein",))}, {"splits": 1}, {"group_size": 1}, {"group_size": 237}],
    ids=["wasserstein", "splits", "too-small", "too-large"],
)
def test_bad_parameters(controls, arguments):
    with pytest.raises(InvalidParameterError):
        calibrate(*controls[:2], control="control", **arguments)


def test_only_a_sample_of_the_controls_is_a_warning(rng):
    labels = np.repeat(["control", "a", "A"], [60, 300, 30])
    options = ScoreOptions(max_cells=200, permutations=19)
    vectors = rng.normal(size=(390, 4)) + 1
    # Neither that perturbations are larger than what is sampled, nor how they are called, touches the controls.
    assert calibrate(vectors, labels, control="control", splits=3, options=options).warnings == []
    found = calibrate(vectors, labels, control="a", splits=3, options=options)
    assert [text.partition(":")[0] for text in found.warnings] == [
        "Labels that differ only in case or white space are taken as different perturbations",
        "Calibration used 200 of the 300 controls, a sample (seed 0).",
    ]
