from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perturbscope.cells.readers import open_cells
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import InvalidParameterError
from tests.training_data import VOCABULARY, write_data_set
from training.commands import medians as command
from training.config import strict
from training.config.stages import CorpusConfig, SourceConfig
from training.data import medians
from training.data.medians import MedianSketch, corpus_medians, exact_medians


def test_exact_medians_equal_numpy(rng: np.random.Generator) -> None:
    genes = rng.integers(0, 5, 400)
    values = rng.gamma(1.0, 3.0, 400)
    found = exact_medians(genes, values, 6)
    expected = [np.median(values[genes == gene]) for gene in range(5)]
    np.testing.assert_allclose(found[:5], expected)
    assert np.isnan(found[5])


@pytest.mark.parametrize("n", [1, 2, 11, 5000])
def test_the_sketch_is_within_one_percent_whatever_the_parts(rng: np.random.Generator, n: int) -> None:
    genes = np.repeat(np.arange(8), n)
    values = rng.lognormal(rng.uniform(-3, 6, 8)[genes], 1.0)
    values = np.clip(values, 1e-3, 9e3)
    whole, parts = (MedianSketch(9) for _ in range(2))
    whole.add(genes, values)
    half = len(genes) // 2
    parts.add(genes[:half], values[:half])
    parts.add(genes[half:], values[half:])
    exact = exact_medians(genes, values, 9)
    np.testing.assert_allclose(whole.medians(), exact, rtol=0.01)
    np.testing.assert_array_equal(parts.medians(), whole.medians())
    assert whole.n_values.tolist() == [n] * 8 + [0]


def test_a_sketch_needs_an_accuracy() -> None:
    with pytest.raises(InvalidParameterError, match="between 0 and 1"):
        MedianSketch(3, accuracy=0.0)


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    write_data_set(tmp_path / "a.h5ad")
    sources = (SourceConfig(path=str(tmp_path / "a.h5ad")),)
    return CorpusConfig(path=str(tmp_path / "c"), sources=sources, min_genes=1, exclude_cancer=False, chunk_cells=16)


def test_a_corpus_gives_the_medians_of_counts_per_ten_thousand(config: CorpusConfig) -> None:
    found = corpus_medians(config, min_cells=1)
    with open_cells(config.sources[0].path) as source:
        cells = source.read()
    scaled = cells.counts.toarray() / cells.totals[:, None] * 10_000
    for gene, median in zip(found.gene_ids, found.medians.tolist(), strict=True):
        column = scaled[:, VOCABULARY.row(gene)]
        assert median == pytest.approx(np.median(column[column > 0]), rel=1e-6)
    sketched = corpus_medians(config, min_cells=1, exact=False)
    np.testing.assert_allclose(sketched.medians, found.medians, rtol=0.01)
    assert (found.tokens[0], found.special_tokens) == (2, {"<pad>": 0, "<mask>": 1})


def test_a_large_corpus_turns_to_the_sketch(config: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medians, "EXACT_VALUES", 1000)
    found = corpus_medians(config, min_cells=1)
    assert "within 0.5 %" in found.source
    np.testing.assert_allclose(found.medians, corpus_medians(config, min_cells=1, exact=True).medians, rtol=0.01)


def test_genes_can_be_chosen(config: CorpusConfig) -> None:
    some = VOCABULARY.gene_ids[3:6]
    assert corpus_medians(config, genes=some).gene_ids == some
    with pytest.raises(InvalidParameterError, match="No gene is expressed"):
        corpus_medians(config, genes=["ENSG99999999999"])


def test_the_command_writes_a_vocabulary(config: CorpusConfig, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"corpus": strict.plain(config)}))
    (tmp_path / "genes.txt").write_text("\n".join(VOCABULARY.gene_ids[:9]))
    out = tmp_path / "out.tsv"
    arguments = [str(tmp_path / "config.yaml"), str(out), "--genes", str(tmp_path / "genes.txt")]
    assert command.main(arguments) == 0
    assert GeneVocabulary.read(out).gene_ids == VOCABULARY.gene_ids[:9]
    assert command.main(arguments) == 2
    assert command.main([*arguments[:3], str(tmp_path / "none.txt"), "--overwrite"]) == 2
