"""Arrays of a file, unpacked here: the numbers that libhdf5 gives, and its word on everything that is odd."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from perturbscope.cells.readers import store
from perturbscope.cells.readers.store import StoredArray

CHUNK = 5000


def numbers(dtype, n=17_321) -> np.ndarray:
    rng = np.random.default_rng(3)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(n).astype(dtype)
    found = rng.poisson(3, n).astype(dtype)
    found[:40] = np.iinfo(dtype).max
    found[40:80] = np.iinfo(dtype).min
    return found


def write(path: Path, values: np.ndarray, **how) -> h5py.Dataset:
    with h5py.File(path, "w") as file:
        file.create_dataset("values", data=values, **how)
    return h5py.File(path)["values"]


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "i8", "f4", "f8"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_any_slice_is_that_of_libhdf5(tmp_path, dtype, shuffle):
    values = numbers(dtype)
    dataset = write(tmp_path / "a.h5", values, chunks=(CHUNK,), compression="gzip", shuffle=shuffle)
    array = StoredArray(dataset)
    assert len(array) == len(values)
    assert array._read_chunk(CHUNK) is not None
    for start, stop in [(0, 10), (4990, 5010), (5000, 10_000), (9_999, 17_321), (17_000, 99_999), (3, 3), (9, 2)]:
        found = array[start:stop]
        np.testing.assert_array_equal(found, values[start:stop])
        assert found.dtype == values.dtype
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(array[::7], values[::7])


@pytest.mark.parametrize(
    "how",
    [
        {"chunks": (CHUNK,)},
        {"chunks": (CHUNK,), "compression": "lzf"},
        {"chunks": (CHUNK,), "compression": "gzip", "fletcher32": True},
        {"chunks": (64,), "compression": "gzip"},
        {"dtype": ">i4", "chunks": (CHUNK,), "compression": "gzip", "shuffle": True},
        {},
    ],
    ids=["not packed", "lzf", "checksum", "small chunks", "big-endian", "in one piece"],
)
def test_other_ways_to_store_are_read_by_libhdf5(tmp_path, how):
    values = numbers("i4")
    array = StoredArray(write(tmp_path / "a.h5", values, **how))
    assert not array._chunk
    np.testing.assert_array_equal(array[4000:12_000], values[4000:12_000])


def test_a_chunk_that_was_never_written_holds_the_fill_value(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("values", (20_000,), "i4", chunks=(CHUNK,), compression="gzip", fillvalue=7)
        made[:CHUNK] = 1
        array = StoredArray(made)
        assert array._chunk == CHUNK
        np.testing.assert_array_equal(array[:12_000], made[:12_000])
        assert array[6000:6002].tolist() == [7, 7]


def test_a_chunk_stored_without_its_filter_is_read_by_libhdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("values", (2 * CHUNK,), "i4", chunks=(CHUNK,), compression="gzip")
        plain = np.arange(CHUNK, dtype="i4")
        made.id.write_direct_chunk((CHUNK,), plain.tobytes(), filter_mask=1)
    with h5py.File(tmp_path / "a.h5") as file:
        array = StoredArray(file["values"])
        assert array._read_chunk(CHUNK) is None
        np.testing.assert_array_equal(array[CHUNK:], plain)


@pytest.mark.parametrize("packed", [b"nothing that unpacks", store.zlib_ng.compress(bytes(4 * CHUNK - 1))])
def test_a_damaged_chunk_gives_the_error_of_libhdf5(tmp_path, packed):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("values", data=numbers("i4"), chunks=(CHUNK,), compression="gzip", shuffle=True)
        made.id.write_direct_chunk((CHUNK,), packed)
        file.flush()
        array = StoredArray(made)
        assert array._read_chunk(CHUNK) is None
        assert array[:CHUNK].tolist() == made[:CHUNK].tolist()
        try:
            expected = made[:]
        except OSError:
            with pytest.raises(OSError):
                array[:]
        else:
            # The chunk lacks a byte; libhdf5 leaves whatever its memory held in the last value's place.
            found, known = array[:], np.arange(len(expected)) != 2 * CHUNK - 1
            assert len(found) == len(expected)
            assert found[known].tolist() == expected[known].tolist()


def test_a_chunk_that_unpacks_to_more_than_it_may_is_never_unpacked_whole(tmp_path, monkeypatch):
    """A thousand times as much: what is asked for at a time is one byte more than there should be."""
    asked = []
    unpacker = store.zlib_ng.decompressobj

    class Watched:
        def __init__(self) -> None:
            self._inner = unpacker()

        def decompress(self, data: bytes, most: int) -> bytes:
            asked.append(most)
            return self._inner.decompress(data, most)

        @property
        def eof(self) -> bool:
            return self._inner.eof

    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("values", data=np.zeros(CHUNK, "i4"), chunks=(CHUNK,), compression="gzip")
        made.id.write_direct_chunk((0,), store.zlib_ng.compress(bytes(4000 * CHUNK)))
        monkeypatch.setattr(store.zlib_ng, "decompressobj", Watched)
        array = StoredArray(made)
        assert array._read_chunk(0) is None
    assert asked == [4 * CHUNK + 1]
