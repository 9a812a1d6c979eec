"""Outputs beside the cell embedding from the command line: in obsm, obs and Arrow files, or nowhere at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from pyarrow import feather
from scipy import io, sparse

from perturbscope import model
from perturbscope.cli import embedding
from perturbscope.cli.app import run
from perturbscope.tasks import token_files
from tests.bundles import CLASSES, write_outputs_bundle
from tests.screens import make_screen

Run = Callable[..., tuple[int, str, str]]
VECTORS, VALUES, LOGITS = ("--output", "gene_embedding"), ("--output", "gene_value"), ("--output", "cell_logits")


@pytest.fixture
def folder(tmp_path: Path, outputs_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with in.h5ad; the tiny bundle with several outputs is the default."""
    make_screen().write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERTURBSCOPE_BUNDLE", str(outputs_bundle))
    return tmp_path


@pytest.fixture
def cli(folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    def invoke(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return invoke


def contents(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_each_output_has_its_place(cli: Run, folder: Path, outputs_bundle: Path) -> None:
    code, out, err = cli("embed", "in.h5ad", "out.h5ad", *LOGITS, *VECTORS, *VALUES, "--chunk-cells", 50)
    assert code == 0, err
    size, second, summary = out.splitlines()
    assert size.startswith("out.h5ad.gene_embedding.arrow: about ")
    assert "(123 cells x about 2" in size
    assert size.endswith(" tokens x (8 x 4 + 19 bytes))")
    assert second.startswith("out.h5ad.gene_value.arrow: about ")
    assert summary.endswith("-> out.h5ad, out.h5ad.gene_embedding.arrow, out.h5ad.gene_value.arrow")
    assert contents(folder) == [
        "in.h5ad",
        "out.h5ad",
        "out.h5ad.gene_embedding.arrow",
        "out.h5ad.gene_value.arrow",
    ]
    with model.load(outputs_bundle) as loaded:
        wanted = loaded.embeddings(ad.read_h5ad("in.h5ad"), outputs=["gene_embedding", "gene_value", "cell_logits"])
    found = ad.read_h5ad("out.h5ad")
    np.testing.assert_allclose(found.obsm["X_perturbscope"], wanted.values, atol=1e-6)
    np.testing.assert_allclose(found.obsm["perturbscope_cell_logits"], wanted.outputs["cell_logits"].values, atol=1e-6)
    names, probabilities = wanted.outputs["cell_logits"].classes()
    assert found.obs["perturbscope_class"].tolist() == names.tolist()
    assert found.obs["perturbscope_class"].cat.categories.tolist() == list(CLASSES)
    np.testing.assert_allclose(found.obs["perturbscope_class_probability"], probabilities, atol=1e-6)
    about = found.uns["perturbscope"]["outputs"]
    assert about["cell_logits"]["names"].tolist() == list(CLASSES)
    assert about["gene_value"]["file"] == "out.h5ad.gene_value.arrow"
    for name, width in (("gene_embedding", 8), ("gene_value", 1)):
        table = feather.read_table(f"out.h5ad.{name}.arrow", memory_map=True)
        assert table["cell_id"].to_pylist() == found.obs_names.tolist()
        for cell in (0, 60, 122):
            assert table["gene_ids"][cell].as_py() == wanted.outputs[name].genes_of(cell).tolist()
            values = table[name][cell].values.flatten().to_numpy().reshape(-1, width)
            np.testing.assert_array_equal(values, wanted.outputs[name].of_cell(cell))


def test_what_is_not_asked_for_changes_no_byte(cli: Run, folder: Path) -> None:
    assert cli("embed", "in.h5ad", "plain.h5ad")[0] == 0
    assert cli("embed", "in.h5ad", "named.h5ad", "--output", "cell_embedding")[0] == 0
    assert (folder / "plain.h5ad").read_bytes() == (folder / "named.h5ad").read_bytes()
    assert "outputs" not in ad.read_h5ad("plain.h5ad").uns["perturbscope"]
    assert cli("embed", "in.h5ad", "more.h5ad", *LOGITS)[0] == 0
    more, plain = ad.read_h5ad("more.h5ad"), ad.read_h5ad("plain.h5ad")
    assert (more.obsm["X_perturbscope"] == plain.obsm["X_perturbscope"]).all()


def test_outputs_of_an_earlier_run_do_not_stay(cli: Run, folder: Path) -> None:
    assert cli("embed", "in.h5ad", "first.h5ad", *LOGITS)[0] == 0
    assert cli("embed", "first.h5ad", "second.h5ad")[0] == 0
    found = ad.read_h5ad("second.h5ad")
    assert list(found.obsm) == ["X_pca", "X_perturbscope"]
    assert not [name for name in found.obs if name.startswith("perturbscope_class")]
    assert "outputs" not in found.uns["perturbscope"]
    assert cli("embed", "first.h5ad", "again.h5ad", *LOGITS)[0] == 0
    again, first = ad.read_h5ad("again.h5ad"), ad.read_h5ad("first.h5ad")
    assert list(again.obs) == list(first.obs)
    assert (again.obs["perturbscope_class"] == first.obs["perturbscope_class"]).all()
    # What only looks like ours is left alone.
    adata = ad.read_h5ad("in.h5ad")
    adata.obsm["perturbscope_cell_logits"] = np.ones((123, 2))
    adata.uns["perturbscope"] = 5
    adata.write_h5ad("in.h5ad")
    assert cli("embed", "in.h5ad", "third.h5ad")[0] == 0
    assert ad.read_h5ad("third.h5ad").obsm["perturbscope_cell_logits"].shape == (123, 2)


def test_other_formats_get_the_same(cli: Run, folder: Path) -> None:
    adata = ad.read_h5ad("in.h5ad")
    (folder / "mtx").mkdir()
    io.mmwrite(folder / "mtx" / "matrix.mtx", sparse.coo_matrix(adata.X.T.astype(int)))
    (folder / "mtx" / "genes.tsv").write_text("".join(f"{gene}\tsymbol\n" for gene in adata.var_names))
    (folder / "mtx" / "barcodes.tsv").write_text("".join(f"{cell}\n" for cell in adata.obs_names))
    assert cli("embed", "in.h5ad", "h5ad.h5ad", *LOGITS, *VECTORS)[0] == 0
    code, _, err = cli("embed", "mtx", "mtx.h5ad", *LOGITS, *VECTORS)
    assert code == 0, err
    one, other = ad.read_h5ad("h5ad.h5ad"), ad.read_h5ad("mtx.h5ad")
    assert (one.obsm["perturbscope_cell_logits"] == other.obsm["perturbscope_cell_logits"]).all()
    assert (one.obs["perturbscope_class"] == other.obs["perturbscope_class"]).all()
    arrows = [(folder / f"{name}.h5ad.gene_embedding.arrow").read_bytes() for name in ("h5ad", "mtx")]
    assert arrows[0] == arrows[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--output", "gene_logits"),
            "no output 'gene_logits'; it has cell_embedding, gene_embedding, gene_value, cell",
        ),
        ((*VECTORS, "--server", "http://localhost:9", "--wait", "0"), ""),
    ],
)
def test_what_the_model_does_not_have_is_one_line_and_no_file(
    cli: Run, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = cli("embed", "in.h5ad", "out.h5ad", *arguments)
    assert (code, out) == (2 if message else code, "")
    assert code
    assert err.startswith("Error [")
    assert err.count("\n") == 1
    assert message in err
    assert contents(folder) == ["in.h5ad"]


def test_a_disk_without_room_is_refused_before_anything_is_embedded(
    cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000}))
    code, out, err = cli("embed", "in.h5ad", "out.h5ad", *VECTORS)
    assert code == 2
    assert "about " in out
    assert "has 9.8 KiB free. Free some space" in err
    assert contents(folder) == ["in.h5ad"]


