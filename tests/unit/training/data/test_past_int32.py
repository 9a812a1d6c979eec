"""Files with more values than int32 can number; they are holes but for their ends, and so take no disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from perturbscope.cells.readers import open_cells
from perturbscope.errors import CorruptBundleError
from tests.training_data import pretrain_values
from training.config import strict
from training.config.stages import PretrainConfig
from training.data.corpus import build_corpus
from training.data.shards import Corpus

GENES, CELLS = 30_000, 72_000
N_VALUES = GENES * CELLS
"""Every cell expresses every gene: 2.16 billion counts."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An .h5ad; only the counts of the last two cells were ever written, 7 and 9 each."""
    path = tmp_path / "large.h5ad"
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        matrix = file.create_group("X")
        matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (CELLS, GENES)})
        matrix.create_dataset("indptr", data=np.arange(CELLS + 1, dtype=np.int64) * GENES)
        for name, values in (
            ("data", np.repeat(np.array([7, 9], np.int32), GENES)),
            ("indices", np.tile(np.arange(GENES, dtype=np.int32), 2)),
        ):
            stored = matrix.create_dataset(name, shape=(N_VALUES,), dtype=np.int32, chunks=(GENES,))
            stored[-2 * GENES :] = values
        for name, length in (("obs", CELLS), ("var", GENES)):
            frame = file.create_group(name)
            frame.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            frame.attrs["column-order"] = np.zeros(0, dtype="S1")
            names = np.char.add("GENE" if name == "var" else "cell", np.arange(length).astype("U6"))
            frame.create_dataset("_index", data=names.astype(object), dtype=h5py.string_dtype())
    return path


def test_counts_behind_the_two_billionth_are_read(large: Path) -> None:
    assert N_VALUES > 2**31
    assert large.stat().st_size < 50e6
    with open_cells(large) as source:
        cells = source.rows(CELLS - 2, CELLS)
    assert cells.first_row == CELLS - 2
    np.testing.assert_array_equal(cells.counts.toarray(), np.repeat([[7], [9]], GENES, axis=1))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    config = strict.parse(PretrainConfig, pretrain_values(tmp_path)).corpus
    build_corpus(config)
    return Path(config.path)


def test_tokens_behind_the_two_billionth_are_read(corpus: Path) -> None:
    (shard,) = json.loads((corpus / "manifest.json").read_text())["shards"]
    folder = corpus / shard["name"]
    tokens, offsets = np.load(folder / "input_ids.npy"), np.load(folder / "offsets.npy")
    last = tokens[offsets[-2] :].copy()
    far = 2**31 + 10
    moved = np.lib.format.open_memmap(folder / "input_ids.npy", mode="w+", dtype=tokens.dtype, shape=(far + len(last),))
    moved[far:] = last
    moved.flush()
    np.save(folder / "offsets.npy", np.array([*offsets[:-2], far, far + len(last)], dtype=np.int64))
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["shards"][0]["tokens"] = far + len(last)
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    found = Corpus(corpus).cells(np.array([len(offsets) - 2]))
    np.testing.assert_array_equal(found.arrays["input_ids"], last)


def test_more_shards_than_files_may_be_open_is_said(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, **_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(CorruptBundleError, match="ulimit -n"):
        Corpus(corpus)
