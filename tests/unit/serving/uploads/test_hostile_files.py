"""Files that are made to do harm: each is refused by name, in little memory, and nothing in them is run."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidInputError, LimitExceededError, PerturbScopeError, UnreadableFileError
from perturbscope.protocol import EmbedRequest, ScoreRequest
from serving.engine.columns import Columns
from serving.settings import Settings
from serving.uploads import hdf5_checks
from serving.uploads.hdf5_checks import check_file
from serving.uploads.readers import file_readers
from serving.uploads.requests import read_upload
from tests.unit.serving.conftest import write_h5ad

ROOT = Path(__file__).resolve().parents[4]
SCORE = {"perturbation_key": "perturbation", "control": "control"}


@functools.cache
def bomb() -> bytes:
    """400 MiB in less than half a MiB: one packed megabyte of zeros, again and again."""
    packer = zlib.compressobj()
    head = packer.compress(b"")
    once = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + once * 400


def deflate_bomb(file: h5py.File) -> None:
    """A chunk that is said to hold a megabyte, and holds more."""
    dataset = file.create_dataset("layers/bomb", (2**20,), "u1", chunks=(2**20,), compression="gzip")
    dataset.id.write_direct_chunk((0,), bomb())


def double_bomb(file: h5py.File) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((2**20,))
    plist.set_deflate(9)
    plist.set_deflate(9)
    space = h5py.h5s.create_simple((2**20,))
    dataset = h5py.h5d.create(file.id, b"layers/bomb", h5py.h5t.NATIVE_UINT8, space, plist)
    h5py.Dataset(dataset).id.write_direct_chunk((0,), zlib.compress(bomb()))


def wide_chunk(file: h5py.File) -> None:
    file.create_dataset("layers/bomb", (2**23 + 1,), "f8", chunks=(2**23 + 1,), compression="gzip")[0] = 1


def wide_lzf_chunk(file: h5py.File) -> None:
    file.create_dataset("layers/bomb", (2**21,), "f8", chunks=(2**21,), compression="lzf")


def chunk_larger_than_itself(file: h5py.File) -> None:
    dataset = file.create_dataset("layers/bomb", (1000,), "u1", chunks=(1000,), compression="lzf")
    dataset.id.write_direct_chunk((0,), bytes(10_000))


def empty_giant(file: h5py.File) -> None:
    file.create_dataset("obs/bomb", (2**60,), "u1", chunks=(2**20,))


def empty_giant_matrix(file: h5py.File) -> None:
    del file["X"]
    file.create_dataset("X", (24, 2**40), "f4", chunks=(24, 1000))


def empty_table(file: h5py.File) -> None:
    file.create_dataset("obsm/bomb", (24, 2**28), "f4", chunks=(24, 1000))


def long_table(file: h5py.File) -> None:
    file.create_dataset("obsm/bomb", (10**6, 2), "f4", chunks=(10**4, 2))


def sparse_table(file: h5py.File) -> None:
    group = file.create_group("obsm/bomb")
    group.attrs["shape"], group.attrs["encoding-type"] = [24, 2**40], "csr_matrix"


def sparse_table_of_a_modality(file: h5py.File) -> None:
    group = file.create_group("mod/rna/obsm/bomb")
    group.attrs["shape"], group.attrs["encoding-type"] = [24, 2**40], "csr_matrix"


def many_categories(file: h5py.File) -> None:
    file.create_dataset("obs/bomb/categories", (10**6,), h5py.string_dtype(), chunks=(10**4,))


def long_fixed_texts(file: h5py.File) -> None:
    data = file.create_dataset("obs/bomb", (100,), "S10000000", chunks=(1,), compression="gzip")
    for number in range(100):
        data.id.write_direct_chunk((number,), bomb()[:100_000])


def shared_text(file: h5py.File, **options: Any) -> None:
    """A thousand entries that all are the same megabyte: rewritten descriptions, as no honest writer makes them."""
    name = options.pop("name", "obs/bomb")
    dataset = file.create_dataset(name, (1000,), h5py.string_dtype(), **options)
    dataset[0] = "x" * 2**20
    file.flush()
    if options:
        info = dataset.id.get_chunk_info(0)
        packed = Path(file.filename).read_bytes()[info.byte_offset : info.byte_offset + info.size]
        plain = (
            zlib.decompress(packed) if options.get("compression") == "gzip" else hdf5_checks._from_lzf(packed, 10**6)
        )
        forged = np.frombuffer(plain[:16] * 1000, dtype=np.uint8)
        # A chunk of lzf that lzf could not make smaller is stored as it is, and its mask says so.
        if options.get("compression") == "gzip":
            dataset.id.write_direct_chunk((0,), zlib.compress(forged.tobytes()))
        else:
            literal = forged.tobytes()
            parts = [bytes([len(p) - 1]) + p for p in (literal[i : i + 32] for i in range(0, len(literal), 32))]
            dataset.id.write_direct_chunk((0,), b"".join(parts))
        return
    offset = dataset.id.get_offset()
    with Path(file.filename).open("r+b") as raw:
        raw.seek(offset)
        one = raw.read(16)
        raw.seek(offset)
        raw.write(one * 1000)


def shared_text_gzip(file: h5py.File) -> None:
    shared_text(file, chunks=(1000,), compression="gzip")


def shared_text_shuffled(file: h5py.File) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1000,))
    plist.set_filter(h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FLAG_OPTIONAL, (16,))
    plist.set_deflate(9)
    kind = h5py.h5t.py_create(h5py.string_dtype(), logical=True)
    space = h5py.h5s.create_simple((1000,))
    dataset = h5py.Dataset(h5py.h5d.create(file.id, b"uns/bomb", kind, space, plist))
    dataset[0] = "x" * 2**20
    file.flush()
    info = dataset.id.get_chunk_info(0)
    packed = Path(file.filename).read_bytes()[info.byte_offset : info.byte_offset + info.size]
    one = hdf5_checks._unshuffled(zlib.decompress(packed), 16)[:16]
    forged = np.frombuffer(one * 1000, dtype=np.uint8).reshape(1000, 16).T
    dataset.id.write_direct_chunk((0,), zlib.compress(forged.tobytes()))


def shared_text_lzf(file: h5py.File) -> None:
    shared_text(file, chunks=(1000,), compression="lzf")


def shared_text_in_a_table(file: h5py.File) -> None:
    kind = np.dtype([("n", "i4"), ("text", h5py.string_dtype())])
    dataset = file.create_dataset("obs/bomb", (1000,), kind)
    dataset[0] = (1, "x" * 2**20)
    file.flush()
    with Path(file.filename).open("r+b") as raw:
        raw.seek(dataset.id.get_offset())
        one = raw.read(20)
        raw.seek(dataset.id.get_offset())
        raw.write(one * 1000)


def compact_texts(file: h5py.File) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    kind = h5py.h5t.py_create(h5py.string_dtype(), logical=True)
    h5py.h5d.create(file.id, b"obs/bomb", kind, h5py.h5s.create_simple((1000,)), plist)


def many_parts(file: h5py.File) -> None:
    for number in range(5):
        group = file.create_group(f"uns/{number}")
        for name in range(50):
            group[str(name)] = file["obs"]


def deep_groups(file: h5py.File) -> None:
    file.create_group("uns/" + "/".join(["a"] * 40))


def many_attributes(file: h5py.File) -> None:
    for number in range(1001):
        file["obs"].attrs[f"a{number}"] = number


def large_attribute(file: h5py.File) -> None:
    file.create_group("uns/new").attrs.create("a", np.zeros(2**20 + 1, dtype="u1"))


def many_chunks(file: h5py.File) -> None:
    file.create_dataset("obs/bomb", (3000,), "u1", chunks=(1,))[:] = 1


def unknown_filter(file: h5py.File) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((10,))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
    h5py.h5d.create(file.id, b"uns/bomb", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((10,)), plist)


def not_annotated(file: h5py.File) -> None:
    """Leave a group matrix alone, as in a file of Cell Ranger."""
    for name in list(file):
        del file[name]
    file.create_group("matrix")


LIMIT, UNREADABLE = "limit_exceeded", "unreadable_file"
HOSTILE: dict[str, tuple[Callable[[h5py.File], None], str, str]] = {
    "deflate": (deflate_bomb, LIMIT, "unpacks to more than its 1,048,576 bytes"),
    "deflate twice": (double_bomb, UNREADABLE, "compressed more than once"),
    "wide chunk": (wide_chunk, LIMIT, "A chunk of /layers/bomb has 67,108,872 bytes"),
    "wide chunk of lzf": (wide_lzf_chunk, LIMIT, "with lzf"),
    "chunk larger than itself": (chunk_larger_than_itself, LIMIT, "takes 10,000"),
    "2^60 numbers": (empty_giant, LIMIT, "has 1,152,921,504,606,846,976 values"),
    "2^40 genes": (empty_giant_matrix, LIMIT, "/X claims"),
    "wide table": (empty_table, LIMIT, "/obsm/bomb is of shape"),
    "long table": (long_table, LIMIT, "200,000 rows"),
    "sparse table": (sparse_table, LIMIT, "/obsm/bomb is of shape"),
    "sparse table of a modality": (sparse_table_of_a_modality, LIMIT, "/mod/rna/obsm/bomb is of shape"),
    "many categories": (many_categories, LIMIT, r"/obs/bomb/categories is of shape \[1000000\]"),
    "long texts": (long_fixed_texts, LIMIT, "has 1,000,000,000 bytes"),
    "shared text": (shared_text, LIMIT, "The texts of /obs/bomb"),
    "shared text, gzip": (shared_text_gzip, LIMIT, "The texts of /obs/bomb"),
    "shared text, shuffled": (shared_text_shuffled, LIMIT, "The texts of /uns/bomb"),
    "shared text, lzf": (shared_text_lzf, LIMIT, "The texts of /obs/bomb"),
    "shared text in a table": (shared_text_in_a_table, LIMIT, "The texts of /obs/bomb"),
    "compact texts": (compact_texts, UNREADABLE, "compact"),
    "many parts": (many_parts, LIMIT, "more than 200 parts"),
    "deep groups": (deep_groups, LIMIT, "nested more than 32"),
    "many attributes": (many_attributes, LIMIT, "1,005 attributes"),
    "large attribute": (large_attribute, LIMIT, "1,048,577 bytes"),
    "many chunks": (many_chunks, LIMIT, "too many chunks"),
    "unknown filter": (unknown_filter, UNREADABLE, r"filter 32015"),
    "not annotated": (not_annotated, UNREADABLE, "no obs and var"),
}


SMALLER = {"many chunks", "many parts"}
"""Files below the true limits, which would take long to make."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_cells_of_module: CountMatrix) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    plain = write_h5ad(tiny_cells_of_module, folder / "plain.h5ad").read_bytes()
    files = {}
    for name, (spoil, _, _) in HOSTILE.items():
        files[name] = folder / f"{name.replace(' ', '-')}.h5ad"
        files[name].write_bytes(plain)
        # Attributes above 64 KiB need the newer format of objects.
        with h5py.File(files[name], "a", libver="latest" if name == "large attribute" else None) as file:
            spoil(file)
    return files


