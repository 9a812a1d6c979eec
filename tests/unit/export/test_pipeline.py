from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from export import ExportError, ParityError, files
from export.__main__ import app
from export.parity import random_cells
from export.pipeline import export_checkpoint
from export.variants import VARIANTS
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import BundleError, CorruptBundleError, InvalidParameterError
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import OnnxEncoder
from tests.models import TINY_MODEL, small_checkpoint, small_model, small_vocabulary
from tests.published import write_published
from training.checkpoint import save_checkpoint
from training.families.rank.model import build_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "bundle"


@pytest.fixture
def cells() -> CountMatrix:
    """Cells over the small vocabulary with 5 to 45 expressed genes."""
    rng = np.random.default_rng(0)
    counts = np.zeros((20, 60), dtype=np.int64)
    for row in counts:
        row[rng.choice(60, size=rng.integers(5, 46), replace=False)] = rng.integers(1, 9)
    return CountMatrix.from_matrix(counts, small_vocabulary().gene_ids)


def test_a_bundle_that_serves(checkpoint: Path, target: Path, cells: CountMatrix) -> None:
    stages: list[tuple[str, int, int]] = []
    bundle = export_checkpoint(
        checkpoint,
        target,
        name="tiny",
        version="1.0",
        variants=["fp16", "int8"],
        min_cosine=0.9,
        progress=lambda *step: stages.append(step),
    )
    manifest = Bundle.open(target).manifest
    assert bundle.manifest == manifest
    assert sorted(file.name for file in target.iterdir()) == [
        "MODEL_CARD.md",
        "golden.json",
        "manifest.json",
        "model.fp16.onnx",
        "model.int8.onnx",
        "model.onnx",
        "vocabulary.tsv",
    ]
    assert (manifest.family, manifest.family_config, manifest.width) == ("rank", {"max_length": 40}, 32)
    assert manifest.layer == "hidden_states[-2]"
    assert manifest.pooling == "mean over tokens, padding excluded"
    assert [spec.name for spec in manifest.outputs] == ["cell_embedding", "gene_embedding"]
    assert manifest.task == "embedding"
    assert manifest.capabilities == ("edit_tokens", "embed", "gene_embedding")
    assert manifest.licence == "Apache-2.0"
    assert manifest.training["data"] == "none"
    assert manifest.training["model_config"]["layers"] == 3

    parity = manifest.parity
    assert [(case["batch"], case["length"]) for case in parity["cases"]] == [(b, n) for n in (1, 7, 40) for b in (1, 3)]
    assert 0 <= parity["max_abs_difference"] <= parity["tolerance"] == 1e-4
    assert parity["lowest_cosine"] > 0.99999
    assert set(parity["outputs"]) == {"cell_embedding", "gene_embedding"}
    assert max(found["max_abs_difference"] for found in parity["outputs"].values()) == parity["max_abs_difference"]
    assert (parity["blocks_in_graph"], parity["blocks_of_model"]) == (2, 3)
    for name in ("fp16", "int8"):
        assert manifest.variants[name].cosine == parity["variants"][name]["lowest_cosine"]
        assert 0.9 < manifest.variants[name].cosine <= 1
        assert 0.9 < parity["variants"][name]["outputs"]["gene_embedding"]["lowest_cosine"] <= 1
    assert parity["variants"]["fp16"]["lowest_cosine"] > parity["variants"]["int8"]["lowest_cosine"]

    assert [done for _, done, _ in stages] == list(range(1, len(stages) + 1))
    assert {total for _, _, total in stages} == {len(stages)}

    fp32, int8 = (Embedder.from_bundle(bundle, variant=name, threads=1).embed(cells) for name in ("fp32", "int8"))
    assert fp32.values.shape == (20, 32)
    assert np.abs(fp32.values - int8.values).max() < 0.5


def test_variants_are_compared_on_given_cells(checkpoint: Path, target: Path, cells: CountMatrix) -> None:
    bundle = export_checkpoint(
        checkpoint, target, name="tiny", version="1", variants=["fp16"], cells=cells, min_cosine=0.9
    )
    compared = bundle.manifest.parity["compared_cells"]
    assert (compared["kind"], compared["n"]) == ("real cells", 20)
    assert 5 <= compared["shortest"] < compared["longest"] <= 40
    assert "real cells" in (target / "MODEL_CARD.md").read_text()


def test_the_same_checkpoint_gives_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    one, two = (export_checkpoint(checkpoint, tmp_path / name, name="t", version="1") for name in ("one", "two"))
    assert one.manifest.files == two.manifest.files
    assert one.model_id == two.model_id


def test_a_missed_tolerance_leaves_nothing(checkpoint: Path, target: Path) -> None:
    with pytest.raises(ParityError, match="tolerance"):
        export_checkpoint(checkpoint, target, name="tiny", version="1", tolerance=1e-12)
    assert list(target.parent.parent.iterdir()) == []


def test_a_variant_below_its_cosine_leaves_nothing(checkpoint: Path, target: Path) -> None:
    with pytest.raises(ParityError, match="int8"):
        export_checkpoint(checkpoint, target, name="tiny", version="1", variants=["int8"], min_cosine=0.9999999)
    assert list(target.parent.parent.iterdir()) == []


