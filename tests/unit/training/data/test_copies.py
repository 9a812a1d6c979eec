"""Copies of cells, guides of one gene and labels that name nothing do not make a held-out part that was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from perturbscope.errors import InvalidParameterError
from perturbscope.families.tokens import TokenizedCells
from tests.training_data import data_set, pretrain_values
from training.commands.corpus import main as corpus_command
from training.commands.pretrain import pretrain
from training.config import strict
from training.config.stages import CorpusConfig, DegConfig, PretrainConfig, SplitConfig
from training.data.copies import digests, without_copies
from training.data.corpus import build_corpus
from training.data.splits import DataSplit, make_splits
from training.data.targets import genes_of_guides, separated
from training.measure.unseen import trained_on


def tokens(*cells: list[int]) -> TokenizedCells:
    lengths = [len(cell) for cell in cells]
    return TokenizedCells(
        arrays={"input_ids": np.array([token for cell in cells for token in cell], dtype=np.int64)},
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        known_share=np.ones(len(cells), dtype=np.float32),
        n_detected=np.array(lengths, dtype=np.int32),
        coverage=None,  # type: ignore[arg-type]
        per_cell={"age": np.array([[1.5]] * len(cells), dtype=np.float32)},
    )


def test_a_digest_is_that_of_the_tokens_in_their_order() -> None:
    found = digests(tokens([3, 4, 5], [5, 4, 3], [3, 4, 5], [], [3, 4], [3, 4, 5, 3]))
    assert found[0] == found[2]
    assert len(set(found.tolist())) == 5
    rng = np.random.default_rng(0)
    cells = [rng.integers(0, 2**16, rng.integers(0, 90)).tolist() for _ in range(4000)]
    whole = digests(tokens(*cells))
    assert len(set(whole.tolist())) == len({tuple(cell) for cell in cells})
    parts = [digests(tokens(*cells[start : start + 7])) for start in range(0, 4000, 7)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_cells_that_are_given_twice_are_used_once_and_equal_ones_by_chance_are_left() -> None:
    of = np.array([7, 8, 9, 7, 8, 9, *range(100, 120)], dtype=np.uint64)
    assert without_copies(of, np.arange(6)).tolist() == [0, 1, 2]
    few = np.array([0, 3, *range(6, 26)])
    assert without_copies(of, few).tolist() == few.tolist()


def corpus_values(folder: Path, cells: dict[str, anndata.AnnData], **options: Any) -> dict[str, Any]:
    values = pretrain_values(folder, max_steps=3)["corpus"]
    for name, adata in cells.items():
        adata.write_h5ad(folder / f"{name}.h5ad")
    values["sources"] = [{"path": str(folder / f"{name}.h5ad")} for name in cells]
    return {**values, **options}


def test_the_same_file_under_two_names_is_refused_in_pretraining(tmp_path: Path) -> None:
    values = pretrain_values(tmp_path, max_steps=3)
    cells = data_set()
    values["corpus"] = corpus_values(tmp_path, {"first": cells, "second": cells})
    with pytest.raises(
        InvalidParameterError, match=r"of 26 cells to validate on .*(first and second|second and first)"
    ):
        pretrain(strict.parse(PretrainConfig, values))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    pretrain(strict.parse(PretrainConfig, pretrain_values(folder, max_steps=3)))
    return folder


def splits(
    folder: Path, cells: dict[str, anndata.AnnData], *, min_degs: int = 5, **split: Any
) -> tuple[list[DataSplit], str]:
    config = strict.parse(CorpusConfig, corpus_values(folder, cells, path=str(folder / "split-corpus")))
    corpus = build_corpus(config, overwrite=True)
    said: list[str] = []
    options = {"control_fractions": [0.5, 0.25, 0.25], "validation": ["strong3"], "test": ["strong4"], **split}
    made = make_splits(
        corpus, config.sources, DegConfig(min_degs=min_degs), strict.parse(SplitConfig, options), say=said.append
    )
    return made, " ".join(said)


def test_doubled_cells_count_once(tmp_path: Path) -> None:
    cells = data_set()
    (once,), _ = splits(tmp_path, {"once": cells})
    twice = anndata.concat([cells, cells], index_unique="-")
    (doubled,), _ = splits(tmp_path, {"twice": twice})
    assert doubled.degs == once.degs
    assert sum(map(len, doubled.controls.values())) == sum(map(len, once.controls.values()))


def test_held_out_cells_of_one_data_set_in_another_are_refused(tmp_path: Path) -> None:
    cells = data_set()
    other = cells[cells.obs["perturbation"].isin(["control", "strong4"])].copy()
    other.obs["perturbation"] = other.obs["perturbation"].astype(str).replace({"strong4": "strong5"})
    with pytest.raises(InvalidParameterError, match=r"trained on too .*: (other and cells|cells and other)"):
        splits(tmp_path, {"cells": cells, "other": other})


def test_text_for_a_missing_value_is_no_perturbation_and_one_cell_is_not_trained_on(tmp_path: Path) -> None:
    cells = data_set()
    labels = cells.obs["perturbation"].astype(str).to_numpy().copy()
    labels[np.flatnonzero(labels == "strong1")[:7]] = "nan"
    labels[np.flatnonzero(labels == "strong1")[1:]] = ""
    cells.obs["perturbation"] = labels
    (split,), said = splits(tmp_path, {"cells": cells}, min_degs=0)
    assert "13 cells have '', 'nan' for a perturbation" in said
    assert set(split.degs) == {"strong1", "strong2", "strong3", "strong4", "weak"}
    assert "strong1" not in split.targets["train"]
    assert "strong1" in split.targets["ineligible"]


def test_guides_of_one_gene_are_warned_of_and_kept_together_on_request(tmp_path: Path) -> None:
    cells = data_set(cells_per_target=16)
    genes = {"strong1": "STAT1", "strong2": "JAK2", "strong3": "IRF1", "strong4": "CUL3", "weak": "SPI1"}
    labels = cells.obs["perturbation"].astype(str).to_numpy()
    number = np.arange(len(labels)) % 2 + 1
    cells.obs["perturbation"] = [
        f"{genes[label]}g{guide}" if label in genes else label for label, guide in zip(labels, number, strict=True)
    ]
    listed = {"validation": ["JAK2g1"], "test": ["IRF1g1"]}
    (apart,), said = splits(tmp_path, {"cells": cells}, min_degs=1, **listed)
    assert "Guides of 2 genes are both trained on and held out, such as IRF1g1, IRF1g2 of IRF1" in said
    assert apart.targets["test"] == ["IRF1g1"]
    (together,), said = splits(tmp_path, {"cells": cells}, min_degs=1, by_gene=True, **listed)
    assert "both trained on" not in said
    assert together.targets["test"] == ["IRF1g1", "IRF1g2"]
    assert together.targets["validation"] == ["JAK2g1", "JAK2g2"]
    assert not {label for label in together.targets["train"] if label.startswith(("IRF1", "JAK2"))}


def test_guides_are_labels_with_a_gene_inside() -> None:
    guides = ["STAT1g2", "STAT1_1", "sgSTAT1-2", "STAT1-guide3", "STAT1_P1P2"]
    others = ["STAT1", "C1orf112", "HLA-A", "control", "strong1", "STAT1+JAK2"]
    found = genes_of_guides(guides + others)
    assert list(found) == guides
    assert set(found.values()) == {"STAT1"}
    parts = {"train": ["STAT1g1", "JAK2g1"], "test": ["STAT1", "JAK2g2"]}
    genes = {"STAT1g1": "STAT1", "JAK2g1": "JAK2", "JAK2g2": "JAK2"}
    assert separated(genes, parts) == {"JAK2": ["JAK2g1", "JAK2g2"], "STAT1": ["STAT1", "STAT1g1"]}


def test_a_file_that_a_checkpoint_was_trained_on_is_found_in_its_record(trained: Path, tmp_path: Path) -> None:
    from training.checkpoint import load_checkpoint

    record = load_checkpoint(trained / "pretrain/checkpoint").provenance
    assert trained_on(trained / "perturbed.h5ad", {"parent": record}) == record["data"]["sources"][0]["kept"] > 0
    (tmp_path / "other").write_text("other")
    assert trained_on(tmp_path / "other", record) == 0


def test_a_finished_corpus_is_used_without_its_sources_and_they_are_hashed_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = pretrain_values(trained, max_steps=3) | {"output": str(tmp_path / "again")}
    monkeypatch.setattr("training.data.sources.identity", lambda _: pytest.fail("a source was read again"))
    assert pretrain(strict.parse(PretrainConfig, values)) is not None
    away = (trained / "perturbed.h5ad").rename(trained / "away.h5ad")
    try:
        values["output"] = str(tmp_path / "without")
        assert pretrain(strict.parse(PretrainConfig, values)) is not None
    finally:
        away.rename(trained / "perturbed.h5ad")


@pytest.mark.parametrize("name", ["input_ids", "offsets", "row", "label-batch"])
def test_a_changed_value_of_a_corpus_is_found(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = strict.parse(CorpusConfig, corpus_values(tmp_path, {"cells": data_set()}))
    corpus = build_corpus(config)
    assert corpus.verify() == len(list((corpus.path / "shard-00000").iterdir()))
    assert corpus_command(["verify", str(corpus.path)]) == 0
    path = corpus.path / f"shard-00000/{name}.npy"
    values = np.load(path)
    values[1], values[2] = values[2], values[1] + 1
    np.save(path, values)
    assert corpus_command(["verify", str(corpus.path)]) == 1
    assert f"{name}.npy was changed after it was written" in capsys.readouterr().err
