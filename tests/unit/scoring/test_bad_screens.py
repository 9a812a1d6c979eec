"""Screens that do not allow a score give a named warning or a clear error. This is the list.

Each defect is scored by every metric, estimator and null, and compared and calibrated where that is another path. A
number that could not be had is NaN and says so; no defect yields a plain z or p.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbscope.cli.app import run
from perturbscope.errors import (
    ControlLabelMissingError,
    InvalidEmbeddingError,
    InvalidInputError,
    InvalidParameterError,
    TooFewCellsError,
    TooFewControlsError,
)
from perturbscope.scoring.calibration import calibrate
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import FLAGS, ScoreOptions
from tests.screens import make_screen

METRICS = ("e_distance", "cosine_e_distance", "wasserstein")
FAST: dict[str, Any] = {"permutations": 29, "wasserstein_permutations": 9, "null_draws": 10, "repeats": 2}
WAYS = [
    ScoreOptions(metrics=METRICS, estimator=estimator, null=null, normalize=normalize, null_size=20, **FAST)
    for estimator, null, normalize in itertools.product("UV", ("size_matched", "fixed"), (True, False))
]
NUMBERS = ["z", "p", "q"]


@dataclass
class Cells:
    """A sound screen for tests to spoil: 60 controls, 30 cells of each of "a" (moved) and "b"; two batches in all."""

    vectors: np.ndarray
    labels: np.ndarray
    batches: np.ndarray | None = None

    @classmethod
    def sound(cls) -> Cells:
        rng = np.random.default_rng(0)
        labels = np.repeat(["control", "a", "b"], [60, 30, 30]).astype(object)
        vectors = rng.normal(size=(120, 4)) + 1
        vectors[labels == "a", 0] += 3
        return cls(vectors.astype(np.float32), labels)

    def score(self, options: ScoreOptions | None = None) -> Any:
        return score_perturbations(
            self.vectors, self.labels, control="control", batches=self.batches, options=options or WAYS[0]
        )

    def compare(self, options: ScoreOptions | None = None, *, control: str | None = "control") -> Any:
        return compare_perturbations(
            self.vectors, self.labels, control=control, batches=self.batches, options=options or WAYS[0]
        )

    def calibrate(self) -> Any:
        return calibrate(self.vectors, self.labels, control="control", batches=self.batches, options=WAYS[0], splits=6)


def rows_of(result: Any, name: str) -> pd.DataFrame:
    return result.table[result.table["perturbation"] == name]


def flagged(rows: pd.DataFrame, flag: str) -> bool:
    assert flag in FLAGS
    return bool(len(rows)) and all(flag in flags.split(";") for flags in rows["flags"])


def told(result: Any, text: str) -> bool:
    return any(text in warning for warning in result.warnings)


@pytest.mark.parametrize("options", WAYS, ids=lambda o: f"{o.estimator}-{o.null}-{o.normalize}")
class TestEveryWayOfScoring:
    def test_a_sound_screen_has_numbers_and_no_flag(self, options: ScoreOptions) -> None:
        result = Cells.sound().score(options)
        assert np.isfinite(result.table[["distance", "null_mean", "null_sd", "z", "p", "q"]]).all().all()
        assert result.table["flags"].eq("").all()
        assert not any(told(result, flag) for flag in FLAGS)

    def test_one_and_the_same_vector_everywhere(self, options: ScoreOptions) -> None:
        cells = Cells.sound()
        cells.vectors[:] = cells.vectors[0] * (1 + 1e-7 * np.arange(120)[:, None] % 5e-7)
        result = cells.score(options)
        assert result.table[NUMBERS].isna().all().all()
        assert flagged(result.table, "constant_embeddings")
        assert told(result, "constant_embeddings")
        pairs = cells.compare(options)
        assert pairs.table[NUMBERS].isna().all().all()
        assert flagged(pairs.table, "constant_embeddings")
        assert told(pairs, "constant_embeddings")

    def test_controls_of_one_vector(self, options: ScoreOptions) -> None:
        cells = Cells.sound()
        cells.vectors[:60] = 1
        result = cells.score(options)
        table = result.table
        of_controls = options.null == "fixed"
        assert table["z"].isna().all() if of_controls else table["z"].gt(3).all()
        assert flagged(table, "null_sd_zero") is of_controls
        assert flagged(table, "duplicated_vectors")
        assert told(result, "null_sd_zero") is of_controls
        assert cells.compare(options).table["z"].notna().all()

    def test_a_perturbation_of_one_vector(self, options: ScoreOptions) -> None:
        cells = Cells.sound()
        cells.vectors[cells.labels == "a"] = cells.vectors[60]
        result = cells.score(options)
        assert flagged(rows_of(result, "a"), "duplicated_vectors")
        assert rows_of(result, "b")["flags"].eq("").all()
        assert told(result, "duplicated_vectors")

    def test_batches_that_are_the_perturbations(self, options: ScoreOptions) -> None:
        cells = Cells.sound()
        cells.batches = cells.labels
        result = cells.score(options)
        assert result.table[["p", "q"]].isna().all().all()
        assert flagged(result.table, "batch_confounded")
        assert told(result, "batch_confounded")

    def test_batches_that_are_so_in_part(self, options: ScoreOptions) -> None:
        cells = Cells.sound()
        cells.batches = np.full(120, "shared", dtype=object)
        cells.batches[60:75] = "a alone"
        result = cells.score(options)
        assert flagged(rows_of(result, "a"), "batch_partly_confounded")
        assert told(result, "batch_partly_confounded")
        assert rows_of(result, "b")["flags"].eq("").all()


# --- too little --------------------------------------------------------------------------------------------------


def keep(cells: Cells, mask: np.ndarray) -> Cells:
    return Cells(cells.vectors[mask], cells.labels[mask], None if cells.batches is None else cells.batches[mask])


def only(*names: str) -> Callable[[Cells], Cells]:
    return lambda cells: keep(cells, np.isin(cells.labels, names))


def fewer(n: int, name: str) -> Callable[[Cells], Cells]:
    return lambda cells: keep(cells, (cells.labels != name) | (np.cumsum(cells.labels == name) <= n))


def spoilt(row: int, value: float) -> Callable[[Cells], Cells]:
    def change(cells: Cells) -> Cells:
        cells.vectors[row, 1:] = value
        if value == 0:
            cells.vectors[row] = 0
        return cells

    return change


def unlabelled(cells: Cells) -> Cells:
    cells.labels[7] = None
    return cells


ERRORS: list[tuple[str, Callable[[Cells], Cells], type[InvalidInputError], str]] = [
    ("controls only", only("control"), TooFewCellsError, "no label to score"),
    ("no controls", only("a", "b"), ControlLabelMissingError, "'control'"),
    ("few controls", fewer(19, "control"), TooFewControlsError, "19 cells .* at least 20"),
    ("all below the floor", lambda c: fewer(19, "b")(fewer(19, "a")(c)), TooFewCellsError, "20 cells or more"),
    ("NaN", spoilt(71, np.nan), InvalidEmbeddingError, "Row 71 .*not finite"),
    ("infinite", spoilt(72, np.inf), InvalidEmbeddingError, "Row 72 .*not finite"),
    ("absurd", spoilt(73, 1e30), InvalidEmbeddingError, "Row 73 .*above 1e\\+15"),
    ("all zero", spoilt(74, 0), InvalidEmbeddingError, "Row 74 .*all zero"),
    ("no label", unlabelled, InvalidParameterError, "row 7"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors_of_score(spoil: Callable[[Cells], Cells], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spoil(Cells.sound()).score()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [e[1:] for e in ERRORS[1:3] + ERRORS[4:]],
    ids=[e[0] for e in ERRORS[1:3] + ERRORS[4:]],
)
def test_errors_of_compare_and_calibrate(spoil: Callable[[Cells], Cells], error: type[Exception], message: str) -> None:
    for call in (Cells.compare, Cells.calibrate):
        with pytest.raises(error, match=message):
            call(spoil(Cells.sound()))


def test_one_perturbation() -> None:
    cells = only("control", "a")(Cells.sound())
    result = cells.score()
    assert len(result.table) == len(METRICS)
    assert result.table["p"].tolist() == result.table["q"].tolist()
    assert result.summary()["n"].tolist() == [1, 1, 1]
    with pytest.raises(InvalidParameterError, match="two labels"):
        cells.compare()
    assert cells.calibrate().sets


def test_a_perturbation_below_the_floor_is_listed_without_numbers() -> None:
    cells = fewer(19, "b")(Cells.sound())
    result = cells.score()
    assert rows_of(result, "b")[["distance", *NUMBERS]].isna().all().all()
    assert flagged(rows_of(result, "b"), "too_few_cells")
    assert told(result, "fewer than 20 cells")
    pairs = cells.compare()
    assert pairs.table[["distance", *NUMBERS]].isna().all().all()
    assert flagged(pairs.table, "too_few_cells")


def test_fewer_controls_than_a_sound_null_needs() -> None:
    cells = fewer(25, "control")(Cells.sound())
    result = cells.score()
    of_samples = result.table[result.table["metric"] == "wasserstein"]
    assert flagged(of_samples, "fewer_controls_than_cells")
    assert result.table["z"].notna().all()
    with pytest.raises(TooFewControlsError, match="null='size_matched'"):
        cells.score(WAYS[2])


# --- labels, batches, copies -------------------------------------------------------------------------------------


def test_labels_and_batches_that_differ_in_case_or_space() -> None:
    cells = Cells.sound()
    cells.labels[:25] = "Control "
    cells.labels[60:] = ["gene", "GENE"] * 30
    cells.batches = np.array(["one", "One "] * 60)
    quick = ScoreOptions(permutations=29)
    result = cells.score(quick)
    assert flagged(result.table, "similar_label")
    for pair in ("'Control ' and 'control'", "'GENE' and 'gene'", "'One ' and 'one'"):
        assert told(result, pair)
    pairs = cells.compare(quick)
    assert told(pairs, "'One ' and 'one'")
    assert told(pairs, "'GENE' and 'gene'")


def test_cells_that_are_there_twice() -> None:
    cells = Cells.sound()
    twice = np.concatenate([np.arange(120), np.arange(60, 90)])
    cells = Cells(cells.vectors[twice], cells.labels[twice])
    result = cells.score()
    assert flagged(rows_of(result, "a"), "duplicated_vectors")
    assert rows_of(result, "b")["flags"].eq("").all()
    assert flagged(cells.compare(control=None).table, "duplicated_vectors") is False  # control and b are in order
    assert flagged(cells.compare().table, "duplicated_vectors")
    # Cells of a perturbation that are controls as well.
    copied = Cells.sound()
    copied.vectors[90:] = copied.vectors[:30]
    assert flagged(rows_of(copied.score(), "b"), "duplicated_vectors")
    # The same controls twice concern every perturbation.
    doubled = Cells.sound()
    doubled.vectors[30:60] = doubled.vectors[:30]
    assert flagged(doubled.score().table, "duplicated_vectors")
    assert told(doubled.calibrate(), "duplicated_vectors")


def test_a_few_equal_cells_are_no_copies() -> None:
    cells = Cells.sound()
    cells.vectors[61] = cells.vectors[60]
    assert cells.score().table["flags"].eq("").all()


def test_a_batch_of_its_own_for_every_cell() -> None:
    cells = Cells.sound()
    cells.batches = np.arange(120).astype(str)
    assert cells.score().table["p"].isna().all()
    found = cells.calibrate()
    assert {item.kind for item in found.sets} == {"batch"}
    assert told(found, "6 of 6 splits by cell have no p")
    assert told(found, "batch_confounded")


def test_two_cells_in_a_shared_batch_are_few_exchanges() -> None:
    cells = Cells.sound()
    cells.batches = np.array(["control"] * 58 + ["shared"] * 4 + ["a"] * 58)
    result = cells.score(ScoreOptions(permutations=99, min_cells=2))
    assert flagged(rows_of(result, "a"), "batch_too_few_cells") or flagged(rows_of(result, "a"), "few_exchanges")
    assert (rows_of(result, "a")["p"] > 0.1).all()
    assert told(result, "few_exchanges")


def test_constant_controls_cannot_be_calibrated() -> None:
    cells = Cells.sound()
    cells.vectors[:60] = 1
    found = cells.calibrate()
    assert found.sets == ()
    assert told(found, "constant_embeddings")
    assert told(found, "so that there is no such calibration")


# --- a file, on the command line ---------------------------------------------------------------------------------


@pytest.fixture
def screen_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[ad.AnnData], None]], None]:
    monkeypatch.chdir(tmp_path)

    def write(spoil: Callable[[ad.AnnData], None]) -> None:
        adata = make_screen()
        adata.obs["perturbation"] = adata.obs["perturbation"].astype(object)
        spoil(adata)
        adata.write_h5ad("in.h5ad")

    return write


COMMAND = ["in.h5ad", "out.csv", "--perturbation-key", "perturbation", "--control", "control", "--use-rep", "X_pca"]


def nan_after_unlabelled(adata: ad.AnnData) -> None:
    adata.obs.iloc[:9, adata.obs.columns.get_loc("perturbation")] = None
    adata.obsm["X_pca"][3] = np.nan  # a cell that is left out
    adata.obsm["X_pca"][70] = np.nan


def test_a_message_names_the_row_of_the_file(
    screen_file: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    screen_file(nan_after_unlabelled)
    for command in ("score", "compare"):
        assert run([command, *COMMAND]) == 2
        error = capfd.readouterr().err
        assert "Error [invalid_embedding]: Row 70 of embeddings" in error
        assert "1 such rows of 114" in error


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda adata: adata.obsm.update(X_pca=np.ones((123, 5))), "constant_embeddings"),
        (lambda adata: adata.obs.update({"batch": adata.obs["perturbation"]}), "batch_confounded"),
    ],
    ids=["constant", "confounded"],
)
def test_warnings_reach_the_screen_and_the_file(
    screen_file: Callable[..., None], capfd: pytest.CaptureFixture[str], spoil: Callable[[ad.AnnData], None], text: str
) -> None:
    screen_file(spoil)
    assert run(["score", *COMMAND, "--batch-key", "batch", "--permutations", "29"]) == 0
    assert f"Warning: {text}" in capfd.readouterr().err
    table = pd.read_csv("out.csv")
    assert table["p"].isna().all()
    assert table.loc[table["n_cells"] >= 20, "flags"].str.contains(text).all()