@pytest.fixture(scope="module")
def tiny_cells_of_module() -> CountMatrix:
    rng = np.random.default_rng(0)
    genes = [f"ENSG{number:011d}" for number in range(40)]
    return CountMatrix.from_matrix(rng.poisson(2.0, size=(24, 40)) + 1, genes)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name(
    hostile: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5_checks, "MAX_CHUNKS", 2000)
    monkeypatch.setattr(hdf5_checks, "MAX_OBJECTS", 200)
    for route in ("embed", "columns"):
        with pytest.raises(PerturbScopeError, match=HOSTILE[name][2]) as refused:
            read_upload(route, hostile[name], {}, Settings())
        assert refused.value.code == HOSTILE[name][1]
        assert str(hostile[name].parent) not in refused.value.message


def test_addresses_of_another_size_are_refused(tmp_path: Path) -> None:
    """The check reads chunk indexes by itself, whose addresses it takes to have eight bytes."""
    path = tmp_path / "small-addresses.h5ad"
    sizes = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    sizes.set_sizes(4, 4)
    with h5py.File(h5py.h5f.create(str(path).encode(), h5py.h5f.ACC_TRUNC, sizes)) as file:
        file.create_group("obs")
        file.create_group("var")
    with pytest.raises(UnreadableFileError, match="addresses of an unusual size"):
        check_file(path, Settings())


