from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import open_cells
from perturbscope.errors import CorruptBundleError, InvalidParameterError, NotRawCountsError, UnreadableFileError
from perturbscope.families import load_family
from tests.training_data import VOCABULARY, contrastive_values, data_set, write_data_set, write_vocabulary
from training.commands import corpus as command
from training.config.stages import CorpusConfig, SourceConfig
from training.data import corpus as module
from training.data.batches import by_length, padded
from training.data.corpus import build_corpus
from training.data.shards import Corpus


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    return CorpusConfig(
        path=str(tmp_path / "corpus"),
        sources=(SourceConfig(path=str(write_data_set(tmp_path / "a.h5ad"))),),
        vocabulary=str(write_vocabulary(tmp_path / "genes.tsv")),
        max_length=40,
        min_genes=1,
        exclude_cancer=False,
        chunk_cells=16,
    )


def tokens_of(corpus: Corpus) -> list[list[int]]:
    cells = corpus.cells(np.arange(len(corpus)))
    return [cell["input_ids"].tolist() for cell in cells]


def test_tokens_are_those_of_the_family_and_cells_remember_where_they_are_from(config: CorpusConfig) -> None:
    corpus = build_corpus(config)
    with open_cells(config.sources[0].path) as source:
        cells, obs = source.read(), source.obs
    expected = load_family("rank", {"max_length": 40}, VOCABULARY).tokenize(cells)
    assert tokens_of(corpus) == [cell["input_ids"].tolist() for cell in expected]
    assert corpus.lengths.tolist() == expected.lengths.tolist()
    assert corpus.per_cell("row").tolist() == list(range(len(cells)))
    assert corpus.per_cell("n_detected").tolist() == expected.n_detected.tolist()
    assert corpus.labels("perturbation").tolist() == obs["perturbation"].tolist()
    assert corpus.labels("cell_type").tolist() == [None] * len(cells)  # the file has none
    assert corpus.cells(np.array([5])).arrays["input_ids"].dtype == np.uint16


def test_a_corpus_of_several_shards_and_chunks_is_the_same(config: CorpusConfig, tmp_path: Path) -> None:
    whole = build_corpus(config)
    parts = build_corpus(replace(config, path=str(tmp_path / "parts"), shard_tokens=500, chunk_cells=7))
    assert len(parts.manifest["shards"]) > 3
    assert tokens_of(parts) == tokens_of(whole)
    assert parts.labels("batch").tolist() == whole.labels("batch").tolist()
    some = np.array([70, 3, 3, 128])
    assert [cell["input_ids"].tolist() for cell in parts.cells(some)] == [tokens_of(whole)[at] for at in some]


def test_dropped_cells_are_counted_by_reason(config: CorpusConfig, tmp_path: Path) -> None:
    adata = data_set()
    n = adata.n_obs
    adata.obs["is_primary_data"] = np.arange(n) % 10 != 0
    counts = adata.X.toarray()
    counts[1] = 0  # no counts at all
    counts[2, 5:] = 0  # few genes
    adata = anndata.AnnData(X=sparse.csr_matrix(counts), obs=adata.obs, var=adata.var)
    adata.write_h5ad(tmp_path / "b.h5ad")
    source = SourceConfig(path=str(tmp_path / "b.h5ad"), select={"batch": ("a",)}, max_cells=20)
    corpus = build_corpus(replace(config, sources=(source,), min_genes=8, exclude_cancer=True))
    (facts,) = corpus.manifest["sources"]
    obs = adata.obs
    selected = (obs["batch"] == "a").to_numpy()
    primary = selected & obs["is_primary_data"].to_numpy()
    healthy = primary & (obs["disease"] == "normal").to_numpy()
    assert facts["dropped"]["batch_not_selected"] == int((~selected).sum())
    assert facts["dropped"]["not_primary"] == int(selected.sum() - primary.sum())
    assert facts["dropped"]["cancer"] == int(primary.sum() - healthy.sum())
    assert facts["dropped"]["over_max_cells"] == int(healthy.sum()) - 20
    assert facts["kept"] + sum(facts["dropped"].values()) == facts["cells"] == n