def test_chunks_are_small_where_their_values_are_large(cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    announce = embedding.announce

    def watched(source: object, *rest: object) -> None:
        sizes.append(source.chunk_cells)  # type: ignore[attr-defined]
        announce(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(embedding, "announce", watched)
    monkeypatch.setattr("perturbscope.tasks.backends.CHUNK_BYTES", 4 * 2048 * 9 * 30)
    assert cli("embed", "in.h5ad", "a.h5ad", *VECTORS, *VALUES)[0] == 0
    assert cli("embed", "in.h5ad", "b.h5ad", *VECTORS, "--chunk-cells", 100)[0] == 0
    assert sizes == [30, 100]


def test_several_classifications_are_told_apart(cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    import onnx

    from perturbscope.families.outputs import OutputSpec
    from perturbscope.inference.bundle import Bundle

    plain = Bundle.open(write_outputs_bundle(folder / "plain"))
    graph = onnx.load(plain.graph())
    graph.graph.node.append(onnx.helper.make_node("Neg", ["cell_logits"], ["mood_logits"]))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("mood_logits", 1, ["batch", 3]))
    mood = OutputSpec(name="mood_logits", per="cell", width=3, meaning="logits")
    manifest = replace(plain.manifest, outputs=(*plain.manifest.outputs, mood))
    files = {name: plain.path / name for name in plain.manifest.files} | {"model.onnx": graph.SerializeToString()}
    bundle = Bundle.write(folder / "two", manifest, files)
    assert cli("embed", "in.h5ad", "out.h5ad", "--bundle", bundle.path, *LOGITS, "--output", "mood_logits")[0] == 0
    obs, obsm = ad.read_h5ad("out.h5ad").obs, ad.read_h5ad("out.h5ad").obsm
    assert set(obs["perturbscope_class_cell_logits"]) <= set(CLASSES)
    assert set(obs["perturbscope_class_mood_logits"]) <= {"0", "1", "2"}
    assert (obsm["perturbscope_mood_logits"] == -obsm["perturbscope_cell_logits"]).all()
    assert "perturbscope_class" not in obs
    shutil.copy("out.h5ad", "in.h5ad")
    assert cli("embed", "in.h5ad", "plain.h5ad", "--bundle", bundle.path)[0] == 0
    assert not [name for name in ad.read_h5ad("plain.h5ad").obs if name.startswith("perturbscope_class")]
