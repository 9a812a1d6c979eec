"""Planted effects are what they say, nothing else changes, and a null group is null."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import kstest

from benchmarks._planted_screens import ControlPCA, Effect, measured, plant, planted_screen, scatter
from evaluation.baselines import pca
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import EmptyCellError, InvalidParameterError, TooFewCellsError, TooFewControlsError
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.results import ScoreOptions

BLOCKS = (20, 50, 100)
MODULE = np.array([3, 7, 11, 20])
NULL = Effect("null")


@pytest.fixture(scope="module")
def controls():
    """400 cells x 60 genes, each with a depth of its own; the panel's totals are half of the cells'."""
    rng = np.random.default_rng(1)
    rates = rng.gamma(0.8, 4.0, size=60) * rng.uniform(0.5, 2.0, size=(400, 1)) * rng.gamma(4.0, 0.25, size=(400, 60))
    counts = rng.poisson(rates)
    counts[:, 0] += 1
    return CountMatrix.from_matrix(counts, [f"g{i}" for i in range(60)], totals=2 * counts.sum(axis=1))


@pytest.fixture
def cells(controls):
    return controls[np.arange(100)]


def planted(cells, effect, seed=0, module=MODULE):
    return plant(cells, effect, module=module, blocks=BLOCKS, rng=np.random.default_rng(seed))


@pytest.mark.parametrize(
    "effect",
    [
        Effect("shift", genes=4, strength=0.5),
        Effect("spread", genes=4, strength=0.7),
        Effect("rare", genes=4, strength=1.0, share=0.2),
    ],
    ids=lambda effect: effect.kind,
)
def test_counts_stay_whole_totals_follow_and_other_genes_are_untouched(cells, effect):
    given = cells.counts.toarray()
    result = planted(cells, effect)
    after = result.counts.toarray()
    assert result.counts.dtype == np.int32
    assert result.counts.data.min() > 0  # no zero is stored
    assert result.counts.has_sorted_indices
    others = np.setdiff1d(np.arange(60), MODULE)
    np.testing.assert_array_equal(after[:, others], given[:, others])
    assert (after != given).any()
    np.testing.assert_array_equal(result.totals - cells.totals, (after - given).sum(axis=1))
    np.testing.assert_array_equal(cells.counts.toarray(), given)  # the input is as it was
    CountMatrix.from_matrix(result.counts, result.gene_ids, totals=result.totals)


def test_shift_thins_every_gene_by_its_strength(cells):
    before, after = cells.counts.toarray()[:, MODULE], planted(cells, Effect("shift", 4, 0.3)).counts.toarray()
    assert (after[:, MODULE] <= before).all()
    kept, total = after[:, MODULE].sum(axis=0), before.sum(axis=0)
    assert (np.abs(kept - 0.7 * total) < 4 * np.sqrt(total * 0.7 * 0.3)).all()
    assert planted(cells, Effect("shift", 4, 1.0)).counts.toarray()[:, MODULE].sum() == 0
    np.testing.assert_array_equal(planted(cells, Effect("shift", 4, 0.0)).counts.toarray(), cells.counts.toarray())


def test_spread_keeps_every_mean_to_the_molecule_in_every_prefix_and_widens_the_cells(cells):
    before = cells.counts.toarray()[:, MODULE]
    after = planted(cells, Effect("spread", 4, 0.8)).counts.toarray()[:, MODULE]
    for size in BLOCKS:
        np.testing.assert_array_equal(after[:size].sum(axis=0), before[:size].sum(axis=0))
    assert (after.std(axis=0) > 1.3 * before.std(axis=0)).all()
    change = (after - before).sum(axis=1)
    assert (change < 0).sum() == pytest.approx(50, abs=5)
    assert (change > 0).sum() == pytest.approx(50, abs=5)


def test_spread_deals_molecules_though_no_taker_has_the_gene():
    counts = np.ones((20, 2), dtype=int)
    counts[:, 1] = 0
    counts[3, 1] = 40
    cells = CountMatrix.from_matrix(counts, ["a", "b"])
    after = plant(
        cells, Effect("spread", 1, 1.0), module=np.array([1]), blocks=[20], rng=np.random.default_rng(4)
    ).counts.toarray()
    assert after[:, 1].sum() == 40


def test_rare_changes_the_stated_share_of_every_block(cells):
    before = cells.counts.toarray()
    module = np.flatnonzero(before.all(axis=0))[:1]
    assert len(module)
    after = planted(cells, Effect("rare", 1, 1.0, share=0.1), module=module).counts.toarray()
    changed = (after != before).any(axis=1)
    for start, stop in pairwise([0, *BLOCKS]):
        assert changed[start:stop].sum() == round(0.1 * (stop - start))
    assert (after[changed, module] == 0).all()


def test_a_screen_holds_unchanged_reference_and_nulls_and_no_cell_twice_in_a_group(controls):
    effects = [NULL, NULL, Effect("shift", 5, 0.5), Effect("scatter", strength=0.5)]
    screen = planted_screen(controls, effects, blocks=BLOCKS, reference=150, seed=3)
    labels = np.asarray(screen.perturbations)
    assert len(screen.cells) == 150 + 4 * 100
    assert sorted(effect.name for effect in screen.effects.values()) == sorted(effect.name for effect in effects)
    reference = set(screen.source[labels == "control"])
    assert len(reference) == 150
    given = controls[screen.source]
    for name, effect in screen.effects.items():
        source = screen.source[labels == name]
        assert len(set(source)) == 100
        assert not reference & set(source)
        same = (screen.cells.counts[labels == name] != given.counts[labels == name]).nnz == 0
        assert same == (effect.kind != "shift")
    np.testing.assert_array_equal(screen.cells.totals[:150], given.totals[:150])


def test_the_seed_decides(controls):
    effects = [NULL, Effect("spread", 5, 0.5)]
    one, same, other = (
        planted_screen(controls, effects, blocks=BLOCKS, reference=150, seed=seed) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(one.cells.counts.toarray(), same.cells.counts.toarray())
    assert one.effects == same.effects
    assert (one.source != other.source).any()


def test_first_takes_the_reference_and_the_head_of_every_group(controls):
    screen = planted_screen(controls, [NULL, NULL], blocks=BLOCKS, reference=150)
    positions = screen.first(20)
    assert np.asarray(screen.perturbations)[positions].tolist() == ["control"] * 150 + ["G00"] * 20 + ["G01"] * 20
    assert positions[150] == 150
    assert positions[170] == 250


def test_scatter_scales_distances_from_the_centre_in_its_groups_alone(controls):
    screen = planted_screen(
        controls, [NULL, Effect("scatter", strength=0.25)], blocks=BLOCKS, reference=150, detected=0.5
    )
    values = np.random.default_rng(0).normal(size=(350, 3)).astype(np.float32)
    centre = np.array([1.0, 0.0, -1.0])
    given = values.copy()
    moved = scatter(values, screen, centre)
    np.testing.assert_array_equal(values, given)
    kinds = np.array(["-" if name == "control" else screen.effects[name].kind for name in screen.perturbations])
    np.testing.assert_array_equal(moved[kinds != "scatter"], values[kinds != "scatter"])
    ratio = np.linalg.norm(moved - centre, axis=1) / np.linalg.norm(values - centre, axis=1)
    np.testing.assert_allclose(ratio[kinds == "scatter"], 1.25, rtol=1e-4)


def test_what_was_planted_is_measured(controls):
    effects = [NULL, Effect("shift", 10, 0.5), Effect("spread", 10, 0.9)]
    screen = planted_screen(controls, effects, blocks=BLOCKS, reference=150)
    table = measured(screen, controls).set_index("effect")
    assert sorted(table.index) == ["shift, 10 genes, 50 %", "spread, 10 genes, 90 %"]
    assert table.loc["shift, 10 genes, 50 %", "mean_count"] == pytest.approx(-0.5, abs=0.05)
    assert table.loc["spread, 10 genes, 90 %", "mean_count"] == 0
    assert table.loc["spread, 10 genes, 90 %", "mean_log"] < -0.1  # the logarithm is concave
    assert table.loc["spread, 10 genes, 90 %", "sd_of_sum"] > 0.5


def test_components_of_controls_are_those_of_pca(controls):
    np.testing.assert_allclose(ControlPCA(controls, n_components=5)(controls), pca(controls, n_components=5), atol=1e-3)


def test_null_groups_are_null_and_strong_effects_are_found(controls):
    project = ControlPCA(controls, n_components=10)
    options = ScoreOptions(permutations=199, repeats=1)
    null, strong = [], []
    for seed in range(12):
        screen = planted_screen(
            controls, [*[NULL] * 4, Effect("shift", 20, 0.7)], blocks=(25,), reference=150, seed=seed
        )
        table = score_perturbations(
            project(screen.cells), screen.perturbations, control="control", options=options
        ).table.set_index("perturbation")
        for name, effect in screen.effects.items():
            (null if effect == NULL else strong).append(table.loc[name, "p"])
    assert max(strong) <= 5 / 200
    assert kstest(null, "uniform").pvalue > 0.01


def test_only_the_euclidean_distance_of_unscaled_vectors_sees_scatter(controls):
    screen = planted_screen(controls, [Effect("scatter", strength=0.5)], blocks=(100,), reference=200)
    project = ControlPCA(controls, n_components=10)
    values = scatter(project(screen.cells), screen, project(controls).mean(axis=0))

    def p(**options):
        options = ScoreOptions(permutations=199, repeats=1, **options)
        return score_perturbations(values, screen.perturbations, control="control", options=options).table["p"].item()

    assert p(normalize=False) == 1 / 200
    assert p(normalize=False, ground="sqeuclidean") > 0.05  # sees a shift of the mean alone
    assert p() > 0.05  # unit length takes away what was planted


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "shift", "genes": 1, "strength": 1.5},
        {"kind": "shift", "strength": 0.5},
        {"kind": "rare", "genes": 1, "share": 0},
    ],
)
def test_impossible_effects_are_refused(wrong):
    with pytest.raises(InvalidParameterError, match="cannot be planted"):
        Effect(**wrong)


def test_impossible_screens_are_refused(controls, cells):
    with pytest.raises(InvalidParameterError, match="must rise"):
        planted_screen(controls, [NULL], blocks=(50, 20))
    with pytest.raises(TooFewControlsError, match="need 601"):
        planted_screen(controls, [NULL], blocks=(101,), reference=500)
    with pytest.raises(InvalidParameterError, match="needs 61"):
        planted_screen(controls, [Effect("shift", 61, 0.5)], blocks=BLOCKS, reference=150)
    with pytest.raises(TooFewCellsError, match="blocks end at 100"):
        plant(cells[:50], Effect("shift", 4, 0.5), module=MODULE, blocks=BLOCKS, rng=np.random.default_rng(0))
    with pytest.raises(EmptyCellError, match="every molecule of 100 cells"):
        planted(cells, Effect("shift", 60, 1.0), module=np.arange(60))


def test_names_say_what_is_planted():
    effect = Effect("rare", genes=50, strength=0.9, share=0.05)
    assert effect.name == "rare, 50 genes, 90 %, 5 % of cells"
    assert replace(effect, kind="shift", share=1.0).name == "shift, 50 genes, 90 %"
    assert (NULL.name, Effect("scatter", strength=0.1).name) == ("null", "scatter, 10 %")
