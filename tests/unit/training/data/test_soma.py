"""Corpora from a SOMA store that the tests write, and corpora that were interrupted."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import yaml
from scipy import sparse

from perturbscope.errors import (
    InvalidParameterError,
    MalformedMatrixError,
    MissingColumnError,
    ServerUnreachableError,
    UnreadableFileError,
)
from tests.soma_store import write_store
from tests.training_data import VOCABULARY, data_set, write_vocabulary
from training.commands import census as census_command
from training.commands import corpus as corpus_command
from training.config.stages import CorpusConfig, SomaConfig, SourceConfig
from training.data import corpus as corpus_module
from training.data import soma
from training.data.corpus import build_corpus
from training.data.medians import corpus_medians
from training.data.shards import Corpus
from training.data.soma import SomaSource

N = 130


def labels() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "disease": rng.choice(["normal", "lung adenocarcinoma", "influenza"], N, p=[0.6, 0.2, 0.2]),
        "is_primary_data": rng.random(N) < 0.8,
        "cell_type": rng.choice(["T cell", "B cell"], N),
        "raw_sum": np.full(N, 1e5),
    }


@pytest.fixture
def counts() -> np.ndarray:
    found = data_set().X.toarray().astype(np.float32)
    found[7] = 0  # a cell without counts
    found[[20, 21, 90], 3] = 1.5  # cells whose counts are not raw
    found[33, 4:] = 0  # few genes
    return found


@pytest.fixture
def store(tmp_path: Path, counts: np.ndarray) -> Path:
    return write_store(tmp_path / "soma", counts, VOCABULARY.gene_ids, labels())


@pytest.fixture
def config(tmp_path: Path, store: Path) -> CorpusConfig:
    return CorpusConfig(
        path=str(tmp_path / "corpus"),
        sources=(SourceConfig(path=str(store), name="census", soma=SomaConfig()),),
        vocabulary=str(write_vocabulary(tmp_path / "genes.tsv")),
        max_length=40,
        min_genes=8,
        chunk_cells=16,
    )


def digest(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*.npy"))
    }


def test_a_store_gives_the_corpus_of_the_same_cells_in_a_file(
    config: CorpusConfig, counts: np.ndarray, tmp_path: Path
) -> None:
    found = build_corpus(config)
    (facts,) = found.manifest["sources"]
    obs = labels()
    primary = np.asarray(obs["is_primary_data"])
    healthy = primary & (obs["disease"] != "lung adenocarcinoma")
    raw = np.ones(N, dtype=bool)
    raw[[20, 21, 90]] = False
    assert facts["dropped"] == {
        "not_primary": int((~primary).sum()),
        "cancer": int((primary & ~healthy).sum()),
        "not_raw_counts": int((healthy & ~raw).sum()),
        "empty": int(healthy[7]),
        "below_min_genes": int(healthy[33]),
    } | {key: value for key, value in facts["dropped"].items() if value == 0}
    assert facts["kept"] + sum(facts["dropped"].values()) == facts["cells"] == N

    counts[~raw] = 0
    adata = anndata.AnnData(X=sparse.csr_matrix(counts.astype(np.int32)))
    for name, values in obs.items():
        adata.obs[name] = values
    adata.var_names = list(VOCABULARY.gene_ids)
    adata.write_h5ad(tmp_path / "same.h5ad")
    file = SourceConfig(path=str(tmp_path / "same.h5ad"))
    same = build_corpus(replace(config, path=str(tmp_path / "other"), sources=(file,)))
    assert digest(found.path) == digest(same.path)
    assert found.labels("cell_type").tolist() == same.labels("cell_type").tolist()


def test_join_ids_need_not_be_without_gaps(counts: np.ndarray, tmp_path: Path, config: CorpusConfig) -> None:
    whole = build_corpus(config)
    ids = np.arange(N) * 3 + 5
    gaps = write_store(
        tmp_path / "gaps", counts, VOCABULARY.gene_ids, labels(), ids=ids, gene_ids=np.arange(60) * 2 + 1
    )
    source = replace(config.sources[0], path=str(gaps))
    found = build_corpus(replace(config, path=str(tmp_path / "other"), sources=(source,)))
    assert digest(found.path) == digest(whole.path)


def test_medians_of_a_store_are_those_of_its_counts(config: CorpusConfig, counts: np.ndarray) -> None:
    found = corpus_medians(config, min_cells=1)
    with SomaSource(config.sources[0]) as cells:
        assert cells.rows(0, 2).counts.toarray().tolist() == counts[:2].tolist()
        keep = build_corpus(config).per_cell("row")
    scaled = counts[keep] / counts[keep].sum(axis=1, keepdims=True) * 10_000
    column = scaled[:, VOCABULARY.row(found.gene_ids[0])]
    assert found.medians[0] == pytest.approx(np.median(column[column > 0]), rel=1e-6)


def test_totals_and_labels_are_read_from_obs(config: CorpusConfig) -> None:
    source = replace(config.sources[0], total_counts_key="raw_sum")
    with SomaSource(source, chunk_cells=50) as cells:
        ((rows, chunk),) = cells.usable(np.array([2, 7, 20, 40]))
        assert rows.tolist() == [2, 40]
        assert chunk.totals.tolist() == [1e5, 1e5]
        assert (cells.n_not_raw(0, N), cells.n_not_raw(0, 20)) == (1, 0)
        assert cells.columns == ["disease", "is_primary_data", "cell_type", "raw_sum"]
        assert cells.labels("disease").tolist() == labels()["disease"].tolist()
        assert cells.cell_ids[3] == "3"
        assert cells.representations == []
        assert list(cells.usable(np.array([7]))) == []


@pytest.mark.parametrize("interrupted_after", [1, 3, 6])
@pytest.mark.parametrize("kind", ["store", "file"])
def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(
    config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_after: int, kind: str
) -> None:
    first = config.sources[0]
    if kind == "file":
        adata = data_set()
        adata.obs["is_primary_data"] = np.arange(N) % 7 != 0
        some = np.ones((N, 1), dtype=np.int32)
        some[[5, 6, 40]] = 0
        adata.X = sparse.csr_matrix(adata.X.toarray() * some)
        adata.write_h5ad(tmp_path / "a.h5ad")
        first = SourceConfig(path=str(tmp_path / "a.h5ad"))
    config = replace(config, sources=(first, replace(first, name="again")), shard_tokens=900)
    whole = build_corpus(replace(config, path=str(tmp_path / "whole")))
    assert len(whole.manifest["shards"]) > 4
    real, seen = corpus_module.chunks, 0

    def failing(*arguments: Any) -> Any:
        nonlocal seen
        for item in real(*arguments):
            seen += 1
            if seen > interrupted_after:
                raise ServerUnreachableError("gone")
            yield item

    monkeypatch.setattr(corpus_module, "chunks", failing)
    runs = 0
    while True:
        runs += 1
        try:
            found = build_corpus(config)
            break
        except ServerUnreachableError:
            assert not Path(config.path).exists()
            seen, interrupted_after = 0, interrupted_after + 3
    assert runs > 1
    assert digest(found.path) == digest(whole.path)
    plain = ("sources", "labels", "tokens", "cells", "length_quantiles", "fingerprint", "shards")
    assert [found.manifest[key] for key in plain] == [whole.manifest[key] for key in plain]
    assert not list(tmp_path.glob(".corpus*"))
    assert not (found.path / "resume.json").exists()


def test_what_an_interruption_left_of_another_configuration_is_not_used(
    config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, shard_tokens=900)
    real = corpus_module.chunks

    def failing(*arguments: Any) -> Any:
        for number, item in enumerate(real(*arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(corpus_module, "chunks", failing)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config)
    assert (tmp_path / ".corpus.partial" / "resume.json").exists()
    monkeypatch.undo()
    shorter = replace(config, max_length=20)
    assert digest(build_corpus(shorter).path) == digest(build_corpus(replace(shorter, path=str(tmp_path / "b"))).path)


def test_two_builds_of_one_corpus_at_a_time_are_refused(config: CorpusConfig, tmp_path: Path) -> None:
    def nested(*_: Any) -> None:
        with pytest.raises(InvalidParameterError, match="Another process"):
            build_corpus(config)

    assert len(build_corpus(config, progress=nested)) > 0


def test_a_changed_store_is_another_source_and_a_published_one_is_known_by_its_address(
    config: CorpusConfig, counts: np.ndarray, tmp_path: Path
) -> None:
    counts[0, :] += 1
    write_store(tmp_path / "changed", counts, VOCABULARY.gene_ids, labels())
    (source,) = config.sources
    assert soma.soma_identity(source) == soma.soma_identity(source)
    assert soma.soma_identity(source) != soma.soma_identity(replace(source, path=str(tmp_path / "changed")))
    public = replace(source, path="s3://nowhere/2023-07-25/soma/")
    assert soma.soma_identity(public) == soma.soma_identity(replace(public, path="s3://nowhere/2023-07-25/soma"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "none"}, UnreadableFileError, "none cannot be opened as a SOMA store"),
        ({"soma": SomaConfig(experiment="census_data/mus_musculus")}, UnreadableFileError, "it has homo_sapiens"),
        ({"soma": SomaConfig(experiment="census_data")}, UnreadableFileError, "is a Collection, not an experiment"),
        ({"soma": SomaConfig(measurement="ATAC")}, UnreadableFileError, "no 'ATAC' there; it has RNA"),
        ({"layer": "normalized"}, MissingColumnError, "no matrix 'normalized'; there are: 'raw'"),
        ({"gene_key": "feature"}, MissingColumnError, "Did you mean 'feature_id'"),
        ({"total_counts_key": "rawsum"}, MissingColumnError, "Did you mean 'raw_sum'"),
        ({"select": {"tissue": ("lung",)}}, MissingColumnError, "no column of obs 'tissue'"),
    ],
    ids=["store", "experiment", "collection", "measurement", "layer", "genes", "totals", "select"],
)
def test_what_is_not_there_is_named(
    config: CorpusConfig, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_corpus(replace(config, sources=(replace(config.sources[0], **change),)))


def test_a_count_of_an_unknown_gene_is_damage(config: CorpusConfig, tmp_path: Path) -> None:
    with SomaSource(config.sources[0]) as cells:
        rows = soma.SomaRows(cells._soma_rows._array, np.arange(N), np.arange(0, 60, 2))
        with pytest.raises(MalformedMatrixError, match="var does not have"):
            rows.rows(0, 3)


def test_a_lost_connection_is_not_bad_input() -> None:
    with pytest.raises(ServerUnreachableError, match="Run the same command again"), soma._reading("s3://a/b"):
        raise RuntimeError("S3: timeout")
    with pytest.raises(UnreadableFileError, match="timeout"), soma._reading("a/b"):
        raise RuntimeError("timeout")


def test_without_tiledbsoma_the_package_is_named(config: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    with pytest.raises(InvalidParameterError, match=r"requirements/census\.txt"):
        build_corpus(config)


def test_the_command_shows_what_the_filters_keep(
    config: CorpusConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "corpus": {
            "path": config.path,
            "vocabulary": config.vocabulary,
            "sources": [{"path": config.sources[0].path, "name": "census", "soma": {}}],
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert census_command.main([str(tmp_path / "config.yaml")]) == 0
    shown = capsys.readouterr().err
    n_cancer = int((labels()["disease"] == "lung adenocarcinoma").sum())
    assert re.search(rf"lung adenocarcinoma\W+{n_cancer}\W+0\W", shown)
    assert "130 cells" in shown
    assert not Path(config.path).exists()
    arguments = [str(tmp_path / "config.yaml"), "--set", "corpus.min_genes=8", "--set", "corpus.max_length=40"]
    assert corpus_command.main(arguments) == 0
    assert len(Corpus(config.path)) > 60