def test_no_hostile_file_costs_memory(hostile: dict[str, Path]) -> None:
    """All files are checked in one process that may not grow; some claim terabytes."""
    script = f"""
import json, resource, sys
from pathlib import Path
from perturbscope.errors import PerturbScopeError
from serving.settings import Settings
from serving.uploads.requests import read_upload
files = {json.dumps({name: str(path) for name, path in hostile.items() if name not in SMALLER})}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
read_upload("columns", Path({str(hostile["deflate"].parent / "plain.h5ad")!r}), {{}}, Settings())
before, grown = peak(), {{}}
for name, path in files.items():
    try:
        read_upload("columns", Path(path), {{}}, Settings())
    except PerturbScopeError as error:
        grown[name] = peak() - before
print(json.dumps(grown))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert set(grown) == set(HOSTILE) - SMALLER
    assert max(grown.values()) < 100, f"MiB: {grown}"


@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
def test_honest_files_of_every_kind_are_taken(tiny_cells: CountMatrix, tmp_path: Path, compression: Any) -> None:
    path = write_h5ad(tiny_cells, tmp_path / "plain.h5ad")
    adata = ad.read_h5ad(path)
    adata.obs["note"] = [f"a longer note {number}" * 20 for number in range(len(adata))]
    adata.X = adata.X.toarray()
    adata.write_h5ad(path, compression=compression)
    upload = read_upload("score", path, SCORE, Settings())
    assert isinstance(upload.request, ScoreRequest)
    assert upload.request.cells is not None
    np.testing.assert_array_equal(upload.request.cells.counts.toarray(), tiny_cells.counts.toarray())
    columns = read_upload("columns", path, {}, Settings()).request
    assert isinstance(columns, Columns)
    assert columns.representations == ("X_pca",)


def test_a_shuffled_and_checked_file_is_taken(h5ad: Path) -> None:
    with h5py.File(h5ad, "a") as file:
        values = file["obs/batch/codes"][...]
        del file["obs/batch/codes"]
        codes = file.create_dataset(
            "obs/batch/codes", data=values, chunks=(8,), compression="gzip", shuffle=True, fletcher32=True
        )
        texts = file["obs/batch/categories"][...]
        attributes = dict(file["obs/batch/categories"].attrs)
        del file["obs/batch/categories"]
        options = {"chunks": (2,), "compression": "lzf", "shuffle": True}
        made = file.create_dataset("obs/batch/categories", data=texts, dtype=h5py.string_dtype(), **options)
        made.attrs.update(attributes)
        assert len(codes) == 24
    upload = read_upload("score", h5ad, {**SCORE, "batch_key": "batch"}, Settings())
    assert isinstance(upload.request, ScoreRequest)
    assert upload.request.batches == ("a", "b") * 12


class Run:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("unpickled"),))


def ragged(file: h5py.File) -> None:
    del file["obs/perturbation"]
    made = file.create_dataset("obs/perturbation", (24,), h5py.vlen_dtype("i4"))
    made[0] = np.arange(3)


def spoil_obs(file: h5py.File, data: Any, dtype: Any = None) -> None:
    del file["obs/perturbation"]
    file.create_dataset("obs/perturbation", data=data, dtype=dtype)


STRANGE: dict[str, Callable[[h5py.File], None]] = {
    "references": lambda file: spoil_obs(file, [file["X"].ref] * 24, h5py.ref_dtype),
    "ragged": lambda file: ragged(file),
    "table": lambda file: spoil_obs(file, np.zeros(24, dtype=[("a", "i4"), ("b", "S3")])),
    "opaque": lambda file: spoil_obs(file, np.frombuffer(b"cos\nsystem\n(S'true'\ntR." * 24, dtype="V23")),
    "complex": lambda file: spoil_obs(file, np.zeros(24, dtype=complex)),
    "matrix": lambda file: spoil_obs(file, np.zeros((24, 2))),
    "scalar": lambda file: spoil_obs(file, 5),
    "group": lambda file: (file.pop("obs/perturbation", None), file.create_group("obs/perturbation"), None)[-1],
    "soft link": lambda file: (
        file.move("obs/perturbation", "uns/perturbation"),
        file.__setitem__("obs/perturbation", h5py.SoftLink("/uns/perturbation")),
        None,
    )[-1],
    "loop": lambda file: (
        file.pop("obs/perturbation", None),
        file.__setitem__("obs/perturbation", h5py.SoftLink("/obs/perturbation")),
        None,
    )[-1],
}


@pytest.mark.parametrize("name", STRANGE)
def test_columns_of_strange_kinds_are_refused_and_never_unpickled(
    h5ad: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import pickle

    def unpickle(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.chdir(tmp_path)
    for function in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, function, unpickle)
    with h5py.File(h5ad, "a") as file:
        if isinstance(file["obs/perturbation"], h5py.Group) and name not in ("group", "soft link", "loop"):
            pass
        STRANGE[name](file)
    with pytest.raises(InvalidInputError):
        read_upload("score", h5ad, SCORE, Settings())
    assert not (tmp_path / "unpickled").exists()


def test_pickled_objects_in_a_file_stay_bytes(h5ad: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Objects are stored as pandas and numpy might: as text or bytes that a careless reader hands to pickle."""
    import pickle

    monkeypatch.chdir(tmp_path)
    with h5py.File(h5ad, "a") as file:
        file["uns/objects"] = np.void(pickle.dumps(Run()))
        file["uns"].attrs["encoding-type"], file["uns/objects"].attrs["encoding-type"] = "pickle", "object"
        del file["obs/perturbation"]
        labels = [pickle.dumps(Run(), protocol=0)] * 12 + [b"control"] * 12
        made = file.create_dataset("obs/perturbation", data=labels, dtype=h5py.string_dtype())
        made.attrs["encoding-type"], made.attrs["encoding-version"] = "string-array", "0.2.0"
    upload = read_upload("score", h5ad, SCORE, Settings())
    assert isinstance(upload.request, ScoreRequest)
    assert upload.request.perturbations[0].startswith("c")
    assert not (tmp_path / "unpickled").exists()


