"""The commands of docs/reproduction.md, in their order, at toy size: from a store to held-out cells."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import yaml

from tests.file_server import FileServer, serve
from tests.soma_store import write_store
from tests.training_data import VOCABULARY, contrastive_values, data_set, pretrain_values
from training.checkpoint import load_checkpoint
from training.commands import census, corpus, cost, download, finetune, prepare, pretrain
from training.commands.download import RemoteFile


def replogle(path: Path) -> bytes:
    """A file in the layout of the authors' published file."""
    made = data_set()
    labels = made.obs["perturbation"].astype(str).replace("control", "non-targeting")
    counts = made.X.toarray().astype(np.float32)
    obs = pd.DataFrame(
        {"gene": pd.Categorical(labels), "gem_group": 1, "UMI_count": counts.sum(axis=1) * 2}, index=made.obs_names
    )
    anndata.AnnData(X=counts, obs=obs, var=made.var).write_h5ad(path)
    return path.read_bytes()


def census_store(path: Path) -> Path:
    rng = np.random.default_rng(0)
    n = 130
    obs = {
        "disease": rng.choice(["normal", "breast cancer"], n, p=[0.8, 0.2]),
        "is_primary_data": rng.random(n) < 0.9,
        "cell_type": ["T cell"] * n,
    }
    return write_store(path, data_set(seed=1).X, VOCABULARY.gene_ids, obs)


def test_every_command_from_the_downloads_to_the_held_out_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given").mkdir()
    values: dict[str, Any] = pretrain_values(tmp_path, max_steps=6)
    store = census_store(tmp_path / "soma")
    values["corpus"] |= {
        "sources": [{"path": str(store), "name": "census", "soma": {}}],
        "min_genes": 8,
        "exclude_cancer": True,
        "labels": ["cell_type"],
    }
    first = str(tmp_path / "pretrain.yaml")
    Path(first).write_text(yaml.safe_dump(values))
    assert census.main([first]) == 0
    assert corpus.main([first]) == 0
    assert "breast cancer" in capsys.readouterr().err
    assert cost.main([first, "--hardware", "a10g", "--gpus", "4"]) == 0
    assert pretrain.main([first]) == 0
    assert cost.main([first, "--log", str(tmp_path / "pretrain" / "log.jsonl")]) == 0
    assert "median of 3 steps" in " ".join(capsys.readouterr().out.split())

    content = replogle(tmp_path / "given" / "published.h5ad")
    with serve(FileServer(files={"perturbed.h5ad": content}, cut_after=[2000])) as server:
        file = RemoteFile(
            name="published.h5ad",
            url=f"{server.url}/perturbed.h5ad",
            size=len(content),
            md5=hashlib.md5(content).hexdigest(),
        )
        monkeypatch.setattr(download, "FILES", {"replogle-k562-gwps": file})
        assert download.main(["replogle-k562-gwps", str(tmp_path / "data")]) == 0
        assert server.seen == [None, "bytes=2000-"]
    prepared = tmp_path / "data" / "k562.h5ad"
    assert prepare.main([str(tmp_path / "data" / "published.h5ad"), str(prepared)]) == 0

    values = contrastive_values(tmp_path, max_steps=6)
    values["corpus"]["sources"] = [{"path": str(prepared), "name": "k562", "total_counts_key": "total_counts"}]
    second = str(tmp_path / "contrastive.yaml")
    Path(second).write_text(yaml.safe_dump(values))
    assert corpus.main([second]) == 0
    assert finetune.main([second]) == 0
    assert cost.main([second, "--hardware", "t4"]) == 0

    made = load_checkpoint(tmp_path / "contrastive" / "checkpoint").provenance
    assert made["data"]["sources"][0]["name"] == "k562"
    (source,) = made["parent"]["data"]["sources"]
    assert (source["name"], source["path"]) == ("census", str(store))
    assert source["dropped"]["cancer"] > 0
    heldout = anndata.read_h5ad(tmp_path / "contrastive" / "heldout.h5ad")
    assert set(heldout.obs["perturbation"]) == {"control", "strong4", "weak"}
    assert json.loads(heldout.uns["heldout"])["total_counts_key"] == "total_counts"
