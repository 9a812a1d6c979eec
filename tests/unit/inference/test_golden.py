"""Golden vectors: what is recorded is found again, and whatever is not as it was is told with numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from perturbscope.cells.counts import CountMatrix
from perturbscope.cli.app import app, run
from perturbscope.errors import CorruptBundleError, GoldenMismatchError
from perturbscope.families.outputs import CELL_EMBEDDING, Outputs, cell_embedding
from perturbscope.inference.bundle import GOLDEN, Bundle, Variant
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.golden import Golden, GoldenResult, check_golden, read_golden
from perturbscope.inference.golden_making import add_golden
from tests.bundles import (
    TINY_OUTPUTS,
    TINY_WIDTH,
    masked_mean_graph,
    tiny_files,
    tiny_manifest,
    tiny_table,
    write_outputs_bundle,
    write_tiny_bundle,
)

CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny bundle with golden vectors; read only."""
    return add_golden(write_tiny_bundle(tmp_path_factory.mktemp("golden") / "tiny"))


def golden_of(bundle: Bundle) -> Golden:
    golden = read_golden(bundle)
    assert golden is not None
    return golden


def rewritten(proven: Bundle, folder: Path, **files: Any) -> Bundle:
    """The bundle with other files, and checksums that agree."""
    kept: dict[str, Path | bytes] = {name: proven.path / name for name in proven.manifest.files}
    return Bundle.write(folder / "other", proven.manifest, kept | files)


def spoilt(proven: Bundle, folder: Path, **changes: Any) -> Bundle:
    """The bundle with changes to golden.json."""
    data = json.loads((proven.path / GOLDEN).read_text())
    return rewritten(proven, folder, **{GOLDEN: json.dumps(data | changes).encode()})


def test_the_weights_and_the_model_id_stay(proven: Bundle, tmp_path: Path) -> None:
    before = Bundle.open(write_tiny_bundle(tmp_path / "tiny"))
    assert read_golden(before) is None
    after = add_golden(before.path)
    assert after.model_id == before.model_id
    assert {**after.manifest.files, GOLDEN: ""} == {**before.manifest.files, GOLDEN: ""}
    assert (after.path / GOLDEN).stat().st_size < 100_000


def test_the_same_bundle_gets_the_same_golden_vectors(proven: Bundle, tmp_path: Path) -> None:
    again = add_golden(write_tiny_bundle(tmp_path / "tiny"))
    assert (again.path / GOLDEN).read_bytes() == (proven.path / GOLDEN).read_bytes()


def test_made_cells_differ_in_length(proven: Bundle) -> None:
    golden = golden_of(proven)
    embedder = Embedder.from_bundle(proven, threads=1)
    assert golden.tokenize(embedder).lengths.tolist() == [1, 7, 64, 2048]
    assert golden.vectors[CELL_EMBEDDING].shape == (4, TINY_WIDTH)
    assert golden.tolerance == 1e-4


def test_what_is_read_is_what_was_written(proven: Bundle) -> None:
    text = (proven.path / GOLDEN).read_text()
    assert golden_of(proven).to_json(proven.vocabulary) == text


def test_an_intact_model_matches(proven: Bundle) -> None:
    result = check_golden(Embedder.from_bundle(proven, threads=1), golden_of(proven))
    result.require(proven.model_id)
    assert result.passed
    assert result.largest_difference <= 1e-5
    assert result.lowest_cosine == pytest.approx(1, abs=1e-9)
    assert (result.variant, result.provider, result.n_cells) == ("fp32", "CPUExecutionProvider", 4)


def test_other_weights_do_not(proven: Bundle, tmp_path: Path) -> None:
    bundle = rewritten(proven, tmp_path, **{"model.onnx": tiny_files(seed=1)["model.onnx"]})
    result = check_golden(Embedder.from_bundle(bundle, threads=1), golden_of(bundle))
    assert not result.passed
    with pytest.raises(GoldenMismatchError, match=rf"model {bundle.model_id} does not give.* lowest cosine") as raised:
        result.require(bundle.model_id)
    assert raised.value.field == "golden"


