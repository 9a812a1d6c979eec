"""Labels as people have them: several labels of controls, texts for missing ones, combinations in many spellings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbscope.analysis import umap
from perturbscope.analysis.degs import deg_null, deg_table
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.files import misread_labels, read_table, write_table
from perturbscope.cli.app import run
from perturbscope.errors import ControlLabelMissingError, InvalidParameterError
from perturbscope.inference.embedder import Embedder
from perturbscope.model import Model
from perturbscope.scoring.calibration import calibrate
from perturbscope.scoring.cleaning import Cleaned, clean_labels
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions
from perturbscope.tasks.backends import LocalBackend
from tests.reports import first_two
from tests.screens import make_screen

FAST = ScoreOptions(permutations=20, repeats=2, max_cells=200)
SCREEN = make_screen()
VECTORS = np.asarray(SCREEN.obsm["X_pca"], dtype=np.float32)
PLAIN = SCREEN.obs["perturbation"].astype(str).tolist()
TWO = [f"NT-{i % 2}" if label == "control" else label for i, label in enumerate(PLAIN)]
ONE = ["NT-0, NT-1" if label == "control" else label for label in PLAIN]
"""The same cells with the label that two labels of controls are given."""


@pytest.mark.parametrize("control", [["NT-0", "NT-1"], ("NT-1", "NT-0"), np.array(["NT-1", "NT-0", "NT-0"])])
def test_several_controls_are_one_group_in_every_function(control: Any) -> None:
    counts = CountMatrix.from_matrix(SCREEN.X, SCREEN.var_names)
    asked: list[Callable[[list[str], Any], Any]] = [
        lambda labels, named: score_perturbations(VECTORS, labels, control=named, options=FAST).table,
        lambda labels, named: compare_perturbations(VECTORS, labels, control=named, options=FAST).table,
        lambda labels, named: pd.DataFrame(
            calibrate(VECTORS, labels, control=named, options=FAST, splits=5).to_dict()["sets"]
        ),
        lambda labels, named: deg_table(counts, labels, control=named),
        lambda labels, named: deg_null(counts, labels, control=named, splits=2),
    ]
    for ask in asked:
        pd.testing.assert_frame_equal(ask(TWO, control), ask(ONE, "NT-0, NT-1"))
    result = score_perturbations(VECTORS, TWO, control=control, options=FAST)
    assert result.provenance["control"] == "NT-0, NT-1"
    assert result.provenance["controls"] == ["NT-0", "NT-1"]
    paired = compare_perturbations(VECTORS, TWO, pairs=[("strong", "NT-1")], control=control, options=FAST)
    assert paired.table.loc[0, ["a", "b"]].tolist() == ["strong", "NT-0, NT-1"]


def test_a_list_of_one_control_is_that_label() -> None:
    one, listed = (score_perturbations(VECTORS, PLAIN, control=c, options=FAST) for c in ("control", ["control"]))
    pd.testing.assert_frame_equal(one.table, listed.table)
    assert one.provenance == listed.provenance


def test_the_name_of_many_controls_is_short_and_no_other_label() -> None:
    labels = [f"g{i % 9}" if label == "control" else label for i, label in enumerate(PLAIN)]
    controls = [f"g{i}" for i in range(9)]
    name = "g0, g1, g2 and 6 more"
    assert score_perturbations(VECTORS, labels, control=controls, options=FAST).provenance["control"] == name
    labels = [name if label == "weak" else label for label in labels]
    result = score_perturbations(VECTORS, labels, control=controls, options=FAST)
    assert result.provenance["control"] == f"{name} (controls)"
    assert name in set(result.table["perturbation"])


@pytest.mark.parametrize("control", [[], [1, 2], 3, ["NT-0", None]])
def test_a_control_that_is_no_label_is_refused(control: Any) -> None:
    with pytest.raises(InvalidParameterError, match="a label or a list of labels"):
        score_perturbations(VECTORS, TWO, control=control, options=FAST)


def test_each_control_label_must_exist() -> None:
    with pytest.raises(ControlLabelMissingError, match=r"'NT-2'.*NT-0"):
        score_perturbations(VECTORS, TWO, control=["NT-0", "NT-2"], options=FAST)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    screen = SCREEN.copy()
    screen.obs["perturbation"] = TWO
    screen.write_h5ad(tmp_path / "two.h5ad")
    return tmp_path / "two.h5ad"


def test_several_controls_of_a_file(two: Path, fake_embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umap, "umap_coordinates", first_two)
    expected = score_perturbations(VECTORS, ONE, control="NT-0, NT-1", options=FAST).table
    model = Model(LocalBackend(fake_embedder))
    keys: dict[str, Any] = {"perturbation_key": "perturbation", "use_rep": "X_pca", "control": ["NT-0", "NT-1"]}
    keys |= {"permutations": 20, "repeats": 2, "max_cells": 200}
    pd.testing.assert_frame_equal(model.score(two, **keys), expected)
    compared = model.compare(two, **keys, pairs=[("weak", "NT-0"), ("weak", "strong")])
    assert compared["b"].tolist() == ["NT-0, NT-1", "strong"]
    common = ["--perturbation-key", "perturbation", "--control", "NT-1", "--control", "NT-0"]
    vectors = ["--use-rep", "X_pca", "--permutations", "20", "--set", "repeats=2", "--set", "max_cells=200"]
    for command, more in (("score", vectors), ("compare", vectors), ("degs", []), ("report", vectors)):
        out = two.with_name(f"{command}.{'html' if command == 'report' else 'csv'}")
        assert run([command, str(two), str(out), *common, *more]) == 0, command
    written = read_table(two.with_name("score.csv"), field="scores").fillna(
        {"flags": "", "p_source": "", "p_tail_source": ""}
    )
    same = ["perturbation", "n_cells", "n_controls", "distance", "z", "p", "q", "flags"]
    pd.testing.assert_frame_equal(written[same], expected[same])
    assert "NT-0, NT-1" in two.with_name("report.html").read_text()
    assert set(pd.read_csv(two.with_name("degs.csv"))["perturbation"]) == {"strong", "weak", "rare"}


MISSING_LIKE = ["nan", "NaN", "NA", "N/A", "None", "NULL", "null", "<NA>", "-", "unassigned", "Unknown", "no call"]


def relabelled(**new: str) -> list[str]:
    return [new.get(label, label) for label in PLAIN]


@pytest.mark.parametrize("label", MISSING_LIKE)
def test_a_label_that_looks_missing_is_named_and_taken_out_on_request(label: str) -> None:
    labels = relabelled(weak=label)
    left = [place for place, name in enumerate(labels) if name != label]
    expected = score_perturbations(VECTORS[left], [labels[i] for i in left], control="control", options=FAST)
    warned = score_perturbations(VECTORS, labels, control="control", options=FAST)
    assert label in set(warned.table["perturbation"])
    assert any(f"{label!r}" in text and "--missing-label" in text for text in warned.warnings)
    clean = score_perturbations(VECTORS, labels, control="control", options=replace(FAST, missing_labels=(label,)))
    pd.testing.assert_frame_equal(clean.table, expected.table)
    assert clean.provenance["n_cells_missing_label"] == 30
    assert [text for text in clean.warnings if "missing" in text] == [
        f"30 of 123 cells have a label or batch that stands for a missing one ({label!r}) and were left out."
    ]


@pytest.mark.parametrize("label", ["NANOG", "NAT10", "unknown gene 7", "A-", "none-such", "Nana"])
def test_a_label_that_is_one_is_not_suspected(label: str) -> None:
    assert not clean_labels(relabelled(weak=label), "control").warnings


def test_a_missing_label_may_be_blank_a_batch_or_none_at_all_but_no_control() -> None:
    labels: list[Any] = [" " if i % 3 else None if label == "rare" else label for i, label in enumerate(PLAIN)]
    clean = clean_labels(labels, "control", missing=[""])
    assert clean.rows is not None
    assert clean.rows.tolist() == [i for i, label in enumerate(labels) if label and label.strip()]
    batches = ["NA" if i < 5 else "b" for i in range(len(PLAIN))]
    assert len(clean_labels(PLAIN, "control", batches=batches, missing=["NA"]).labels) == len(PLAIN) - 5
    assert clean_labels(PLAIN, "control", missing=["absent"]) == Cleaned(PLAIN, "control")
    with pytest.raises(InvalidParameterError, match="'control' is a control label and a missing label"):
        clean_labels(PLAIN, "control", missing=["control"])


@pytest.mark.parametrize(
    ("strong", "weak", "one"),
    [
        ("LAT+ctrl", "ctrl+LAT", "LAT"),
        ("LAT+control", "LAT", "LAT"),
        ("LAT;non-targeting_3", "LAT", "LAT"),
        ("STAT1+IRF1", "IRF1+STAT1", "IRF1+STAT1"),
        ("STAT1,IRF1", "IRF1,STAT1", "IRF1+STAT1"),
        ("STAT1_IRF1", "IRF1_STAT1", "IRF1+STAT1"),
        ("STAT1|IRF1", "IRF1 | STAT1", "IRF1+STAT1"),
        ("STAT1;IRF1", "IRF1+STAT1", "IRF1+STAT1"),
        ("STAT1/IRF1", "IRF1_STAT1", "IRF1+STAT1"),
        ("A+B+C", "C,A,B", "A+B+C"),
    ],
)
def test_spellings_of_a_combination_are_named_and_made_one(strong: str, weak: str, one: str) -> None:
    labels = relabelled(strong=strong, weak=weak)
    plain = clean_labels(labels, "control")
    assert plain.labels is labels
    assert any(f"{strong!r}" in text and f"{weak!r}" in text for text in plain.warnings), plain.warnings
    clean = clean_labels(labels, "control", combinations=True)
    assert list(clean.labels) == relabelled(strong=one, weak=one)
    assert not [text for text in clean.warnings if "seem to name" in text]
    result = compare_perturbations(
        VECTORS, labels, pairs=[(weak, "rare")], control="control", options=replace(FAST, normalize_combinations=True)
    )
    assert result.table.loc[0, ["a", "b", "n_a"]].tolist() == [one, "rare", 60]


@pytest.mark.parametrize(
    ("strong", "weak"),
    [
        ("guide_1_2", "guide_2_1"),
        ("non-targeting", "NT"),
        ("10 ng/ml", "ml/10 ng"),
        ("STAT1_g1", "g1_STAT1"),
        ("HLA-A", "A-HLA"),
        ("LAT+", "+LAT"),
    ],
)
def test_what_may_be_no_combination_stays(strong: str, weak: str) -> None:
    labels = relabelled(strong=strong, weak=weak)
    clean = clean_labels(labels, "control", combinations=True)
    assert (list(clean.labels), clean.warnings) == (labels, [])


def test_combinations_of_controls_alone_are_controls() -> None:
    labels = relabelled(control="ctrl+ctrl", strong="ctrl", weak="NegCtrl0_NegCtrl1")
    clean = clean_labels(labels, ["ctrl"], combinations=True)
    assert set(clean.labels) == {"ctrl", "rare"}


def test_a_table_is_read_back_as_it_was(tmp_path: Path) -> None:
    labels = relabelled(strong="NA", weak="None", rare="007")
    table = score_perturbations(VECTORS, labels, control="control", options=replace(FAST, min_cells=3)).table
    write_table(tmp_path / "t.csv", table, {})
    arguments = json.loads((tmp_path / "t.csv.provenance.json").read_text())["read_csv"]
    read = [pd.read_csv(tmp_path / "t.csv", **arguments), read_table(tmp_path / "t.csv", field="t")]
    for found in read:
        assert found["perturbation"].tolist() == table["perturbation"].tolist()
        assert found["z"].tolist() == pytest.approx(table["z"].tolist(), nan_ok=True)
    assert misread_labels(table) == ["NA", "None"]
    write_table(tmp_path / "t.parquet", table, {})
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)


def test_labels_of_a_file_are_cleaned(two: Path) -> None:
    screen = ad.read_h5ad(two)
    names = {"strong": "nan", "weak": "STAT1+NT-1", "rare": "NT-0+STAT1"}
    screen.obs["perturbation"] = [names.get(label, label) for label in TWO]
    screen.write_h5ad(two)
    out = two.with_name("out.csv")
    common = ["--perturbation-key", "perturbation", "--control", "NT-1", "--control", "NT-0", "--missing-label", "nan"]
    vectors = ["--use-rep", "X_pca", "--permutations", "20", "--set", "repeats=2", "--normalize-combinations"]
    assert run(["score", str(two), str(out), *common, *vectors]) == 0
    table = read_table(out, field="scores")
    assert table[["perturbation", "n_cells", "n_controls"]].to_numpy().tolist() == [["STAT1", 33, 60]]
    facts = json.loads(out.with_name("out.csv.provenance.json").read_text())
    assert (facts["n_cells_missing_label"], facts["n_cells_left_out"], facts["combinations"]) == (30, 0, 2)
    assert len(facts["warnings"]) == len(set(facts["warnings"]))
    assert run(["degs", str(two), str(two.with_name("degs.csv")), *common, "--normalize-combinations"]) == 0
    assert read_table(two.with_name("degs.csv"), field="degs")["perturbation"].tolist() == ["STAT1"]
