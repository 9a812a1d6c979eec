"""Scores carry a warning if their model was trained on the cells that are scored."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import pyarrow.parquet as pq
import pytest

import perturbscope
from perturbscope.analysis import umap
from perturbscope.cli.app import run
from perturbscope.inference.bundle import Bundle, sha256
from perturbscope.inference.embedder import Embedder
from perturbscope.model import Model
from perturbscope.tasks.backends import LocalBackend
from perturbscope.tasks.trained_on import KEY, Fingerprint, Seen, find_seen
from tests.bundles import tiny_files, tiny_manifest
from tests.reports import first_two
from tests.screens import make_screen

FAST: dict[str, Any] = {"permutations": 40, "repeats": 2}
LABELS = ["--perturbation-key", "perturbation", "--control", "control", "--set", "max_cells=60"]


def stage(digest: str, *, objective: str = "mixed batches", cells: int = 123, **options: Any) -> dict[str, Any]:
    """The record of training on one file in a manifest, as training writes it."""
    return {
        "objective": objective,
        "data": {"sources": [{"name": "thp1", "path": "data/thp1.h5ad", "sha256": digest, "cells": cells}]},
        "hyper_parameters": {"corpus": {"sources": [{"name": None, "path": "data/thp1.h5ad", **options}]}},
        "split": {
            "thp1": {
                "targets": {"train": [f"G{i}" for i in range(8)], "test": ["T"]},
                "controls": {"train": 1382, "test": 691},
            }
        },
        "parent": None,
    }


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    path = tmp_path / "cells.h5ad"
    make_screen().write_h5ad(path)
    return path


def of(digest: str | None, n_cells: int = 123) -> Fingerprint:
    return Fingerprint(sha256=digest, n_cells=n_cells)


def test_fine_tuning_on_the_file_is_the_gravest() -> None:
    training = {**stage("aa"), "parent": stage("aa", objective="masked language model")}
    found = find_seen(training, of("aa"))
    assert found is not None
    assert found.how == "fine_tuned_on_this_file"
    assert found.undoes
    said = found.warning()
    assert said.startswith("fine_tuned_on_this_file: The model was fine-tuned on cells of this file (thp1: G0, G1")
    assert "and 2 more and 1,382 controls)" in said
    assert "not to be believed" in said
    json.dumps(found.to_dict())


def test_the_parents_of_a_model_count() -> None:
    middle = {**stage("bb", cells=9), "parent": stage("cc", objective="masked language model")}
    training = {**stage("aa", cells=9), "parent": middle}
    assert find_seen(training, of("bb")).how == "fine_tuned_on_this_file"  # type: ignore[union-attr]
    assert find_seen(training, of("cc")).how == "pretrained_on_this_file"  # type: ignore[union-attr]
    assert find_seen(training, of("dd")) is None


@pytest.mark.parametrize("options", [{"objective": "masked language model"}, {"unlabelled": True}])
def test_cells_seen_without_labels_are_a_milder_note(options: dict[str, Any]) -> None:
    found = find_seen(stage("aa", **options), of("aa"))
    assert found is not None
    assert not found.undoes
    assert "without their labels" in found.warning()
    assert "chosen by" not in found.warning()
    # As many cells alone say nothing here.
    assert find_seen(stage("aa", **options), of("bb")) is None


def test_pretraining_on_chosen_cells_names_the_column() -> None:
    found = find_seen(stage("aa", objective="masked language model", select={"perturbation": ["control"]}), of("aa"))
    assert found is not None
    assert "chosen by perturbation; where that goes with the perturbation" in found.warning()


@pytest.mark.parametrize("digest", [None, "bb"])
def test_as_many_cells_in_another_encoding_are_pointed_out(digest: str | None) -> None:
    found = find_seen(stage("aa"), of(digest))
    assert found is not None
    assert not found.undoes
    assert "123 cells here, as many as in a file on which the model was fine-tuned (thp1: G0" in found.warning()
    assert find_seen(stage("aa"), of(digest, n_cells=122)) is None


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"data": "none: random weights"},
        {"data": {"sources": "aa"}, "parent": "aa"},
        {"data": {"sources": [None, "aa", {}, {"sha256": None}]}},
        {"data": {"sources": [{"sha256": "bb"}]}, "parent": {"data": None}, "split": [], "hyper_parameters": 3},
    ],
)
def test_bundles_of_other_makers_may_say_anything(training: dict[str, Any]) -> None:
    assert find_seen(training, of("aa")) is None
    assert find_seen(training, of(None)) is None


def test_what_is_not_known_to_be_without_labels_is_taken_as_fine_tuning() -> None:
    found = find_seen({"data": {"sources": [{"sha256": "aa"}]}, "split": [], "hyper_parameters": 3}, of("aa"))
    assert found == Seen(how="fine_tuned_on_this_file", source="", n_cells=123)


def test_the_default_bundle_knows_its_data(data_dir: Path) -> None:
    training = json.loads((data_dir.parent / "bundles/default/manifest.json").read_text())["training"]

    def how(name: str) -> str | None:
        found = find_seen(training, of(sha256(data_dir / name), n_cells=0))
        return None if found is None else found.how

    assert how("papalexi2021_eccite_thp1_panel.h5ad") == "fine_tuned_on_this_file"
    assert how("kang2018_ifnb_pbmc.h5ad") == "pretrained_on_this_file"
    assert how("hill2018_cropseq_mcf10a_panel.h5ad") is None


def test_scores_and_comparisons_say_it_first(
    fake_embedder: Embedder, screen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_embedder.training = stage(sha256(screen))
    model = Model(LocalBackend(fake_embedder))
    copy = Path(shutil.copy(screen, tmp_path / "renamed.h5ad"))
    where: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control"}
    with caplog.at_level(logging.WARNING, logger="perturbscope"):
        for table in (model.score(copy, **where, **FAST), model.compare(screen, **where, **FAST)):
            assert table.attrs["warnings"][0].startswith("fine_tuned_on_this_file: ")
            assert table.attrs["provenance"][KEY]["source"] == "thp1"
    assert "fine-tuned on cells of this file" in caplog.text


def test_objects_in_memory_are_known_by_their_number_and_backed_ones_by_their_file(
    fake_embedder: Embedder, screen: Path
) -> None:
    fake_embedder.training = stage(sha256(screen))
    model = Model(LocalBackend(fake_embedder))

    def first(cells: Any, **options: Any) -> str:
        where: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control"}
        warnings = model.score(cells, **where, **FAST, **options).attrs["warnings"]
        return str(warnings[0]).partition(":")[0]

    adata = ad.read_h5ad(screen)
    assert first(adata) == "perhaps_fine_tuned_on_these_cells"
    part = adata[adata.obs["perturbation"] != "rare"].copy()
    assert "fine_tuned" not in first(part)
    assert "fine_tuned" not in first(screen, use_rep="X_pca")  # the model embeds nothing
    backed = ad.read_h5ad(screen, backed="r")
    assert first(backed) == "fine_tuned_on_this_file"
    assert "fine_tuned" not in first(backed[: len(backed) - 1])
    backed.file.close()


def test_a_file_is_not_read_for_a_bundle_without_data(
    tiny_bundle: Path, screen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perturbscope.tasks.trained_on.sha256", lambda _: pytest.fail("read for nothing"))
    with perturbscope.load(tiny_bundle) as model:
        table = model.score(screen, perturbation_key="perturbation", control="control", **FAST)
    assert KEY not in table.attrs["provenance"]


def test_the_commands_say_it(
    screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(umap, "umap_coordinates", first_two)
    bundle = tmp_path / "bundle"
    Bundle.write(bundle, tiny_manifest(training=stage(sha256(screen))), tiny_files())
    for command, out, options in (
        ("score", "scores.parquet", LABELS),
        ("compare", "pairs.csv", LABELS),
        ("report", "page.html", LABELS),
        ("embed", "embedded.h5ad", []),
    ):
        assert run([command, str(screen), str(tmp_path / out), *options, "--bundle", str(bundle)]) == 0
        assert "fine-tuned on cells of this file (thp1" in " ".join(capsys.readouterr().err.split()), command
    kept = json.loads(pq.read_schema(tmp_path / "scores.parquet").metadata[b"perturbscope"])
    assert kept["warnings"][0].startswith("fine_tuned_on_this_file")
    page = (tmp_path / "page.html").read_text()
    head, _, rest = page.partition("What this says")
    assert "differ from control (q &lt; 0.05), not to be believed" in head
    bold = "</h2><ul><li>Not to be believed, since the model was fine-tuned on cells of this file: "
    assert re.match(re.escape(bold) + r"\d of 2 perturbations differ from control at q &lt; 0.05", rest)
    assert "Read with care</h2><ul><li>Fine-tuned on this file: The model was fine-tuned on cells of" in rest