def test_one_number_that_is_off_is_found(proven: Bundle, tmp_path: Path) -> None:
    cells = json.loads((proven.path / GOLDEN).read_text())["cells"]
    cells[2]["vector"][3] += 3e-4
    bundle = spoilt(proven, tmp_path, cells=cells)
    result = check_golden(Embedder.from_bundle(bundle, threads=1), golden_of(bundle))
    assert not result.passed
    assert result.largest_difference == pytest.approx(3e-4, rel=0.05)
    assert "3e-04" in str(result).replace("0.0003", "3e-04")


def test_another_tokenizer_is_found_before_the_graph_runs(proven: Bundle) -> None:
    shorter = Bundle(proven.path, replace(proven.manifest, family_config={"max_length": 64}), proven.vocabulary)
    embedder = Embedder.from_bundle(shorter, threads=1)
    with pytest.raises(GoldenMismatchError, match=r"Golden cell 3 of .* has other tokens than at export"):
        check_golden(embedder, golden_of(proven))


def compare(golden: Golden, *, error: float, variant: str, provider: str) -> GoldenResult:
    """The result for vectors at a relative distance of `error`, at a right angle."""
    rng = np.random.default_rng(0)
    vectors = golden.vectors[CELL_EMBEDDING]
    aside = rng.standard_normal(vectors.shape)
    along = (aside * vectors).sum(axis=1) / (vectors**2).sum(axis=1)
    aside -= along[:, None] * vectors
    aside *= (np.linalg.norm(vectors, axis=1) / np.linalg.norm(aside, axis=1))[:, None]
    moved = {CELL_EMBEDDING: (vectors + error * aside).astype(np.float32)}
    outputs = Outputs((cell_embedding(TINY_WIDTH),), moved, np.arange(len(vectors) + 1))
    return golden.compare(outputs, variant=variant, provider=provider)


def test_an_accelerator_may_round_but_not_turn(proven: Bundle) -> None:
    golden = golden_of(proven)
    assert not compare(golden, error=0.005, variant="fp32", provider="CPUExecutionProvider").passed
    assert compare(golden, error=0.005, variant="fp32", provider=CUDA).passed
    assert not compare(golden, error=0.02, variant="fp32", provider=CUDA).passed


def test_a_variant_is_held_to_its_own_record(proven: Bundle) -> None:
    golden = replace(golden_of(proven), cosines={"int8": {CELL_EMBEDDING: 0.999}, "fp16": {CELL_EMBEDDING: 1.0}})
    assert compare(golden, error=0.05, variant="int8", provider=CUDA).passed
    assert not compare(golden, error=0.08, variant="int8", provider=CUDA).passed
    assert compare(golden, error=0.01, variant="fp16", provider=CUDA).passed
    assert not compare(golden, error=0.05, variant="fp16", provider=CUDA).passed


