"""Agreement with pertpy and scPerturb, from their own numbers stored with the versions that gave them."""

import json
from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from benchmarks._peer_tests import PERTPY, SCPERTURB, holm_sidak, largest_family, peer_e_test
from benchmarks.peers import CONTROL, DEFINITIONS, PERMUTATIONS, STORED, misplaced, vectors
from perturbscope.errors import ControlLabelMissingError
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.distances import e_distance, pairwise_distances
from perturbscope.scoring.optimal_transport import transport_cost, wasserstein
from perturbscope.scoring.results import ScoreOptions


@pytest.fixture(scope="module")
def peers():
    return json.loads(STORED.read_text())


@pytest.fixture(scope="module")
def cells():
    return vectors()


def stored_p(peers, key):
    return pd.DataFrame.from_dict(peers["tests"][key], orient="index")


@pytest.mark.parametrize("key", DEFINITIONS)
def test_distances_equal_the_peers_where_the_definitions_do(key, peers, cells):
    values, labels = cells
    ground, estimator = DEFINITIONS[key]
    controls = values[labels == CONTROL]
    for name, theirs in peers["distances"][key].items():
        mine = e_distance(values[labels == name], controls, estimator=estimator, distance=ground)
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_p_values_equal_the_peers_up_to_their_draws(peers, cells):
    values, labels = cells
    some = ["STAT1", "CUL3", "STAT3", "UBE2L6", "CMTM6", "IRF7"]
    kept = np.isin(labels, [CONTROL, *some])
    for peer, key in ((PERTPY, "pertpy, cells sorted"), (SCPERTURB, "scperturb")):
        table = peer_e_test(values[kept], labels[kept].tolist(), control=CONTROL, peer=peer, permutations=PERMUTATIONS)
        theirs, mine = stored_p(peers, key).loc[some, "pvalue"], table.set_index("perturbation").loc[some, "p"]
        spread = np.sqrt(2 * theirs * (1 - theirs) / PERMUTATIONS)
        assert ((mine - theirs).abs() <= 4 * spread + 2 / PERMUTATIONS).all()
        assert mine["STAT1"] == 1 / PERMUTATIONS


def test_corrected_p_values_equal_the_peers(peers):
    for key, of_control in (("pertpy, cells sorted", 1 / PERMUTATIONS), ("scperturb", 1.0)):
        table = stored_p(peers, key)
        raw = table["pvalue"].copy()
        raw[CONTROL] = of_control
        np.testing.assert_allclose(
            pd.Series(holm_sidak(raw), index=table.index).drop(CONTROL), table["pvalue_adj"].drop(CONTROL), rtol=1e-9
        )


def test_pertpy_gave_p_values_to_the_wrong_rows(peers):
    """The row in place i of the file's order holds the p-value of the label in place i of the alphabet."""
    given, right = stored_p(peers, "pertpy, cells given")["pvalue"], stored_p(peers, "pertpy, cells sorted")["pvalue"]
    whose = misplaced(peers)
    moved = pd.Series(given[whose.index].to_numpy(), index=whose.to_numpy())
    assert (moved.drop(CONTROL) - right[moved.index.drop(CONTROL)]).abs().max() < 0.1
    assert moved[CONTROL] == 1 / PERMUTATIONS  # of a missing value, and given to a perturbation
    assert (given - right).abs().max() > 0.8
    assert given["JAK2"] > 0.5 > 0.001 == right["JAK2"]


def test_wasserstein_of_pertpy_is_of_another_kind(peers, cells):
    values, labels = cells
    controls = values[labels == CONTROL]
    for name, theirs in peers["wasserstein"].items():
        own = values[labels == name]
        squared = transport_cost(pairwise_distances(own, controls, distance="sqeuclidean"))
        assert squared < theirs < 1.2 * squared  # the entropic cost is above the exact one
        assert wasserstein(own, controls) < 0.25 * theirs


def follows_labels(test):
    """Check that each label has its own p-value, for every order of the labels in the file and in the alphabet.

    One group of three differs. `test` takes vectors and labels, and gives a Series of p-values by label.
    """
    rng = np.random.default_rng(7)
    groups = {"strong": rng.normal(1.0, 1.0, (30, 5)), "one": rng.normal(size=(30, 5)), "two": rng.normal(size=(30, 5))}
    groups["base"] = rng.normal(size=(60, 5))
    for names in permutations(("alpha", "beta", "gamma")):
        name = dict(zip(("strong", "one", "two"), names, strict=True), base=CONTROL)
        for order in permutations(groups):
            labels = [name[group] for group in order for _ in groups[group]]
            p = test(np.concatenate([groups[group] for group in order]), labels)
            assert p[name["strong"]] <= 0.02, (names, order)
            assert min(p[name["one"]], p[name["two"]]) > 0.05, (names, order)


def test_our_p_values_follow_their_labels_whatever_the_order():
    options = ScoreOptions(metrics=("e_distance",), permutations=99, repeats=1, normalize=False)

    def ours(values, labels):
        table = score_perturbations(values, labels, control=CONTROL, options=options).table
        return table.set_index("perturbation")["p"]

    def restated(values, labels):
        table = peer_e_test(values, labels, control=CONTROL, peer=PERTPY, permutations=99)
        return table.set_index("perturbation")["p"]

    follows_labels(ours)
    follows_labels(restated)


def test_the_check_sees_p_values_that_are_attached_by_position():
    def attached_by_position(values, labels):
        table = peer_e_test(values, labels, control=CONTROL, peer=PERTPY, permutations=99)
        by_alphabet = table.set_index("perturbation")["p"].reindex(sorted(set(labels)))
        return pd.Series(by_alphabet.to_numpy(), index=list(dict.fromkeys(labels)))

    with pytest.raises(AssertionError):
        follows_labels(attached_by_position)


def test_holm_sidak_steps_down():
    expected = [1 - 0.99**3, 1 - 0.5**2, 1 - 0.999**4, 1.0]
    np.testing.assert_allclose(holm_sidak([0.01, 0.5, 0.001, 1.0]), expected, rtol=1e-12)
    assert holm_sidak([0.04, 0.05]).tolist() == pytest.approx([1 - 0.96**2, 1 - 0.96**2])  # never falls


def test_at_a_thousand_exchanges_no_more_than_51_tests_can_be_passed():
    assert largest_family(1000) == 51
    assert holm_sidak([0.001] * 51).max() < 0.05 < holm_sidak([0.001] * 52).min()


def test_a_peers_test_needs_controls():
    with pytest.raises(ControlLabelMissingError, match="'control'"):
        peer_e_test(np.zeros((2, 2)), ["a", "b"], control=CONTROL, peer=PERTPY)
