"""``python -m training adopt``: a checkpoint that computes what transformers computes, or one clear line."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
import transformers
import yaml

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families import Family, load_family
from perturbscope.families.tokens import TokenizedCells, pad
from tests.published import NAMES, RETIRED, genes, write_dictionaries, write_published
from tests.training_data import contrastive_values, write_data_set
from training import families
from training.__main__ import main as training
from training.checkpoint import Checkpoint, load_checkpoint
from training.data.shards import Corpus

ARCHITECTURES = ("BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification")


def adopt(directory: Path, output: Path, *options: str | Path) -> int:
    return training(["adopt", "geneformer", str(directory), str(output), *map(str, options)])


def tokens_and_batch(
    checkpoint: Checkpoint, cells: CountMatrix
) -> tuple[Family, TokenizedCells, dict[str, torch.Tensor]]:
    family = load_family(checkpoint.family, checkpoint.family_config, checkpoint.vocabulary)
    tokens = family.tokenize(cells)
    padded = pad(tokens, np.arange(len(cells)), family.inputs)
    return family, tokens, {name: torch.from_numpy(array) for name, array in padded.items()}


def random_cells(vocabulary: GeneVocabulary, n_cells: int = 6) -> CountMatrix:
    generator = torch.Generator().manual_seed(0)
    shape = n_cells, min(len(vocabulary.gene_ids), 5000)
    counts = torch.poisson(torch.rand(shape, generator=generator) * 2, generator=generator).int()
    return CountMatrix.from_matrix(counts.numpy(), vocabulary.gene_ids[: shape[1]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("version", "width", "layers"), [("V1", 32, 2), ("V2", 32, 3), ("V2", 64, 2)])
def test_the_checkpoint_computes_what_transformers_computes(tmp_path, capsys, version, width, layers, architecture):
    options = {} if architecture == "BertForMaskedLM" else {"id2label": {0: "a", 1: "b", 2: "c"}}
    directory, published = write_published(
        tmp_path, version, architecture=architecture, width=width, layers=layers, **options
    )
    assert adopt(directory, tmp_path / "out", "--name", "gf", "--licence", "Apache-2.0") == 0
    ends = "<cls> and <eos> around each cell" if version == "V2" else "no special tokens around a cell"
    said = capsys.readouterr().err
    assert f"{architecture} of Geneformer {version}, {layers} layers of {width}, " in said
    assert ends in said

    checkpoint = load_checkpoint(tmp_path / "out")
    assert checkpoint.vocabulary.hash == genes(version).hash
    family, tokens, batch = tokens_and_batch(checkpoint, random_cells(checkpoint.vocabulary))
    ends_of_cells = {(int(cell["input_ids"][0]), int(cell["input_ids"][-1])) for cell in tokens}
    assert ends_of_cells == {(2, 3)} if version == "V2" else (2, 3) not in ends_of_cells
    assert int(tokens.lengths.max()) == family.max_length == 40
    adopted = checkpoint.model()
    assert type(adopted) is type(published)
    with torch.no_grad():
        found, wanted = (model(**batch, output_hidden_states=True) for model in (adopted, published))
    assert torch.equal(found.logits, wanted.logits)
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("version", "vocabulary"),
    [("V1", GeneVocabulary.geneformer_gc30m()), ("V2", GeneVocabulary.geneformer_gc95m())],
    ids=["V1", "V2"],
)
def test_the_real_dictionaries(tmp_path, version, vocabulary):
    """Both versions lie beside each other, as published; each gets its own."""
    positions = {"V1": 2048, "V2": 4096}
    other = "V2" if version == "V1" else "V1"
    write_dictionaries(tmp_path, other, genes(other))
    directory, published = write_published(
        tmp_path, version, vocabulary=vocabulary, width=16, layers=2, positions=positions[version]
    )
    assert adopt(directory, tmp_path / "out") == 0
    checkpoint = load_checkpoint(tmp_path / "out")
    assert checkpoint.vocabulary.hash == vocabulary.hash
    assert checkpoint.family_config["max_length"] == positions[version]
    adopted = checkpoint.model().state_dict()
    assert all(torch.equal(adopted[name], tensor) for name, tensor in published.state_dict().items())
    assert torch.equal(
        transformers.AutoModelForMaskedLM.from_pretrained(directory).cls.predictions.bias,
        adopted["cls.predictions.bias"],
    )


# Vectors


@pytest.fixture(scope="module")
def blood(data_dir: Path) -> CountMatrix:
    """Eight real cells of 400 to 1,100 genes."""
    cells = anndata.read_h5ad(data_dir / "pbmc3k_10x.h5ad")[:8]
    return CountMatrix.from_matrix(cells.X, cells.var_names)


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Checkpoint]]:
    """Directory and checkpoint of an architecture over the real genes of a version, made once."""
    real = {"V1": GeneVocabulary.geneformer_gc30m(), "V2": GeneVocabulary.geneformer_gc95m()}

    @functools.cache
    def made(version: str, architecture: str) -> tuple[Path, Checkpoint]:
        root = tmp_path_factory.mktemp("vectors")
        labels = {0: "a", 1: "b", 2: "c"}
        directory, _ = write_published(
            root, version, architecture=architecture, vocabulary=real[version], positions=2048, id2label=labels
        )
        assert adopt(directory, root / "out") == 0
        return directory, load_checkpoint(root / "out")

    return made


def published_vectors(
    hidden: tuple[torch.Tensor, ...], layer: str, pooling: str, tokens: TokenizedCells, n_special: int
) -> torch.Tensor:
    """The vectors of the published extractor: -1 names the last layer but one there, and 0 the last."""
    states = hidden[-2 if layer == "penultimate" else -1]
    if pooling == "cls":
        return states[:, 0]
    lengths = tokens.lengths.tolist()
    if n_special == 0:
        return torch.stack([cell[:length].mean(0) for cell, length in zip(states, lengths, strict=True)])
    return torch.stack([cell[1 : length - 1].mean(0) for cell, length in zip(states, lengths, strict=True)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", ["penultimate", "last"])
@pytest.mark.parametrize(("version", "pooling"), [("V1", "mean"), ("V2", "mean"), ("V2", "cls")])
def test_vectors_of_real_cells_are_those_of_transformers(blood, adopted, version, architecture, layer, pooling):
    directory, checkpoint = adopted(version, architecture)
    family, tokens, batch = tokens_and_batch(checkpoint, blood)
    half = families.load(checkpoint.family)
    config = half.parse_config({**checkpoint.model_config, "layer": layer, "pooling": pooling})
    spec = half.export_spec(config, family=family)
    model = checkpoint.model()
    theirs = getattr(transformers, architecture).from_pretrained(directory).eval()
    with torch.no_grad():
        found = dict(zip([output.name for output in spec.outputs], spec.module(model)(**batch), strict=True))
        trained = half.encoder(model, config, family=family)(**batch)
        # Scores of all genes at all tokens would be most of the work, and no output has them.
        network = theirs.base_model if architecture == "BertForMaskedLM" else theirs
        wanted = network(**batch, output_hidden_states=True)
    vectors = published_vectors(wanted.hidden_states, layer, pooling, tokens, 2 if version == "V2" else 0)
    differences = {"cell_embedding": found["cell_embedding"] - vectors, "encoder": trained - vectors}
    real = batch["attention_mask"].bool()
    states = wanted.hidden_states[-2 if layer == "penultimate" else -1]
    differences["gene_embedding"] = (found["gene_embedding"] - states)[real]
    if architecture == "BertForSequenceClassification":
        differences["cell_logits"] = found["cell_logits"] - wanted.logits
    elif architecture == "BertForTokenClassification":
        differences["gene_logits"] = (found["gene_logits"] - wanted.logits)[real]
    assert set(found) <= set(differences)
    for name, difference in differences.items():
        largest = float(difference.abs().max())
        assert largest <= 2e-6, name
    assert float(vectors.std(0).mean()) > 0.01


def test_the_embedding_is_chosen(tmp_path, capsys):
    directory, _ = write_published(tmp_path, "V2")
    assert adopt(directory, tmp_path / "out", "--layer", "last", "--pooling", "cls") == 0
    options = load_checkpoint(tmp_path / "out").model_config
    assert (options["layer"], options["pooling"]) == ("last", "cls")
    first, _ = write_published(tmp_path, "V1")
    capsys.readouterr()
    assert "Geneformer V1 has no <cls>" in refused(capsys, first, tmp_path / "first", "--pooling", "cls")


def test_the_provenance_says_where_the_weights_come_from(tmp_path):
    directory, _ = write_published(tmp_path, "V2", architecture=ARCHITECTURES[1])
    (tmp_path / "cells_id_class_dict.pkl").write_bytes(pickle.dumps({0: "healthy", 1: "ill"}))
    options = ("--licence", "Apache-2.0", "--classes", tmp_path / "cells_id_class_dict.pkl")
    assert adopt(directory, tmp_path / "out", *options) == 0
    checkpoint = load_checkpoint(tmp_path / "out")
    facts = checkpoint.provenance
    assert (facts["name"], facts["licence"], facts["task"]) == (NAMES["V2"], "Apache-2.0", "cell_classes")
    assert facts["classes"] == ["healthy", "ill"] == list(checkpoint.model_config["classes"])
    assert (facts["published"]["model"], facts["published"]["retired_ids"]) == ("Geneformer V2", 1)
    assert facts["published"]["architecture"] == "BertForSequenceClassification"
    assert facts["published"]["transformers_version"].startswith("5.")
    assert set(facts["published"]["files"]) == {
        "config.json", "model.safetensors", "token_dictionary_gc104M.pkl", "gene_median_dictionary_gc104M.pkl",
        "ensembl_mapping_dict_gc104M.pkl",
    }  # fmt: skip
    assert {len(digest) for digest in facts["published"]["files"].values()} == {64}
    assert checkpoint.vocabulary.row(RETIRED) == 0


def test_classes_without_names_and_a_missing_mapping_are_said(tmp_path, capsys):
    directory, _ = write_published(tmp_path, "V2", architecture=ARCHITECTURES[2])
    next(tmp_path.glob("geneformer/ensembl_mapping_dict*")).unlink()
    assert adopt(directory, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "mapping: none was found, so counts of retired Ensembl ids are not added to their successors" in said
    assert "classes: 2 without names; --classes gives them" in said


# Fine-tuning


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_adopted_weights_are_fine_tuned(tmp_path, version):
    """By the existing command; the cells are tokenized with the special tokens of the checkpoint."""
    directory, _ = write_published(tmp_path, version)
    assert adopt(directory, tmp_path / "adopted", "--licence", "Apache-2.0") == 0
    write_data_set(tmp_path / "perturbed.h5ad")
    values = contrastive_values(tmp_path, max_steps=6) | {"checkpoint": str(tmp_path / "adopted")}
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(values))
    assert training(["finetune", str(tmp_path / "finetune.yaml")]) == 0

    before, tuned = (load_checkpoint(tmp_path / name) for name in ("adopted", "contrastive/checkpoint"))
    assert tuned.vocabulary.hash == before.vocabulary.hash
    assert tuned.family_config == before.family_config
    assert tuned.provenance["parent"]["published"]["model"] == f"Geneformer {version}"
    cells = Corpus(tmp_path / "contrastive-corpus").cells(np.arange(20))
    ends = {(int(cell["input_ids"][0]), int(cell["input_ids"][-1])) for cell in cells}
    assert (ends == {(2, 3)}) == (version == "V2")
    assert cells.lengths.max() == 40
    changed = {name for name, tensor in tuned.weights.items() if not torch.equal(tensor, before.weights[name])}
    assert any("encoder.layer.1." in name for name in changed)
    assert not any("encoder.layer.2." in name or name.startswith("cls.") for name in changed)


# What is refused, in one line, with nothing written


def refused(capsys: pytest.CaptureFixture[str], directory: Path, output: Path, *options: str | Path) -> str:
    before = sorted(output.parent.iterdir())
    assert adopt(directory, output, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("error [")
    assert said.count("\n") == 1
    assert sorted(output.parent.iterdir()) == before
    return said


def test_dictionaries_of_another_version(tmp_path, capsys):
    directory, _ = write_published(tmp_path, "V2")
    other = write_dictionaries(tmp_path / "other", "V1", genes("V1"))
    said = refused(capsys, directory, tmp_path / "out", "--tokens", other / "token_dictionary_gc30M.pkl")
    assert "token_dictionary_gc30M.pkl has 62 token ids, but the weights" in said
    assert "have 64 token ids. Give the token dictionary of the same version" in said
    lacking = write_dictionaries(tmp_path / "less", "V2", genes("V2", 55)) / "gene_median_dictionary_gc104M.pkl"
    said = refused(capsys, directory, tmp_path / "out", "--medians", lacking)
    assert "has no median for 5 of the 60 genes" in said
    assert "(first: ENSG00000000055, ENSG00000000056, ENSG00000000057)" in said


def test_weights_of_the_first_version_with_as_many_tokens_as_the_second(tmp_path, capsys):
    """62 genes and two special tokens are 64 token ids, as 60 genes and four are: the dictionary tells them apart."""
    directory, _ = write_published(tmp_path, "V1", vocabulary=genes("V1", 62))
    write_dictionaries(tmp_path, "V2", genes("V2"))
    said = refused(capsys, directory, tmp_path / "out")
    assert "differ, and both have as many token ids as the weights" in said
    assert "Choose with --tokens" in said


def test_an_output_that_is_there(tmp_path, capsys):
    directory, _ = write_published(tmp_path, "V1")
    assert adopt(directory, tmp_path / "out") == 0
    capsys.readouterr()
    assert "out exists already. Give another directory, or --overwrite" in refused(capsys, directory, tmp_path / "out")
    assert adopt(directory, tmp_path / "out", "--overwrite", "--name", "again") == 0
    assert load_checkpoint(tmp_path / "out").provenance["name"] == "again"
    capsys.readouterr()
    assert "is not a checkpoint, so it is not replaced" in refused(
        capsys, directory, tmp_path / "geneformer", "--overwrite"
    )


def test_files_that_cannot_be(tmp_path, capsys):
    directory, _ = write_published(tmp_path, "V1")
    assert "is not a directory" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "code.pkl").write_bytes(b"cos\nsystem\n(S'touch MARK'\ntR.")
    said = refused(capsys, directory, tmp_path / "out", "--tokens", tmp_path / "code.pkl")
    assert "names os.system, so reading it could run code" in said
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["BertForNextSentencePrediction"]}))
    assert "is of a BertForNextSentencePrediction" in refused(capsys, directory, tmp_path / "out")
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert "lacks bert.encoder.layer.3." in refused(capsys, directory, tmp_path / "out")
    (directory / "config.json").write_text(json.dumps({**config, "hidden_act": "tanh"}))
    assert "activation is 'tanh'; it must be one of relu, gelu" in refused(capsys, directory, tmp_path / "out")


def test_classes_that_cannot_be(tmp_path, capsys):
    directory, _ = write_published(tmp_path, "V1", architecture=ARCHITECTURES[1], num_labels=3)
    classes = tmp_path / "classes.json"
    classes.write_text('{"0": "a", "1": "b"}')
    said = refused(capsys, directory, tmp_path / "out", "--classes", classes)
    assert "names 2 classes, but" in said
    classes.write_text('{"1": "a", "2": "b", "3": "c"}')
    assert "does not number 3 classes 0 to 2" in refused(capsys, directory, tmp_path / "out", "--classes", classes)
    masked, _ = write_published(tmp_path, "V1")
    assert "BertForMaskedLM has no classes" in refused(capsys, masked, tmp_path / "out", "--classes", classes)