async def test_a_matrix_by_columns_is_read_in_the_bounds_of_a_reader(h5ad: Path, tiny_cells: CountMatrix) -> None:
    adata = ad.read_h5ad(h5ad)
    adata.X = adata.X.tocsc()
    adata.write_h5ad(h5ad)
    request = (await file_readers().read("embed", h5ad, {}, Settings())).request
    assert isinstance(request, EmbedRequest)
    np.testing.assert_array_equal(request.cells.counts.toarray(), tiny_cells.counts.toarray())


def test_a_sparse_embedding_of_other_cells_is_refused(h5ad: Path) -> None:
    with h5py.File(h5ad, "a") as file:
        group = file.create_group("obsm/other")
        group.attrs["shape"], group.attrs["encoding-type"] = [10**6, 3], "csr_matrix"
        group["indptr"], group["indices"] = np.zeros(10**6 + 1, "i4"), np.zeros(0, "i4")
        group["data"] = np.zeros(0, "f4")
    settings = Settings(max_vectors=2 * 10**6, max_values=10**7)
    with pytest.raises(InvalidInputError, match=r"obsm\['other'\] is of shape \(1000000, 3\) for 24 cells"):
        read_upload("score", h5ad, {**SCORE, "use_rep": "other"}, settings)


def test_what_is_not_asked_for_is_not_read(h5ad: Path) -> None:
    """Damage in uns, in other columns and matrices does not matter to a request that names none of them."""
    with h5py.File(h5ad, "a") as file:
        file["uns/strange"] = np.zeros(3, dtype=[("a", "i4")])
        file["uns"].attrs["encoding-type"] = "no such encoding"
        dataset = file.create_dataset("obsm/broken", (24, 3), "f4", chunks=(24, 3), compression="gzip")
        dataset.id.write_direct_chunk((0, 0), b"no zlib")
    assert isinstance(read_upload("embed", h5ad, {}, Settings()).request, EmbedRequest)
    with pytest.raises(UnreadableFileError):
        read_upload("score", h5ad, {**SCORE, "use_rep": "broken"}, Settings())


