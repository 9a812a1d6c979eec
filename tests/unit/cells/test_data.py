"""The shipped data are the files that data/README.md describes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest

from perturbscope import open_cells
from perturbscope.inference.bundle import sha256
from perturbscope.tasks.trained_on import Fingerprint, find_seen
from training.data.splits import divide_controls

FACTS = {
    "pbmc3k_10x": {"shape": (2700, 16_634), "ensembl": 16_634, "cell_types": 8, "controls": 2700},
    "baron2016_pancreas": {"shape": (3607, 16_739), "ensembl": 16_595, "cell_types": 14, "controls": 3607},
    "kang2018_ifnb_pbmc": {"shape": (13_576, 14_005), "ensembl": 12_724, "cell_types": 8, "controls": 6359},
    "papalexi2021_eccite_thp1_panel": {"shape": (19_763, 303), "ensembl": 272, "cell_types": 1, "controls": 2304},
    "papalexi2021_heldout": {"shape": (2038, 303), "ensembl": 272, "cell_types": 1, "controls": 691},
    "datlinger_jurkat_cropseq": {"shape": (7500, 2000), "ensembl": 2000, "cell_types": 1, "controls": 200},
    "hill2018_cropseq_mcf10a_panel": {"shape": (4294, 26), "ensembl": 26, "cell_types": 1, "controls": 402},
}


@pytest.fixture(params=FACTS, ids=FACTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cells(name: str, data_dir: Path) -> anndata.AnnData:
    return anndata.read_h5ad(data_dir / f"{name}.h5ad")


def test_every_file_is_described(data_dir):
    assert {path.stem for path in data_dir.glob("*.h5ad")} == set(FACTS)


def test_the_checksums_of_the_readme(data_dir, name):
    text = (data_dir / "README.md").read_text()
    row = re.search(rf"^\| `{name}\.h5ad` \| ([\d,]+) \| `([0-9a-f]{{64}})` \|$", text, re.MULTILINE)
    assert row is not None
    path = data_dir / f"{name}.h5ad"
    assert path.stat().st_size == int(row[1].replace(",", ""))
    assert sha256(path) == row[2]


def test_the_numbers_of_the_readme(data_dir, name):
    n_cells, n_genes = FACTS[name]["shape"]
    row = next(line for line in (data_dir / "README.md").read_text().splitlines() if line.startswith(f"| `{name}"))
    assert f"| {n_cells:,} x {n_genes:,} | {FACTS[name]['ensembl']:,} |" in row


def test_shapes_and_labels(cells, name):
    facts = FACTS[name]
    assert cells.shape == facts["shape"]
    assert int(cells.var_names.str.startswith("ENSG").sum()) == facts["ensembl"]
    assert cells.obs["cell_type"].nunique() == facts["cell_types"]
    assert int((cells.obs["perturbation"] == "control").sum()) == facts["controls"]
    assert cells.var_names.is_unique
    assert cells.obs_names.is_unique
    assert list(cells.var.columns) == ["gene_symbol"]
    assert {"batch", "dataset", "perturbation"} <= set(cells.obs)
    assert {"accession", "citation", "licence"} <= set(cells.uns["source"])


def test_counts_are_raw(cells):
    assert cells.X.dtype in (np.uint8, np.uint16)
    assert cells.X.data.min() == 1
    assert cells.X.has_canonical_format
    assert (cells.X.getnnz(axis=1) > 0).all()


def test_panels_carry_the_total_of_the_full_transcriptome(cells, name):
    panel = name in {"papalexi2021_eccite_thp1_panel", "papalexi2021_heldout", "datlinger_jurkat_cropseq"}
    assert ("total_umi_full_transcriptome" in cells.obs) == panel
    if panel:
        total = cells.obs["total_umi_full_transcriptome"].to_numpy()
        assert total.dtype == np.int32
        assert (total >= cells.X.sum(axis=1).A1).all()


def test_rows_can_be_streamed(data_dir, name):
    """A reader that takes some rows decompresses little: chunks are small, and rows lie in order."""
    with h5py.File(data_dir / f"{name}.h5ad") as file:
        assert file["X"].attrs["encoding-type"] == "csr_matrix"
        for part in ("data", "indices"):
            assert file["X"][part].chunks[0] <= 65_536
            assert file["X"][part].compression == "gzip"


def test_screens(data_dir):
    papalexi = anndata.read_h5ad(data_dir / "papalexi2021_eccite_thp1_panel.h5ad")
    jurkat = anndata.read_h5ad(data_dir / "datlinger_jurkat_cropseq.h5ad")
    kang = anndata.read_h5ad(data_dir / "kang2018_ifnb_pbmc.h5ad")
    assert papalexi.obs["perturbation"].nunique() == 26
    assert papalexi.obs["guide"].nunique() == 106
    assert papalexi.obs["batch"].nunique() == 3
    assert jurkat.obs["perturbation"].nunique() == 21
    assert jurkat.obs["batch"].nunique() == 367
    assert (jurkat.obs.groupby("batch", observed=True)["guide"].nunique() == 1).all()
    assert set(jurkat.obs["stimulation"]) == {"stimulated", "unstimulated"}
    assert kang.obs.groupby("batch", observed=True)["perturbation"].nunique().tolist() == [1, 1]
    known = (kang.obs["donor"] != "unknown") & (kang.obs["perturbation"] == "control")
    assert int(known.sum()) == 6209


def test_a_perturbation_lowers_its_own_target(data_dir):
    """Labels and counts belong together: JAK2 and STAT1 are down in the cells whose guide hits them."""
    cells = anndata.read_h5ad(data_dir / "papalexi2021_eccite_thp1_panel.h5ad")
    rates = cells.X.multiply(1e4 / cells.obs["total_umi_full_transcriptome"].to_numpy()[:, None]).tocsc()
    for target in ("JAK2", "STAT1"):
        rate = rates[:, int(np.flatnonzero(cells.var["gene_symbol"] == target)[0])].toarray().ravel()
        hit, control = ((cells.obs["perturbation"] == label).to_numpy() for label in (target, "control"))
        assert rate[hit].mean() < 0.4 * rate[control].mean()


def test_the_first_example_has_no_cell_that_the_model_was_trained_on(data_dir):
    training = json.loads((data_dir.parent / "bundles/default/manifest.json").read_text())["training"]
    names = [source["name"] for source in training["data"]["sources"]]
    split, options = training["split"]["papalexi"], training["hyper_parameters"]["split"]
    whole = anndata.read_h5ad(data_dir / "papalexi2021_eccite_thp1_panel.h5ad")
    part = anndata.read_h5ad(data_dir / "papalexi2021_heldout.h5ad")
    labels = whole.obs["perturbation"].to_numpy(dtype=str)
    controls = divide_controls(
        np.flatnonzero(labels == "control"), names.index("papalexi"), options["control_fractions"], options["seed"]
    )
    sizes = part.obs["perturbation"].value_counts()
    assert set(sizes.index) == {"control", *split["targets"]["test"]}
    assert sizes.drop("control").max() == 100
    own = part.obs["perturbation"] == "control"
    assert set(part.obs_names[own]) == set(whole.obs_names[controls["test"]])
    same = whole[part.obs_names, part.var_names]
    assert (same.X != part.X).nnz == 0
    assert same.obs["perturbation"].tolist() == part.obs["perturbation"].tolist()
    with open_cells(data_dir / "papalexi2021_heldout.h5ad") as source:
        assert find_seen(training, Fingerprint.of(source)) is None
