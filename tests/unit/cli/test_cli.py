from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import io, sparse

from perturbscope import client, model
from perturbscope.cells.files import METADATA_KEY
from perturbscope.cli import console
from perturbscope.cli.app import run
from perturbscope.errors import (
    BundleError,
    InvalidInputError,
    LimitExceededError,
    OverloadedError,
    ServerUnreachableError,
    UnknownModelError,
    UnsupportedOperationError,
    error_classes,
)
from perturbscope.scoring.results import COMPARE_COLUMNS, SCORE_COLUMNS
from tests.screens import make_screen

Run = Callable[..., tuple[int, str, str]]
LABELS = ["--perturbation-key", "perturbation", "--control", "control"]
FAST = ["--permutations", "30", "--set", "repeats=2"]


@pytest.fixture
def folder(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with in.h5ad; the tiny bundle is the default."""
    make_screen().write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERTURBSCOPE_BUNDLE", str(tiny_bundle))
    return tmp_path


@pytest.fixture
def cli(folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    def invoke(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return invoke


# --- embed -------------------------------------------------------------------------------------------------------


def test_embed_adds_to_a_copy_of_the_input(cli: Run, folder: Path, tiny_bundle: Path) -> None:
    before = (folder / "in.h5ad").read_bytes()
    code, out, err = cli("embed", "in.h5ad", "out.h5ad", "--seed", 1)
    assert code == 0, err
    assert "123 cells x 8 by tiny-0.1-" in out
    assert "Warning: 123 of 123 cells express fewer than 500 genes" in err
    assert (folder / "in.h5ad").read_bytes() == before
    assert sorted(item.name for item in folder.iterdir()) == ["in.h5ad", "out.h5ad"]
    given, found = ad.read_h5ad(folder / "in.h5ad"), ad.read_h5ad(folder / "out.h5ad")
    with model.load(tiny_bundle) as loaded:
        wanted = loaded.embeddings(given)
    assert found.obsm["X_perturbscope"].dtype == np.float32
    assert (found.obsm["X_perturbscope"] == wanted.values).all()
    assert (found.obs["perturbscope_known_share"] == wanted.known_share).all()
    assert (found.obs["perturbscope_n_genes"] == wanted.n_detected).all()
    provenance = found.uns["perturbscope"]
    assert provenance["model_id"] == wanted.model_id
    assert provenance["vocabulary_hash"] == wanted.vocabulary_hash
    assert provenance["version"]
    assert provenance["coverage"]["n_matched"] == 40
    # Everything else is as it was.
    assert (found.X != given.X).nnz == 0
    assert list(found.obs.columns)[:3] == list(given.obs.columns)
    pd.testing.assert_frame_equal(found.obs[given.obs.columns], given.obs)
    assert found.uns["kept"] == given.uns["kept"]
    assert list(found.layers) == list(given.layers)
    assert (found.obsm["X_pca"] == given.obsm["X_pca"]).all()


def test_embed_again_replaces_what_it_added(cli: Run, folder: Path) -> None:
    assert cli("embed", "in.h5ad", "once.h5ad")[0] == 0
    assert cli("embed", "once.h5ad", "twice.h5ad", "--gene-key", "ensembl")[0] == 0
    once, twice = ad.read_h5ad(folder / "once.h5ad"), ad.read_h5ad(folder / "twice.h5ad")
    assert list(twice.obs.columns) == list(once.obs.columns)
    assert (twice.obsm["X_perturbscope"] == once.obsm["X_perturbscope"]).all()
    assert twice.uns["perturbscope"]["options"] == {"gene_key": "ensembl"}


def test_embed_in_chunks_gives_the_same(cli: Run, folder: Path) -> None:
    assert cli("embed", "in.h5ad", "whole.h5ad")[0] == 0
    assert cli("embed", "in.h5ad", "parts.h5ad", "--chunk-cells", 10)[0] == 0
    whole, parts = (ad.read_h5ad(folder / name).obsm["X_perturbscope"] for name in ("whole.h5ad", "parts.h5ad"))
    np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_embed_of_other_formats_writes_anndata(cli: Run, folder: Path) -> None:
    adata = make_screen()
    (folder / "mtx").mkdir()
    io.mmwrite(folder / "plain.mtx", sparse.coo_matrix(adata.X.T.astype(int)))
    (folder / "mtx" / "matrix.mtx.gz").write_bytes(gzip.compress((folder / "plain.mtx").read_bytes()))
    (folder / "mtx" / "genes.tsv").write_text("".join(f"{gene}\tsymbol\n" for gene in adata.var_names))
    (folder / "mtx" / "barcodes.tsv").write_text("".join(f"{cell}\n" for cell in adata.obs_names))
    assert cli("embed", "in.h5ad", "wanted.h5ad")[0] == 0
    code, _, err = cli("embed", "mtx", "out.h5ad")
    assert code == 0, err
    wanted, found = ad.read_h5ad(folder / "wanted.h5ad"), ad.read_h5ad(folder / "out.h5ad")
    assert (found.obsm["X_perturbscope"] == wanted.obsm["X_perturbscope"]).all()
    assert isinstance(found.X, sparse.csr_matrix)
    assert (found.X != wanted.X).nnz == 0
    assert list(found.obs_names) == list(wanted.obs_names)
    assert list(found.var["gene_symbols"].unique()) == ["symbol"]


def test_embed_of_an_old_h5ad_keeps_its_labels(cli: Run, folder: Path) -> None:
    with h5py.File(folder / "in.h5ad", "r+") as file:
        names = [name.encode() for name in file["obs/_index"].asstr()[...]]
        obs = np.zeros(len(names), dtype=[("index", "S8"), ("depth", "f4")])
        obs["index"], obs["depth"] = names, np.arange(len(names))
        del file["obs"]
        file["obs"] = obs
    code, _, err = cli("embed", "in.h5ad", "out.h5ad")
    assert code == 0, err
    found = ad.read_h5ad(folder / "out.h5ad")
    assert found.obs["depth"].tolist() == list(range(123))
    assert found.obsm["X_perturbscope"].shape == (123, 8)


# --- score, compare ----------------------------------------------------------------------------------------------


def test_score_writes_parquet_with_provenance_and_shows_a_table(cli: Run, folder: Path) -> None:
    code, out, err = cli(
        *("score", "in.h5ad", "out.parquet", *LABELS, "--batch-key", "batch", *FAST),
        *("--metric", "e_distance", "--metric", "cosine_e_distance", "--metric", "wasserstein", "--seed", 5),
        *("--set", "wasserstein_permutations=10", "--set", "null_draws=10", "--set", "estimator=V"),
    )
    assert code == 0, err
    table = pd.read_parquet(folder / "out.parquet")
    assert tuple(table.columns) == SCORE_COLUMNS
    assert table["metric"].unique().tolist() == ["e_distance", "cosine_e_distance", "wasserstein"]
    provenance = json.loads(pq.read_schema(folder / "out.parquet").metadata[METADATA_KEY])
    assert provenance["seed"] == 5
    assert provenance["estimator"] == "V"
    assert provenance["model_id"].startswith("tiny")
    assert provenance["input"] == "in.h5ad"
    assert provenance["batch_key"] == "batch"
    lines = [line for line in out.splitlines() if "strong" in line or "weak" in line]
    assert "Scores: e_distance" in out
    assert "strong" in lines[0]
    assert "Warning: " in err
    assert "Traceback" not in err


def test_score_is_the_same_twice_and_from_stored_embeddings(cli: Run, folder: Path) -> None:
    assert cli("embed", "in.h5ad", "out.h5ad")[0] == 0
    for name, source, extra in (
        ("a.parquet", "in.h5ad", []),
        ("b.parquet", "in.h5ad", []),
        ("c.parquet", "out.h5ad", ["--use-rep", "X_perturbscope"]),
    ):
        assert cli("score", source, name, *LABELS, *FAST, *extra)[0] == 0
    a, b, c = (pd.read_parquet(folder / f"{name}.parquet") for name in "abc")
    pd.testing.assert_frame_equal(a, b)
    pd.testing.assert_frame_equal(a, c)
    assert (folder / "a.parquet").read_bytes() == (folder / "b.parquet").read_bytes()


def test_a_representation_needs_no_model(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERTURBSCOPE_BUNDLE")
    assert cli("score", "in.h5ad", "out.csv", *LABELS, *FAST, "--use-rep", "X_pca")[0] == 0
    assert cli("compare", "in.h5ad", "c.csv", *LABELS[:2], *FAST, "--use-rep", "X_pca")[0] == 0


def test_score_writes_csv_with_provenance_beside_it(cli: Run, folder: Path) -> None:
    assert cli("score", "in.h5ad", "out.csv", *LABELS, *FAST, "--top", 0)[:2] == (0, "")
    code, _, err = cli("score", "in.h5ad", "out.csv", *LABELS, *FAST, "--unit-key", "batch", "--batch-key", "batch")
    assert code != 0
    assert "units are the batches" in err
    assert cli("score", "in.h5ad", "units.csv", *LABELS, *FAST, "--unit-key", "batch")[0] == 0
    assert tuple(pd.read_csv(folder / "units.csv").columns) == (*SCORE_COLUMNS, "n_units", "z_unit", "p_unit", "q_unit")
    assert tuple(pd.read_csv(folder / "out.csv").columns) == SCORE_COLUMNS
    assert json.loads((folder / "out.csv.provenance.json").read_text())["control"] == "control"


def test_score_writes_a_report(cli: Run, folder: Path) -> None:
    code, _, err = cli("score", "in.h5ad", "out.parquet", *LABELS, *FAST, "--report", "out.html")
    assert code == 0, err
    page = (folder / "out.html").read_text()
    assert "strong" in page
    assert "Perturbations of in" in page


def test_compare_writes_all_pairs(cli: Run, folder: Path) -> None:
    code, out, err = cli("compare", "in.h5ad", "out.parquet", *LABELS[:2], *FAST)
    assert code == 0, err
    table = pd.read_parquet(folder / "out.parquet")
    assert tuple(table.columns) == COMPARE_COLUMNS
    assert len(table) == 6
    assert "Closest pairs: e_distance" in out


def test_labels_with_markup_are_shown_as_they_are(cli: Run, folder: Path) -> None:
    adata = make_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].cat.rename_categories({"strong": "[bold]x[/bold]"})
    adata.write_h5ad(folder / "in.h5ad")
    assert "[bold]x[/bold]" in cli("score", "in.h5ad", "out.csv", *LABELS, *FAST)[1]


def test_a_server_gives_the_same_answers_through_the_same_commands(
    cli: Run, folder: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def remote(address: str, *, model: str | None = None, **_: Any) -> Any:
        asked.append((address, model))
        return _backend(tiny_bundle)

    monkeypatch.setattr(client, "Client", remote)
    monkeypatch.setattr(client, "GrpcClient", remote)
    assert cli("score", "in.h5ad", "here.csv", *LABELS, *FAST)[0] == 0
    assert cli("score", "in.h5ad", "http.csv", *LABELS, *FAST, "--server", "http://host:3000")[0] == 0
    assert cli("score", "in.h5ad", "grpc.csv", *LABELS, *FAST, "--grpc", "host:3001", "--model", "tiny")[0] == 0
    assert asked == [("http://host:3000", None), ("grpc://host:3001", "tiny")]
    texts = {(folder / f"{name}.csv").read_text() for name in ("here", "http", "grpc")}
    assert len(texts) == 1
    assert cli("embed", "in.h5ad", "here.h5ad")[0] == 0
    assert cli("embed", "in.h5ad", "http.h5ad", "--server", "http://host:3000")[0] == 0
    assert (folder / "here.h5ad").read_bytes() == (folder / "http.h5ad").read_bytes()


def _backend(bundle: Path) -> Any:
    return model.load(bundle).backend


# --- bundle ------------------------------------------------------------------------------------------------------


def test_bundle_info_and_verify(cli: Run, tiny_bundle: Path) -> None:
    code, out, _ = cli("bundle", "info", tiny_bundle)
    assert code == 0
    assert "tiny-0.1-" in out
    assert "25424 genes" in out
    facts = dict(re.findall(r"^\W*([a-z]+(?: [a-z]+)?)\s+│?\s*(.*?)\s*│?$", out, flags=re.M))
    assert facts["outputs"] == "cell_embedding: 8 numbers per cell"
    assert (facts["task"], facts["capabilities"]) == ("embedding", "embed")
    assert facts["longest cell"].endswith(" tokens")
    assert facts["gene panel"] == "all of the vocabulary"
    assert re.fullmatch(r"fp32 \d+ MiB, estimated for batches of 4,096 tokens", facts["memory"])
    code, out, _ = cli("bundle", "info", tiny_bundle, "--json")
    assert json.loads(out)["width"] == 8
    code, out, _ = cli("bundle", "verify", tiny_bundle)
    assert code == 0
    assert "3 files and 1 graphs are in order" in out


# --- what goes wrong ---------------------------------------------------------------------------------------------


def changed_byte(folder: Path) -> None:
    content = bytearray((folder / "bundle" / "model.onnx").read_bytes())
    content[100] ^= 1
    (folder / "bundle" / "model.onnx").write_bytes(bytes(content))


def manifest_field(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "bundle" / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def truncated(folder: Path) -> None:
    path = folder / "in.h5ad"
    path.write_bytes(path.read_bytes()[:20_000])


def not_h5ad(folder: Path) -> None:
    (folder / "in.h5ad").write_text("cell,gene\n")


def rewritten(change: Callable[[ad.AnnData], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        adata = make_screen()
        change(adata)
        adata.write_h5ad(folder / "in.h5ad")

    return rewrite


def counts_at(row: int, column: slice, value: float) -> Callable[[Path], None]:
    def change(adata: ad.AnnData) -> None:
        dense = adata.X.toarray()
        dense[row, column] = value
        adata.X = dense

    return rewritten(change)


def ragged(folder: Path) -> None:
    with h5py.File(folder / "in.h5ad", "r+") as file:
        file["X/indptr"][5] = 0


SCORE = ["score", "in.h5ad", "out.parquet", *LABELS, *FAST]
EMBED = ["embed", "in.h5ad", "out.h5ad"]
WITH_BUNDLE = [*EMBED, "--bundle", "bundle"]
ALL = slice(None)
SECOND = slice(1, 2)

BAD = [
    (counts_at(50, SECOND, -3), EMBED, 2, "not_raw_counts", r"row 50 is negative"),
    (counts_at(51, SECOND, 1.5), EMBED, 2, "not_raw_counts", r"row 51 is fractional"),
    (counts_at(52, SECOND, np.nan), EMBED, 2, "not_raw_counts", r"row 52 is not a finite"),
    (None, [*EMBED, "--layer", "logged"], 2, "not_raw_counts", r"log-transformed.*layer='X'"),
    (counts_at(53, ALL, 0), EMBED, 2, "empty_cell", r"row 53"),
    (None, [*EMBED, "--gene-key", "symbol"], 2, "unknown_genes", r"None of the 40 genes.*gene_key"),
    (None, [*EMBED, "--gene-key", "one"], 2, "duplicate_genes", r"'A'"),
    (None, [*EMBED, "--gene-key", "symbl"], 2, "missing_column", r"there are: 'symbol'.*Did you mean 'symbol'"),
    (None, [*EMBED, "--layer", "log"], 2, "missing_column", r"'logged'"),
    (None, [*EMBED, "--total-counts-key", "Total"], 2, "missing_column", r"Did you mean 'total'"),
    (ragged, EMBED, 2, "malformed_matrix", r"ragged.*row 4"),
    (truncated, EMBED, 2, "unreadable_file", r"in\.h5ad cannot be read.*truncated"),
    (not_h5ad, EMBED, 2, "unreadable_file", r"not an HDF5 file"),
    (None, ["embed", "no.h5ad", "out.h5ad"], 2, "unreadable_file", r"no\.h5ad does not exist"),
    (None, ["embed", "in.h5ad", "out.txt"], 2, "invalid_parameter", r"must end in \.h5ad"),
    (None, ["embed", "in.h5ad", "nowhere/out.h5ad"], 2, "invalid_parameter", r"nowhere.* does not exist"),
    (None, ["embed", "in.h5ad", "in.h5ad"], 2, "invalid_parameter", r"is the input"),
    (None, [*SCORE, "--perturbation-key", "guide"], 2, "missing_column", r"'guide'; there are: 'perturbation'"),
    (None, [*SCORE, "--control", "ctrl"], 2, "control_label_missing", r"'ctrl'.*'control'"),
    (None, [*SCORE[:3], *LABELS[:-1], "rare"], 2, "too_few_controls", r"3 cells.*at least 20"),
    (None, [*SCORE, "--min-cells", "55"], 2, "too_few_cells", r"55 cells or more"),
    (None, [*SCORE, "--metric", "manhattan"], 2, "invalid_parameter", r"manhattan"),
    (None, [*SCORE, "--set", "estimator"], 2, "invalid_parameter", r"NAME=VALUE"),
    (None, [*SCORE, "--set", "draws=3"], 2, "invalid_parameter", r"Unknown option 'draws'"),
    (None, [*SCORE, "--use-rep", "X_umap"], 2, "missing_column", r"'X_pca'"),
    (
        rewritten(lambda a: a.obsm["X_pca"].fill(np.nan)),
        [*SCORE, "--use-rep", "X_pca"],
        2,
        "invalid_embedding",
        r"NaN|finite",
    ),
    (changed_byte, WITH_BUNDLE, 2, "corrupt_bundle", r"model\.onnx has the SHA-256"),
    (manifest_field("format_version", 99), WITH_BUNDLE, 2, "unsupported_bundle", r"format 99"),
    (manifest_field("family", "unheard_of"), WITH_BUNDLE, 2, "unsupported_bundle", r"unheard_of"),
    (manifest_field("vocabulary_hash", "0" * 64), WITH_BUNDLE, 2, "vocab_mismatch", r"000000000000"),
    (None, [*EMBED, "--bundle", "."], 2, "corrupt_bundle", r"has no manifest\.json"),
    (None, [*EMBED, "--variant", "int4"], 2, "bundle", r"'int4'; it has fp32"),
    (None, [*EMBED, "--device", "cuda"], 1, "provider_unavailable", r"'cuda'"),
    (None, [*EMBED, "--bundle", "a", "--server", "http://b"], 2, "invalid_parameter", r"exclude each other"),
    (None, [*EMBED, "--server", "localhost:3000"], 2, "invalid_parameter", r"did you mean http://localhost:3000"),
    (None, [*EMBED, "--model", "x"], 2, "invalid_parameter", r"a server's models"),
    (None, [*EMBED, "--nonsense"], 2, "usage", r"No such option: --nonsense"),
    (None, ["embed", "in.h5ad"], 2, "usage", r"OUT"),
    (None, ["score", "in.h5ad", "out.parquet"], 2, "usage", r"--perturbation-key"),
    (None, [*EMBED, "--device", "tpu"], 2, "usage", r"tpu"),
    (None, ["unknown"], 2, "usage", r"unknown"),
]


@pytest.mark.parametrize(
    ("damage", "arguments", "code", "name", "message"),
    BAD,
    ids=[f"{name}-{number}" for number, (_, _, _, name, _) in enumerate(BAD)],
)
def test_bad_input_gives_its_exit_code_and_one_line(
    cli: Run,
    folder: Path,
    tiny_bundle: Path,
    damage: Callable[[Path], None] | None,
    arguments: list[str],
    code: int,
    name: str,
    message: str,
) -> None:
    shutil.copytree(tiny_bundle, folder / "bundle")
    if damage:
        damage(folder)
    before = sorted(item.name for item in folder.rglob("*"))
    found, out, err = cli(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith(f"Error [{name}]: ")
    assert re.search(message, err), err
    assert len(err.splitlines()) == 1
    assert sorted(item.name for item in folder.rglob("*")) == before


def test_without_any_model_the_message_says_how_to_choose_one(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERTURBSCOPE_BUNDLE")
    code, _, err = cli(*EMBED)
    assert code == 2
    assert "--bundle DIR, --server URL or --grpc HOST:PORT, or set PERTURBSCOPE_BUNDLE" in err


def test_in_a_clone_the_default_bundle_is_used_and_named(
    cli: Run, folder: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERTURBSCOPE_BUNDLE", f"{tiny_bundle}:/elsewhere")  # as a server would take several
    code, out, err = cli(*EMBED)
    assert code == 0, err
    assert "Using" not in err
    model_id = out.split(" by ")[1].split(";")[0]
    monkeypatch.delenv("PERTURBSCOPE_BUNDLE")
    shutil.copytree(tiny_bundle, folder / "bundles" / "mine")
    (folder / "bundles" / "no bundle").mkdir()
    code, out, err = cli(*EMBED)
    assert (code, err.splitlines()[0]) == (0, f"Using bundles/mine ({model_id}).")
    shutil.copytree(tiny_bundle, folder / "bundles" / "yours")
    code, _, err = cli(*EMBED)
    assert code == 2
    assert "bundles/ here holds mine, yours, none of them called default. Give one: --bundle bundles/mine." in err
    shutil.copytree(tiny_bundle, folder / "bundles" / "default")
    code, out, err = cli("score", "in.h5ad", "out.csv", *LABELS, *FAST, "--top", 0)
    assert (code, out, err.splitlines()[0]) == (0, "", f"Using bundles/default ({model_id}).")
    assert "Using" not in cli(*EMBED, "--bundle", "bundles/yours")[2]


def test_without_arguments_there_is_help(cli: Run) -> None:
    code, out, err = cli()
    assert code == 2
    assert "embed" in out
    assert "Error" not in err
    assert cli("--version")[0] == 0


def test_every_error_has_its_exit_code() -> None:
    callers = (InvalidInputError, LimitExceededError, UnknownModelError, UnsupportedOperationError, BundleError)
    for name, error in error_classes().items():
        again = issubclass(error, (OverloadedError, ServerUnreachableError))
        assert console.exit_code(error("message")) == (75 if again else 2 if issubclass(error, callers) else 1), name


@pytest.mark.parametrize(
    ("raised", "code", "start"),
    [
        (ServerUnreachableError("http://host:3000 does not answer."), 75, "Error [server_unreachable]: http://host"),
        (LimitExceededError("Too many cells."), 2, "Error [limit_exceeded]: Too many cells."),
        (KeyboardInterrupt(), 130, "Error [interrupted]: "),
        (ZeroDivisionError("a bug"), 1, "Error [internal]: ZeroDivisionError: a bug"),
        (BrokenPipeError(), 1, ""),
    ],
    ids=["server", "limit", "control-c", "bug", "closed pipe"],
)
def test_no_failure_shows_a_traceback(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    start: str,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("perturbscope.tasks.resume.PartialRun.embed", broken)
    monkeypatch.setattr("perturbscope.cli.app.os.dup2", lambda *_: None)
    assert run(EMBED) == code
    err = capsys.readouterr().err
    assert err.startswith(start)
    assert "Traceback" not in err
    assert [item.name for item in folder.iterdir()] == ["in.h5ad"]


def test_an_output_that_fails_half_way_leaves_nothing(cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "out.parquet").write_text("the earlier result")

    def full_disk(_table: object, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    code, _, err = cli(*SCORE)
    assert code == 1
    assert "No space left on device" in err
    assert sorted(item.name for item in folder.iterdir()) == ["in.h5ad", "out.parquet"]
    assert (folder / "out.parquet").read_text() == "the earlier result"


def test_progress_is_quiet_unless_stderr_is_a_terminal(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Embedding" not in cli(*EMBED)[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert "Embedding" in cli("embed", "in.h5ad", "again.h5ad")[2]