def test_a_name_that_is_no_text_is_refused(h5ad: Path) -> None:
    with h5py.File(h5ad, "a") as file:
        h5py.h5g.create(file["obs"].id, b"batch\xff\xfe")
    with pytest.raises(UnreadableFileError, match=r"/obs has the name b'batch\\xff\\xfe', which is not UTF-8"):
        check_file(h5ad, Settings())


def test_links_of_a_kind_that_nobody_knows_are_refused(h5ad: Path) -> None:
    with h5py.File(h5ad, "a") as file:
        file["layers/away"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(UnreadableFileError, match="lies outside"):
        check_file(h5ad, Settings())


def test_no_library_is_loaded_for_a_filter(hostile: dict[str, Path], tmp_path: Path) -> None:
    """The loader is off in the whole process, even if the environment names a folder of plugins."""
    (tmp_path / "libH5Zevil.so").write_bytes(b"\x7fELF")
    script = f"""
import os
import serving.uploads.requests
import h5py
with h5py.File({str(hostile["unknown filter"])!r}) as file:
    try:
        h5py.h5z.filter_avail(32015) and file["uns/bomb"][...]
    finally:
        maps = open("/proc/self/maps").read()
assert "H5Zevil" not in maps
print(os.environ["HDF5_PLUGIN_PRELOAD"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HDF5_PLUGIN_PATH": str(tmp_path), "HDF5_PLUGIN_PRELOAD": "x"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "::"), done.stderr


def test_limits_say_what_to_do(h5ad: Path) -> None:
    with pytest.raises(LimitExceededError, match=r"the limit is 10 rows\. Write the file anew, or send less"):
        check_file(h5ad, Settings(max_cells=10, max_vectors=10, max_genes=10))