def test_real_cells_are_chosen_from_poor_to_rich(tmp_path: Path) -> None:
    files = {**tiny_files(), "model.onnx": masked_mean_graph(30_000, TINY_WIDTH)}
    bundle = Bundle.write(tmp_path / "tiny", tiny_manifest(), files)
    rng = np.random.default_rng(0)
    genes = [*bundle.vocabulary.gene_ids[:200], "NOT-A-GENE"]
    counts = np.zeros((9, 201), dtype=np.int64)
    for cell, row in enumerate(counts):
        row[rng.choice(200, size=20 * (cell + 1), replace=False)] = rng.integers(1, 9, size=20 * (cell + 1))
    counts[:, 200] = 5
    golden = golden_of(add_golden(bundle.path, cells=CountMatrix.from_matrix(counts, genes)))
    assert np.diff(golden.cells.counts.indptr).tolist() == [1, 7, 20, 100, 180]
    assert golden.cells.totals[2:].tolist() == counts[[0, 4, 8]].sum(axis=1).tolist()
    assert golden.source.startswith("3 real cells, and 2 short ones made")
    assert "NOT-A-GENE" not in golden.cells.gene_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "it has the format 3"),
        ({"cells": []}, "it has no cells"),
        ({"cells": [{}]}, "vector"),
        ({"tolerance": "wide"}, "could not convert"),
        ({"tolerance": 0}, "tolerance is out of range"),
        ({"cosines": {"int8": 3}}, "tolerance is out of range"),
        ({"cosines": None}, "NoneType"),
    ],
)
def test_a_file_that_cannot_be_read(proven: Bundle, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptBundleError, match=message):
        read_golden(spoilt(proven, tmp_path, **changes))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", [99_999], "not a row of the vocabulary"),
        ("rows", [-1], "not a row of the vocabulary"),
        ("rows", [], "not a row of the vocabulary"),
        ("counts", [-1], "cells that cannot be"),
        ("counts", [0.5], "cells that cannot be"),
        ("counts", [1, 2], "cells that cannot be"),
        ("vector", [1.0], "inhomogeneous|shape"),
        ("vector", [float("nan")] * TINY_WIDTH, "its values of cell_embedding have the shape"),
    ],
)
def test_a_cell_that_cannot_be(proven: Bundle, tmp_path: Path, field: str, value: Any, message: str) -> None:
    cells = json.loads((proven.path / GOLDEN).read_text())["cells"]
    cells[0][field] = value
    with pytest.raises(CorruptBundleError, match=message):
        read_golden(spoilt(proven, tmp_path, cells=cells))


def test_text_that_is_no_json(proven: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CorruptBundleError, match="cannot be read"):
        read_golden(rewritten(proven, tmp_path, **{GOLDEN: b"\xff{"}))
    (tmp_path / "two").mkdir()
    with pytest.raises(CorruptBundleError, match="JSONDecodeError"):
        read_golden(rewritten(proven, tmp_path / "two", **{GOLDEN: b"{"}))


