"""Arrow files that grow chunk by chunk: cut off anywhere, they are continued to the same bytes."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

import perturbscope
from perturbscope.errors import InvalidParameterError, UnreadableFileError
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import GeneSums, OutputValues
from perturbscope.tasks import token_files
from perturbscope.tasks.token_files import TokenFile, check_room, read_gene_vectors, size_text

SPEC = OutputSpec(name="gene_embedding", per="token", width=3, meaning="embedding")
ABOUT = {"model": "tiny"}
NAMES = ("ENSG1", "ENSG2", "ENSG3", "ENSG4")
CELLS = [[2, 0], [1], [], [3, 1, 0], [0, 2]]
SIZES = [2, 2, 1]


def chunk(number: int) -> tuple[Any, OutputValues]:
    """The cells of a chunk; gene g of cell c has the vector [c, g, 0.5]."""
    first = sum(SIZES[:number])
    cells = range(first, first + SIZES[number])
    rows = [(cell, gene, 0.5) for cell in cells for gene in CELLS[cell]]
    return np.array([f"cell{cell}" for cell in cells]), OutputValues(
        SPEC,
        np.array(rows, dtype=np.float32).reshape(-1, 3),
        np.concatenate([[0], np.cumsum([len(CELLS[cell]) for cell in cells])]).astype(np.int64),
        np.array([gene for cell in cells for gene in CELLS[cell]], dtype=np.int32),
        NAMES,
    )


def write(path: Path, *, stop: int | None = None, about: dict[str, str] = ABOUT) -> int:
    """Write the chunks that the file lacks up to `stop`; returns how many it had."""
    with TokenFile(path, SPEC, about, SIZES) as file:
        had = file.n_chunks
        for number in range(had, len(SIZES) if stop is None else stop):
            file.append(*chunk(number))
        if stop is None:
            file.finish()
    return had


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    write(tmp_path / "whole.arrow")
    return (tmp_path / "whole.arrow").read_bytes()


def test_the_file_is_feather_with_a_row_a_cell(tmp_path: Path, whole: bytes) -> None:
    table = feather.read_table(tmp_path / "whole.arrow", memory_map=True)
    assert table.schema.names == ["cell_id", "gene_ids", "gene_embedding"]
    assert table.schema.field("gene_embedding").type == pa.list_(pa.list_(pa.float32(), 3))
    assert table["cell_id"].to_pylist() == ["cell0", "cell1", "cell2", "cell3", "cell4"]
    assert table["gene_ids"].to_pylist() == [[NAMES[gene] for gene in genes] for genes in CELLS]
    vectors = [[[cell, gene, 0.5] for gene in genes] for cell, genes in enumerate(CELLS)]
    assert table["gene_embedding"].to_pylist() == vectors
    about = json.loads(table.schema.metadata[b"perturbscope"])
    assert (about["model"], about["output"]["name"], about["output"]["width"]) == ("tiny", "gene_embedding", 3)


def test_it_is_read_back_chunk_by_chunk(tmp_path: Path, whole: bytes) -> None:
    sums = GeneSums()
    names: list[str] = []
    for cells, values in perturbscope.read_gene_vectors(tmp_path / "whole.arrow"):
        assert values.spec == SPEC
        for cell, name in enumerate(cells):
            number = int(name.removeprefix("cell"))
            assert values.genes_of(cell).tolist() == [NAMES[gene] for gene in CELLS[number]]
            assert values.of_cell(cell).tolist() == [[number, gene, 0.5] for gene in CELLS[number]]
        names += cells.tolist()
        sums.add(values)
    assert names == ["cell0", "cell1", "cell2", "cell3", "cell4"]
    assert sums.table().loc["ENSG1"].tolist() == [3, pytest.approx(7 / 3), 0, 0.5]


def test_a_file_that_is_cut_off_anywhere_is_continued_to_the_same_bytes(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cut.arrow"
    kept = []
    for end in range(0, len(whole) + 1, 37):
        path.write_bytes(whole[:end])
        kept.append(write(path))
        assert path.read_bytes() == whole, end
    assert kept == sorted(kept)
    assert set(kept) == {0, 1, 2, 3}
    path.write_bytes(whole + b"more")
    assert write(path) == 3
    assert path.read_bytes() == whole


def test_a_file_of_another_model_or_of_other_chunks_is_begun_anew(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "whole.arrow"
    assert write(path, about={"model": "other"}) == 0
    assert write(path) == 0
    assert path.read_bytes() == whole
    with TokenFile(path, SPEC, ABOUT, [2, 3]) as file:
        assert file.n_chunks == 1
    path.write_bytes(b"\0" * 4000)
    assert write(path) == 0
    assert path.read_bytes() == whole


def test_a_closed_file_keeps_what_was_appended(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "part.arrow"
    assert write(path, stop=2) == 0
    assert path.read_bytes() == whole[: path.stat().st_size]
    assert write(path) == 2
    assert path.read_bytes() == whole


def test_a_full_disk_says_so_and_costs_no_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes) -> None:
    path = tmp_path / "full.arrow"
    write(path, stop=1)
    with TokenFile(path, SPEC, ABOUT, SIZES) as file:
        flush = token_files._Sink.flush

        def full(self: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(token_files._Sink, "flush", full)
        with pytest.raises(InvalidParameterError, match=r"disk is full: .* has 1 chunks .* run the same command again"):
            file.append(*chunk(1))
        monkeypatch.setattr(token_files._Sink, "flush", flush)
    assert write(path) in (1, 2)
    assert path.read_bytes() == whole


def test_room_is_needed_for_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    check_room(tmp_path, 1500, 500)
    with pytest.raises(InvalidParameterError, match=r"about 1001 bytes, and the disk of .* has 1000 bytes free"):
        check_room(tmp_path, 1501, 500)


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"no arrow file at all"])
def test_what_cannot_be_read(tmp_path: Path, whole: bytes, content: bytes) -> None:
    bad = tmp_path / "bad.arrow"
    bad.write_bytes(content or whole[:-20])
    with pytest.raises(UnreadableFileError, match=r"bad\.arrow is no Arrow file of perturbscope embed"):
        list(read_gene_vectors(bad))
    feather.write_feather(pa.table({"a": [1]}), bad, compression="uncompressed")
    with pytest.raises(UnreadableFileError, match=r"bad\.arrow is no Arrow file"):
        list(read_gene_vectors(bad))


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (200 * 2**20, "200 MiB"), (3 * 2**41, "6.0 TiB")],
)
def test_sizes_in_words(n_bytes: int, text: str) -> None:
    assert size_text(n_bytes) == text
