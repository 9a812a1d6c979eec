"""Fixtures that many tests share; all of them small, seeded and free of any network or accelerator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families import load_family
from perturbscope.inference.embedder import Embedder
from tests.bundles import TINY_WIDTH, write_outputs_bundle, write_tiny_bundle
from tests.fakes import FakeEncoder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data that the repository ships."""
    return Path(__file__).resolve().parent.parent / "data"


@pytest.fixture
def tiny_cells(rng: np.random.Generator) -> CountMatrix:
    """24 cells x 40 genes of the vocabulary; cells differ in depth and so in length."""
    vocabulary = GeneVocabulary.geneformer_gc30m()
    genes = [vocabulary.gene_ids[row] for row in rng.choice(len(vocabulary.gene_ids), size=40, replace=False)]
    depth = rng.uniform(0.2, 3.0, size=(24, 1))
    counts = rng.poisson(depth * rng.gamma(0.7, 1.5, size=40))
    counts[:, 0] += 1  # no cell is empty
    return CountMatrix.from_matrix(counts, genes)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle that is read-only by convention: copy it before changing a byte."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def outputs_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle with vectors of genes, a value a gene, and classes of cells; read-only by convention."""
    return write_outputs_bundle(tmp_path_factory.mktemp("bundles") / "tiny-outputs")


@pytest.fixture
def fake_embedder() -> Embedder:
    """The real tokenizer in front of a :class:`FakeEncoder`; reach it as ``fake_embedder.encoder``."""
    vocabulary = GeneVocabulary.geneformer_gc30m()
    return Embedder(
        load_family("rank", {}, vocabulary),
        FakeEncoder(TINY_WIDTH),
        model_id="fake-1.0-000000000000",
        vocabulary_hash=vocabulary.hash,
    )