def test_verify_says_the_numbers(proven: Bundle, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bundle", "verify", str(proven.path)])
    assert done.exit_code == 0
    assert "fp32 on CPUExecutionProvider: largest difference" in done.stdout
    assert "over 4 golden cells (at most 0.0001)" in done.stdout
    plain = CliRunner().invoke(app, ["bundle", "verify", str(write_tiny_bundle(tmp_path / "plain"))])
    assert plain.exit_code == 0
    assert "has no golden vectors" in plain.stderr


def test_verify_fails_on_a_mismatch(proven: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = rewritten(proven, tmp_path, **{"model.onnx": tiny_files(seed=1)["model.onnx"]})
    assert run(["bundle", "verify", str(bundle.path)]) == 2
    assert "Error [golden_mismatch]: The model tiny-0.1-" in capsys.readouterr().err


def test_the_command_adds_them(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "tiny")
    assert "none" in CliRunner().invoke(app, ["bundle", "info", str(path)]).stdout
    done = CliRunner().invoke(app, ["bundle", "golden", str(path), "--seed", "3"])
    assert done.exit_code == 0
    assert "4 golden cells (made of random genes and counts (seed 3)) for tiny-0.1-" in done.stdout
    assert (
        "4 cells: made of random genes and counts (seed 3)"
        in CliRunner().invoke(app, ["bundle", "info", str(path)]).stdout
    )


# Models with several outputs


@pytest.fixture(scope="module")
def versatile(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with outputs per token and classes, a second graph that is a little off, and golden vectors."""
    folder = tmp_path_factory.mktemp("outputs")
    plain = Bundle.open(write_outputs_bundle(folder / "plain"))
    graph = onnx.load(plain.graph())
    table = next(item for item in graph.graph.initializer if item.name == "table")
    rounded = numpy_helper.to_array(table).astype(np.float16).astype(np.float32)
    table.CopyFrom(numpy_helper.from_array(rounded, "table"))
    files: dict[str, Path | bytes] = {name: plain.path / name for name in plain.manifest.files}
    variants = {**plain.manifest.variants, "fp16": Variant(file="model.fp16.onnx", cosine=0.999)}
    manifest = replace(plain.manifest, variants=variants)
    bundle = Bundle.write(folder / "both", manifest, files | {"model.fp16.onnx": graph.SerializeToString()})
    return add_golden(bundle.path)


def test_golden_values_of_every_output(versatile: Bundle) -> None:
    text = (versatile.path / GOLDEN).read_text()
    assert json.loads(text)["format"] == 2
    golden = golden_of(versatile)
    assert golden.to_json(versatile.vocabulary) == text
    assert golden.outputs == tuple(spec.name for spec in TINY_OUTPUTS)
    assert {name: values.shape for name, values in golden.vectors.items()} == {
        "cell_embedding": (4, TINY_WIDTH),
        "gene_embedding": (12, TINY_WIDTH),  # of a cell the first and the last token, and the mean
        "gene_value": (12, 1),
        "cell_logits": (4, 3),
    }
    embedder = Embedder.from_bundle(versatile, threads=1)
    table = tiny_table(len(versatile.vocabulary))
    tokens = golden.tokenize(embedder)[2]["input_ids"]
    first, last, mean = golden.vectors["gene_embedding"][6:9]
    np.testing.assert_array_equal([first, last], table[tokens[[0, -1]]])
    np.testing.assert_allclose(mean, table[tokens].mean(axis=0), atol=1e-6)
    assert check_golden(embedder, golden).passed
    assert set(golden.cosines["fp16"]) == set(golden.outputs)
    assert 0.999 < golden.cosines["fp16"]["gene_embedding"] < 1
    assert check_golden(Embedder.from_bundle(versatile, variant="fp16", threads=1), golden).passed


@pytest.mark.parametrize("name", [spec.name for spec in TINY_OUTPUTS])
def test_an_output_that_is_off_is_found(versatile: Bundle, name: str) -> None:
    golden = golden_of(versatile)
    embedder = Embedder.from_bundle(versatile, threads=1)
    found = embedder.infer(golden.tokenize(embedder), golden.outputs)
    # The middle of the longest cell, which only a mean sees.
    row = -1 if name.startswith("cell") else int(found.offsets[3]) + 1000
    found.values[name][row] += 3e-4 * (1 if name.startswith("cell") else 2046)
    result = golden.compare(found, variant="fp32", provider="CPUExecutionProvider")
    assert not result.passed
    assert 2e-4 < result.largest_difference < 6e-4  # values of a gene are large, and rounded
    found.values[name][:] *= -1
    assert not golden.compare(found, variant="fp16", provider=CUDA).passed


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"gene_embedding": [[0.0] * TINY_WIDTH] * 2},
        {"gene_embedding": [[0.0] * 5] * 3},
        {"gene_value": [[float("inf")]] * 3},
        {"cell_logits": [["a", "b", "c"]]},
        {"unheard_of": [[0.0]]},
    ],
    ids=str,
)
def test_golden_outputs_that_cannot_be(versatile: Bundle, tmp_path: Path, outputs: dict[str, Any]) -> None:
    cells = json.loads((versatile.path / GOLDEN).read_text())["cells"]
    cells[0]["outputs"] = outputs if "unheard_of" in outputs else {**cells[0]["outputs"], **outputs}
    if not outputs:
        del cells[1]["outputs"]["gene_value"]
    with pytest.raises(CorruptBundleError, match=r"golden\.json cannot be read \((KeyError|ValueError)"):
        read_golden(spoilt(versatile, tmp_path, cells=cells))