def test_empty_cells_and_cells_with_few_genes_are_dropped(config: CorpusConfig, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(2.0, (40, 60)) + 1
    counts[[4, 5, 17]] = 0
    counts[9, 6:] = 0
    names = [*VOCABULARY.gene_ids[:50], *[f"other{at}" for at in range(10)]]
    counts[11, :50] = 0
    adata = anndata.AnnData(X=sparse.csr_matrix(counts.astype(np.float32)))
    adata.var_names = names
    adata.write_h5ad(tmp_path / "b.h5ad")
    corpus = build_corpus(replace(config, sources=(SourceConfig(path=str(tmp_path / "b.h5ad")),), min_genes=8))
    (facts,) = corpus.manifest["sources"]
    assert facts["dropped"] == {"below_min_genes": 1, "empty": 3, "no_known_gene": 1}
    assert sorted(set(range(40)) - set(corpus.per_cell("row").tolist())) == [4, 5, 9, 11, 17]


def test_min_genes_of_a_source_replaces_that_of_the_corpus(config: CorpusConfig) -> None:
    with pytest.raises(InvalidParameterError, match="No cell passes"):
        build_corpus(replace(config, min_genes=500))
    source = replace(config.sources[0], min_genes=2)
    assert len(build_corpus(replace(config, min_genes=500, sources=(source,)))) == 130


def test_the_manifest_names_files_and_vocabulary(config: CorpusConfig) -> None:
    manifest = build_corpus(config).manifest
    assert manifest["vocabulary_hash"] == VOCABULARY.hash
    assert len(manifest["sources"][0]["sha256"]) == 64
    assert manifest["cells"] == 130
    assert manifest["length_quantiles"]["max"] == 40


def test_an_existing_corpus_is_reused_and_another_one_refused(config: CorpusConfig) -> None:
    build_corpus(config)
    before = Path(config.path, "manifest.json").stat().st_mtime_ns
    build_corpus(replace(config, chunk_cells=50))
    assert Path(config.path, "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(InvalidParameterError, match="--overwrite"):
        build_corpus(replace(config, max_length=20))
    assert build_corpus(replace(config, max_length=20), overwrite=True).lengths.max() == 20


def test_what_only_fine_tuning_reads_makes_no_other_corpus(config: CorpusConfig) -> None:
    first = build_corpus(config)
    source = replace(config.sources[0], context_key="batch", control_fractions=(0.0, 0.0, 1.0), unlabelled=True)
    again = build_corpus(replace(config, sources=(source,)))
    assert again.manifest["fingerprint"] == first.manifest["fingerprint"]


def test_something_else_is_never_replaced(config: CorpusConfig) -> None:
    Path(config.path).mkdir()
    Path(config.path, "thesis.txt").write_text("precious")
    with pytest.raises(InvalidParameterError, match="is not a corpus"):
        build_corpus(config, overwrite=True)


def test_a_failure_leaves_nothing_behind(config: CorpusConfig, tmp_path: Path) -> None:
    adata = data_set()
    adata.X = adata.X.astype(np.float32) * 0.37
    adata.write_h5ad(tmp_path / "b.h5ad")
    sources = (*config.sources, SourceConfig(path=str(tmp_path / "b.h5ad")))
    with pytest.raises(NotRawCountsError, match=r"b\.h5ad: Raw counts are needed"):
        build_corpus(replace(config, sources=sources))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad", "genes.tsv"]


def test_missing_files_are_named(config: CorpusConfig) -> None:
    with pytest.raises(UnreadableFileError, match=r"none\.h5ad"):
        build_corpus(replace(config, sources=(SourceConfig(path="none.h5ad"),)))
    with pytest.raises(UnreadableFileError, match=r"none\.tsv"):
        build_corpus(replace(config, vocabulary="none.tsv"))


def test_two_sources_need_two_names(config: CorpusConfig) -> None:
    twice = (config.sources[0], config.sources[0])
    with pytest.raises(InvalidParameterError, match="Two sources have the name 'a'"):
        build_corpus(replace(config, sources=twice))
    named = (config.sources[0], replace(config.sources[0], name="again"))
    assert len(build_corpus(replace(config, sources=named))) == 260


def test_damage_is_found(config: CorpusConfig) -> None:
    path = build_corpus(config).path
    (path / "shard-00000" / "offsets.npy").unlink()
    with pytest.raises(CorruptBundleError, match="cannot be read"):
        Corpus(path)
    shutil.copy(path / "shard-00000" / "row.npy", path / "shard-00000" / "offsets.npy")
    with pytest.raises(CorruptBundleError, match="does not fit"):
        Corpus(path)
    (path / "vocabulary.tsv").write_text((path / "vocabulary.tsv").read_text().replace("\t1.0", "\t2.0"))
    with pytest.raises(CorruptBundleError, match="not the vocabulary"):
        Corpus(path)
    (path / "manifest.json").write_text("{}")
    with pytest.raises(CorruptBundleError, match="not the manifest"):
        Corpus(path)
    with pytest.raises(CorruptBundleError, match="is not a corpus"):
        Corpus(path.parent)


def test_unknown_labels_are_named(config: CorpusConfig) -> None:
    with pytest.raises(CorruptBundleError, match="keeps no label 'guide'"):
        build_corpus(config).labels("guide")


def test_batches_are_padded_to_their_longest_cell(config: CorpusConfig) -> None:
    corpus = build_corpus(config)
    numbers = np.array([3, 60, 7])
    batch = padded(corpus, numbers)
    assert batch["input_ids"].shape == (3, int(corpus.lengths[numbers].max()))
    assert batch["attention_mask"].sum(dim=1).tolist() == corpus.lengths[numbers].tolist()
    assert (batch["input_ids"] > 0).equal(batch["attention_mask"] > 0)
    wide = padded(corpus, np.array([int(corpus.lengths.argmin())]), multiple=16)
    assert wide["input_ids"].shape[1] % 16 == 0
    assert padded(corpus, numbers, multiple=64)["input_ids"].shape[1] == 40  # not beyond the model's positions
    cut = by_length(corpus, numbers, 2)
    assert [len(part) for part in cut] == [2, 1]


def test_the_command_builds_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    from tests.training_data import pretrain_values

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(pretrain_values(tmp_path)))
    assert command.main([str(tmp_path / "config.yaml")]) == 0
    assert "perturbed" in capsys.readouterr().err
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text())["cells"] == 130
    assert command.main([str(tmp_path / "config.yaml"), "--set", "corpus.max_lenght=3"]) == 2
    assert "Did you mean 'max_length'" in capsys.readouterr().err
    (tmp_path / "fine.yaml").write_text(yaml.safe_dump(contrastive_values(tmp_path)))
    assert command.main([str(tmp_path / "fine.yaml")]) == 1  # its checkpoint is not there yet
    assert "is not a checkpoint" in capsys.readouterr().err


def test_a_file_with_totals_is_tokenized_with_them(config: CorpusConfig, tmp_path: Path) -> None:
    adata = data_set()
    adata.obs["all"] = np.asarray(adata.X.sum(axis=1)).ravel() * 7
    adata.write_h5ad(tmp_path / "t.h5ad")
    source = SourceConfig(path=str(tmp_path / "t.h5ad"), total_counts_key="all")
    with module.open_source(source) as cells:
        read = cells.read()
    assert isinstance(read, CountMatrix)
    np.testing.assert_allclose(read.totals, adata.obs["all"])
    assert tokens_of(build_corpus(replace(config, sources=(source,)))) == tokens_of(
        build_corpus(replace(config, path=str(tmp_path / "without")))
    )
