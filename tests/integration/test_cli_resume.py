"""A run of embedding that is killed can be continued, and ends in the same file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import pytest

from perturbscope.cli.app import run
from tests.screens import make_screen

CHUNK = 16
# The command itself, with a model that waits once so many chunks are there. SIGINT stays ignored where a shell started
# the tests in the background, so Python's own way is set.
WAITING = """
import signal, sys, time
from pathlib import Path
from perturbscope.cli.app import run
from perturbscope.inference.embedder import Embedder
signal.signal(signal.SIGINT, signal.default_int_handler)
quick = Embedder.infer
def waiting(self, tokens, outputs=None, progress=None):
    chunks = Path("out.h5ad.partial")
    while len(list(chunks.glob("chunk-*.npy"))) >= int(sys.argv[1]) and not Path("go").exists():
        time.sleep(0.01)
    return quick(self, tokens, outputs, progress)
Embedder.infer = waiting
sys.exit(run(sys.argv[2:]))
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_screen().write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERTURBSCOPE_BUNDLE", str(tiny_bundle))
    return tmp_path


def embed(*more: str) -> list[str]:
    return ["embed", "in.h5ad", "out.h5ad", "--chunk-cells", str(CHUNK), *more]


def start(folder: Path, number: int, *arguments: str) -> subprocess.Popen[str]:
    """Start a run that waits after `number` chunks until there is a file "go"."""
    return subprocess.Popen(
        [sys.executable, "-c", WAITING, str(number), *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_after_chunks(folder: Path, number: int, how: signal.Signals, *more: str) -> set[str]:
    """Start a run, kill it after `number` chunks, and return the names of all its chunks."""
    process = start(folder, number, *embed(*more))
    deadline = time.monotonic() + 60
    while len(list((folder / "out.h5ad.partial").glob("chunk-*.npy"))) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no chunk was finished"
        time.sleep(0.01)
    os.kill(process.pid, how)
    process.communicate(timeout=30)
    assert process.returncode != 0
    return {item.name for item in (folder / "out.h5ad.partial").glob("chunk-*.npy")}


def test_a_killed_run_continues_and_ends_in_the_same_file(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = kill_after_chunks(folder, 2, signal.SIGKILL)
    assert len(kept) == 2
    assert not (folder / "out.h5ad").exists()
    times = {name: (folder / "out.h5ad.partial" / name).stat().st_mtime_ns for name in kept}
    # Killed once more: what was there is taken over, not made again.
    more = kill_after_chunks(folder, len(kept) + 1, signal.SIGKILL)
    assert kept < more
    assert {name: (folder / "out.h5ad.partial" / name).stat().st_mtime_ns for name in kept} == times
    assert not (folder / "out.h5ad").exists()
    assert run(embed()) == 0
    assert f"Continuing an interrupted run: {len(more)} chunks" in capfd.readouterr().err
    assert not (folder / "out.h5ad.partial").exists()
    resumed = (folder / "out.h5ad").read_bytes()
    assert run(embed()) == 0
    assert (folder / "out.h5ad").read_bytes() == resumed
    assert "Continuing" not in capfd.readouterr().err
    assert ad.read_h5ad(folder / "out.h5ad").obsm["X_perturbscope"].shape == (123, 8)


def test_an_interruption_from_the_keyboard_keeps_the_chunks(folder: Path) -> None:
    kept = kill_after_chunks(folder, 1, signal.SIGINT)
    assert kept
    assert not (folder / "out.h5ad").exists()
    assert run(embed()) == 0


def test_a_bad_cell_names_its_row_and_keeps_the_chunks_before_it(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Cells are checked as they stream; what was embedded waits for the next run, and no output is written."""
    adata = make_screen()
    dense = adata.X.toarray()
    dense[100] = 0
    adata.X = dense
    adata.write_h5ad(folder / "in.h5ad")
    assert run(embed()) == 2
    assert "row 100" in capfd.readouterr().err
    assert len(list((folder / "out.h5ad.partial").glob("chunk-*.npy"))) == 100 // CHUNK
    assert not (folder / "out.h5ad").exists()
    assert run(embed()) == 2
    assert "Continuing an interrupted run: 6 chunks" in capfd.readouterr().err


def test_a_run_that_finished_no_chunk_leaves_no_directory(folder: Path) -> None:
    adata = make_screen()
    adata.X = adata.X.toarray() * 0.5
    adata.write_h5ad(folder / "in.h5ad")
    assert run(embed()) == 2
    assert [item.name for item in folder.iterdir()] == ["in.h5ad"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: make_screen(seed=1).write_h5ad(folder / "in.h5ad"), "input"),
        (lambda folder: embed("--gene-key", "ensembl"), "options"),
        (lambda folder: None, "model"),
    ],
    ids=["another input", "another option", "another model"],
)
def test_chunks_of_another_run_are_discarded_with_a_notice(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, change: object, named: str
) -> None:
    from tests.bundles import write_tiny_bundle

    kill_after_chunks(folder, 1, signal.SIGKILL)
    arguments = change(folder) if callable(change) else None
    if named == "model":
        other = write_tiny_bundle(folder / "other", seed=1)
        monkeypatch.setenv("PERTURBSCOPE_BUNDLE", str(other))
    assert run(arguments or embed()) == 0
    assert f"made with another {named}; they are discarded" in capfd.readouterr().err
    resumed = (folder / "out.h5ad").read_bytes()
    (folder / "out.h5ad").unlink()
    assert run(arguments or embed()) == 0
    assert (folder / "out.h5ad").read_bytes() == resumed


def test_damaged_chunks_are_made_again(folder: Path) -> None:
    assert run(embed()) == 0
    wanted = (folder / "out.h5ad").read_bytes()
    kept = kill_after_chunks(folder, 3, signal.SIGKILL)
    partial = folder / "out.h5ad.partial"
    (partial / "chunk-000000.npy").write_bytes(b"not an array")
    (partial / "chunk-000001.npy").write_bytes((partial / "chunk-000001.npy").read_bytes()[:-9])
    assert len(kept) >= 3
    assert run(embed()) == 0
    assert (folder / "out.h5ad").read_bytes() == wanted


def test_two_runs_never_share_a_directory(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = start(folder, 1, *embed())
    try:
        while not list((folder / "out.h5ad.partial").glob("chunk-*.npy")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        assert run(embed()) == 2
        assert "Another process is writing to" in capfd.readouterr().err
    finally:
        (folder / "go").touch()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "123 cells x 8" in out


def test_a_server_that_changes_its_model_stops_the_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kill_after_chunks(folder, 1, signal.SIGKILL)
    note = folder / "out.h5ad.partial" / "model.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "model_id": "older-1.0-000000000000"}))
    assert run(embed()) == 2
    assert "The model changed during the run, from older-1.0" in capfd.readouterr().err
    assert not (folder / "out.h5ad").exists()


OUTPUTS = ["--output", "gene_embedding", "--output", "cell_logits", "--output", "gene_value"]
ARROWS = ["out.h5ad.gene_embedding.arrow", "out.h5ad.gene_value.arrow"]


@pytest.fixture
def versatile(folder: Path, outputs_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with the bundle that has several outputs."""
    monkeypatch.setenv("PERTURBSCOPE_BUNDLE", str(outputs_bundle))
    return folder


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ["out.h5ad", *ARROWS]}


def test_values_of_genes_survive_a_kill(versatile: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(embed(*OUTPUTS)) == 0
    wanted = results(versatile)
    for name in wanted:
        (versatile / name).unlink()
    kill_after_chunks(versatile, 2, signal.SIGKILL, *OUTPUTS)
    partial = versatile / "out.h5ad.partial"
    begun = {name: (partial / name).read_bytes() for name in ("gene_embedding.arrow", "gene_value.arrow")}
    kept = kill_after_chunks(versatile, 5, signal.SIGINT, *OUTPUTS)
    assert len(kept) == 5
    for name, content in begun.items():  # taken over, not made again
        assert len(content) < (partial / name).stat().st_size
        assert (partial / name).read_bytes().startswith(content)
    assert not any((versatile / name).exists() for name in wanted)
    assert run(embed(*OUTPUTS)) == 0
    assert "Continuing an interrupted run: 5 chunks" in capfd.readouterr().err
    assert results(versatile) == wanted
    assert not partial.exists()


def test_damage_to_any_part_costs_only_that_part(versatile: Path) -> None:
    assert run(embed(*OUTPUTS)) == 0
    wanted = results(versatile)
    kill_after_chunks(versatile, 5, signal.SIGKILL, *OUTPUTS)
    partial = versatile / "out.h5ad.partial"
    # Chunk 1 lost its values per cell; one file ends inside of chunk 3, the other is gone.
    (partial / "chunk-000001.npy").write_bytes(b"not an array")
    with (partial / "gene_embedding.arrow").open("r+b") as file:
        file.truncate((partial / "gene_embedding.arrow").stat().st_size * 7 // 10)
    (partial / "gene_value.arrow").unlink()
    assert run(embed(*OUTPUTS)) == 0
    assert results(versatile) == wanted


def test_chunks_with_other_outputs_are_not_mixed(versatile: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kill_after_chunks(versatile, 2, signal.SIGKILL)
    assert run(embed("--output", "gene_embedding")) == 0
    assert "made with another outputs, pyarrow; they are discarded" in capfd.readouterr().err
    kill_after_chunks(versatile, 2, signal.SIGKILL, "--output", "gene_embedding")
    (versatile / "out.h5ad").unlink()
    assert run(embed("--output", "cell_logits")) == 0
    assert "made with another outputs; they are discarded" in capfd.readouterr().err
    kill_after_chunks(versatile, 2, signal.SIGKILL, "--output", "gene_embedding")
    (versatile / "out.h5ad").unlink()
    assert run(embed()) == 0
    assert "made with another outputs, pyarrow; they are discarded" in capfd.readouterr().err
    assert list(ad.read_h5ad("out.h5ad").obsm) == ["X_pca", "X_perturbscope"]
