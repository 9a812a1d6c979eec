"""Published weights, from a Hugging Face directory to vectors of a bundle, against transformers' own hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from export.pipeline import export_checkpoint
from perturbscope.cells.counts import CountMatrix
from perturbscope.inference.embedder import Embedder
from tests.published import RETIRED, genes, write_published
from training.commands.adopt import adopt

LABELS = {0: "resting", 1: "active", 2: "dying"}


@pytest.mark.parametrize("layer", ["penultimate", "last"])
@pytest.mark.parametrize(
    ("version", "architecture", "logits"),
    [
        ("V1", "BertForMaskedLM", None),
        ("V1", "BertForSequenceClassification", "cell_logits"),
        ("V2", "BertForMaskedLM", None),
        ("V2", "BertForSequenceClassification", "cell_logits"),
        ("V2", "BertForTokenClassification", "gene_logits"),
    ],
)
def test_a_bundle_gives_what_transformers_gives(
    tmp_path: Path, version: str, architecture: str, logits: str | None, layer: str
) -> None:
    """Counts in, vectors out: tokens, special tokens, layer, pooling and head are all those of the published model."""
    options = {"id2label": LABELS} if logits else {}
    directory, published = write_published(tmp_path, version, architecture=architecture, layers=3, **options)
    adopt(directory, tmp_path / "checkpoint", licence="Apache-2.0", options={"layer": layer})
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", name="gf", version="1")
    manifest = bundle.manifest
    assert manifest.licence == "Apache-2.0"
    assert manifest.training["published"]["model"] == f"Geneformer {version}"

    counts = np.random.default_rng(0).poisson(1.2, size=(9, 60))
    names = list(genes(version).gene_ids)
    if version == "V2":  # the id of the first gene is retired
        names[0] = RETIRED
    embedder = Embedder.from_bundle(bundle)
    tokens = embedder.tokenize(CountMatrix.from_matrix(counts, names))
    found = embedder.infer(tokens, outputs=[spec.name for spec in manifest.outputs])

    ends = 2 if version == "V2" else 0
    for cell, ids in enumerate(item["input_ids"].tolist() for item in tokens):
        expressed = set(np.flatnonzero(counts[cell]) + (4 if version == "V2" else 2))
        assert set(ids) <= expressed | {2, 3} if ends else set(ids) <= expressed
        assert (ids[0], ids[-1]) == (2, 3) if ends else True
        with torch.no_grad():
            wanted = published(torch.tensor([ids]), output_hidden_states=True)
        states = wanted.hidden_states[-2 if layer == "penultimate" else -1][0]
        inside = states[1:-1] if ends else states
        rows = slice(int(tokens.offsets[cell]), int(tokens.offsets[cell + 1]))
        np.testing.assert_allclose(found["cell_embedding"][cell], inside.mean(0).numpy(), atol=2e-5)
        np.testing.assert_allclose(found["gene_embedding"][rows], states.numpy(), atol=2e-5)
        if logits == "cell_logits":
            np.testing.assert_allclose(found[logits][cell], wanted.logits[0].numpy(), atol=2e-5)
        elif logits == "gene_logits":
            np.testing.assert_allclose(found[logits][rows], wanted.logits[0].numpy(), atol=2e-5)
    if logits:
        assert next(spec.names for spec in manifest.outputs if spec.name == logits) == tuple(LABELS.values())