def test_an_existing_bundle_is_kept_unless_told(checkpoint: Path, target: Path) -> None:
    first = export_checkpoint(checkpoint, target, name="tiny", version="1", card="# first")
    with pytest.raises(BundleError, match="exists"):
        export_checkpoint(checkpoint, target, name="tiny", version="2")
    with pytest.raises(ParityError):
        export_checkpoint(checkpoint, target, name="tiny", version="2", tolerance=1e-12, overwrite=True)
    assert Bundle.open(target).manifest == first.manifest
    assert (target / "MODEL_CARD.md").read_text() == "# first"
    export_checkpoint(checkpoint, target, name="tiny", version="2", overwrite=True)
    assert Bundle.open(target).manifest.version == "2"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("name", {"name": "a/b"}),
        ("name", {"name": ""}),
        ("version", {"version": "1 0"}),
        ("tolerance", {"tolerance": 0.0}),
        ("tolerance", {"tolerance": float("nan")}),
        ("variant", {"variants": ["int4"]}),
        ("variant", {"variants": ["fp16", "fp16"]}),
    ],
)
def test_a_bad_option_is_named(checkpoint: Path, target: Path, field: str, options: dict[str, object]) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        export_checkpoint(checkpoint, target, **({"name": "tiny", "version": "1"} | options))
    assert caught.value.field == field


def test_a_tokenizer_longer_than_the_positions_is_refused(tmp_path: Path, target: Path) -> None:
    path = save_checkpoint(
        tmp_path / "c",
        model=small_model(),
        family="rank",
        family_config={"max_length": 41},
        model_config=TINY_MODEL,
        vocabulary=small_vocabulary(),
        provenance={},
    )
    with pytest.raises(ExportError, match="41 tokens, the model has 40 positions"):
        export_checkpoint(path, target, name="tiny", version="1")


def test_weights_of_a_large_graph_lie_beside_it(
    checkpoint: Path, target: Path, cells: CountMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is lowered, so that the tiny graph is a large one: its vectors and variants are the same."""
    small = export_checkpoint(checkpoint, target, name="tiny", version="1", variants=list(VARIANTS), min_cosine=0.9)
    monkeypatch.setattr(files, "EXTERNAL_FROM", 2**10)
    large = export_checkpoint(
        checkpoint, target.parent / "large", name="tiny", version="1", variants=list(VARIANTS), min_cosine=0.9
    )
    for name, variant in large.manifest.variants.items():
        assert variant.data == (f"{variant.file}.data",)
        assert variant.data[0] in large.manifest.files
        assert large.graph(name).stat().st_size < small.graph(name).stat().st_size
        assert abs(large.size(name) - small.size(name)) < 5_000  # each tensor begins at a multiple of 64 bytes
        vectors = [
            Embedder.from_bundle(bundle, variant=name, threads=1).embed(cells, outputs=["gene_embedding"])
            for bundle in (small, large)
        ]
        assert np.array_equal(vectors[0].values, vectors[1].values)
        genes = [found.outputs["gene_embedding"].values for found in vectors]
        assert np.array_equal(genes[0], genes[1])
    assert large.manifest.parity == small.manifest.parity
    assert (large.path / "golden.json").read_text() == (small.path / "golden.json").read_text()
    session = OnnxEncoder(large, threads=1)._session  # rewritten for the processor, and so given as bytes
    assert session._model_bytes is not None


def test_other_weights_outside_the_graph_make_another_model_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EXTERNAL_FROM", 2**10)
    made = []
    for number in range(2):
        model = small_model()
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[5] += number
        path = save_checkpoint(
            tmp_path / f"c{number}",
            model=model,
            family="rank",
            family_config={"max_length": 40},
            model_config=TINY_MODEL,
            vocabulary=small_vocabulary(),
            provenance={},
        )
        made.append(export_checkpoint(path, tmp_path / f"b{number}", name="t", version="1"))
    assert made[0].graph().read_bytes() == made[1].graph().read_bytes()
    assert made[0].model_id != made[1].model_id


@pytest.mark.parametrize(
    ("layer", "pooling", "named"),
    [
        (None, None, ("hidden_states[-2]", "mean over genes, special tokens and padding excluded")),
        ("last", "mean", ("hidden_states[-1]", "mean over genes, special tokens and padding excluded")),
        ("last", "cls", ("hidden_states[-1]", "state of the start token")),
    ],
)
def test_layer_and_pooling(tmp_path: Path, layer: str | None, pooling: str | None, named: tuple[str, str]) -> None:
    vocabulary = small_vocabulary(ends=True)
    torch.manual_seed(0)
    model: Any = build_model(TINY_MODEL, vocabulary).eval()
    path = save_checkpoint(
        tmp_path / "c",
        model=model,
        family="rank",
        family_config={"max_length": 40, "start": "<cls>", "end": "<eos>"},
        model_config=TINY_MODEL,
        vocabulary=vocabulary,
        provenance={},
    )
    bundle = export_checkpoint(path, tmp_path / "b", name="t", version="1", layer=layer, pooling=pooling)
    assert (bundle.manifest.layer, bundle.manifest.pooling) == named
    embedder = Embedder.from_bundle(bundle, threads=1)
    cells = random_cells(vocabulary, [9, 30], rng=np.random.default_rng(0))
    tokens = embedder.tokenize(cells)
    found = embedder.infer(tokens, ["gene_embedding"])
    for cell, ids in enumerate(tokens):
        with torch.inference_mode():
            states = model.bert(torch.from_numpy(ids["input_ids"][None].astype(np.int64)), output_hidden_states=True)
        state = states.hidden_states[-1 if layer == "last" else -2][0]
        expected = state[0] if pooling == "cls" else state[1:-1].mean(dim=0)
        np.testing.assert_allclose(found.cell_embedding[cell], expected, atol=1e-5)
        part = slice(tokens.offsets[cell], tokens.offsets[cell + 1])
        np.testing.assert_allclose(found["gene_embedding"][part], state, atol=1e-5)


def test_the_state_of_a_start_token_needs_one(checkpoint: Path, target: Path) -> None:
    with pytest.raises(InvalidParameterError, match="no start token"):
        export_checkpoint(checkpoint, target, name="t", version="1", pooling="cls")


def test_no_checkpoint(tmp_path: Path, target: Path) -> None:
    with pytest.raises(CorruptBundleError, match="not a checkpoint"):
        export_checkpoint(tmp_path, target, name="tiny", version="1")


class TestCommandLine:
    @staticmethod
    def run(*arguments: object):
        return CliRunner().invoke(app, [*map(str, arguments), "--name", "tiny", "--version", "1"])

    def test_writes_the_bundle_and_a_table(self, checkpoint: Path, target: Path, tmp_path: Path) -> None:
        (tmp_path / "card.md").write_text("# Tiny\n")
        result = self.run(checkpoint, target, "--variant", "fp16", "--card", tmp_path / "card.md", "--licence", "MIT")
        assert result.exit_code == 0, result.output
        assert "fp32 (to torch)" in result.stdout
        assert "fp16 (to fp32)" in result.stdout
        manifest = json.loads((target / "manifest.json").read_text())
        assert manifest["licence"] == "MIT"
        assert (target / "MODEL_CARD.md").read_text() == "# Tiny\n"

    def test_cells_of_a_file(self, target: Path, tmp_path: Path, data_dir: Path) -> None:
        genes = GeneVocabulary.geneformer_gc30m()
        path = save_checkpoint(
            tmp_path / "c",
            model=build_model(TINY_MODEL, genes),
            family="rank",
            family_config={"max_length": 40},
            model_config=TINY_MODEL,
            vocabulary=genes,
            provenance={},
        )
        options = ("--variant", "fp16", "--cells", data_dir / "pbmc3k_10x.h5ad", "--min-cosine", "0.9")
        result = self.run(path, target, *options)
        assert result.exit_code == 0, result.output
        compared = json.loads((target / "manifest.json").read_text())["parity"]["compared_cells"]
        assert compared == {"kind": "real cells", "n": 32, "shortest": 40, "longest": 40}

    def test_brackets_in_a_message_are_not_markup(self, tmp_path: Path, target: Path) -> None:
        result = self.run(tmp_path / "[bold]", target)
        assert result.exit_code == 1
        assert "[bold] is not a checkpoint" in result.stderr

    def test_a_missed_tolerance_exits_with_1(self, checkpoint: Path, target: Path) -> None:
        result = self.run(checkpoint, target, "--tolerance", "1e-12")
        assert result.exit_code == 1
        assert "error [parity_missed]: " in result.stderr
        assert "tolerance is 1e-12" in result.stderr
        assert not target.exists()

    def test_published_weights_are_to_be_adopted_first(self, target: Path, tmp_path: Path) -> None:
        directory, _ = write_published(tmp_path, "V1")
        result = self.run(directory, target)
        assert result.exit_code == 2
        (line,) = [line for line in result.stderr.splitlines() if "error" in line]
        assert f"adopt it first: python -m training adopt geneformer {directory} CHECKPOINT" in line
        assert not target.exists()

    def test_layer_and_pooling_are_in_the_manifest(self, checkpoint: Path, target: Path) -> None:
        assert self.run(checkpoint, target, "--layer", "last", "--pooling", "mean").exit_code == 0
        assert json.loads((target / "manifest.json").read_text())["layer"] == "hidden_states[-1]"

    def test_bad_usage_exits_with_2(self, checkpoint: Path, target: Path, tmp_path: Path) -> None:
        assert self.run(checkpoint, target, "--tolerance", "2").exit_code == 2
        assert self.run(checkpoint, target, "--variant", "int4").exit_code == 2
        assert self.run(checkpoint, target, "--layer", "first").exit_code == 2
        assert self.run(checkpoint, target, "--pooling", "cls").exit_code == 2
        assert self.run(checkpoint, target, "--card", tmp_path / "missing.md").exit_code == 2
        assert self.run(checkpoint, target, "--cells", tmp_path / "missing.h5ad").exit_code == 2
        assert not target.exists()
