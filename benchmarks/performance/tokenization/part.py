"""Rank tokens: cells per second in memory and from disk, and the memory of a million cells.

The cells are those of real files. In memory, every route starts from the same validated counts with genes looked up.
From disk, a file is opened, read in chunks and tokenized, as embedding does. A route on one core runs in a process that
is restricted to one core.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.performance.harness import DATA, Options, Section, in_child, race, resident, table
from benchmarks.performance.tokenization.routes import check_equal, routes
from perturbscope.cells.readers import CHUNK_CELLS, open_cells
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families.rank import RankFamily, build
from perturbscope.threads import ahead, usable_cores

FILES = ("kang2018_ifnb_pbmc", "baron2016_pancreas", "pbmc3k_10x", "papalexi2021_eccite_thp1_panel")
MILLION = "kang2018_ifnb_pbmc"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
HELICAL_CELLS = 1024
"""Number of cells for helical, which is slow."""
SIZES = (250_000, 500_000, 1_000_000)


def run(options: Options) -> Section:
    """Run the whole part."""
    files = FILES[2:] if options.quick else FILES
    memory = [in_child(in_memory, name, options.repeats, environment=ONE_THREAD)[0] for name in files]
    for found in memory:
        found |= helical(found["file"], options)
    disk = [
        in_child(from_disk, name, cores, options.repeats)[0]
        for name in files
        for cores in sorted({1, min(2, usable_cores())})
    ]
    sizes = (5_000, 10_000) if options.quick else SIZES
    million = growth(sizes, compressions=(None,) if options.quick else ("gzip", None))
    text = [_memory_table(memory), _disk_table(disk), _growth_table(million)]
    return Section("\n".join(text), {"memory": memory, "disk": disk, "growth": million})


def family() -> RankFamily:
    """Return a tokenizer with the default vocabulary and at most 2,048 tokens."""
    return build({"max_length": 2048}, GeneVocabulary.geneformer_gc30m())


def hold_to(cores: int) -> None:
    """Restrict this process to some of its cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def in_memory(name: str, repeats: int) -> dict[str, Any]:
    """Measure cells per CPU second of every route over one chunk of a file, on one core."""
    hold_to(1)
    tokenizer = family()
    with open_cells(DATA / f"{name}.h5ad") as source:
        cells = source.rows(0, CHUNK_CELLS)
    n_tokens = check_equal(cells, tokenizer)
    turns = race(routes(cells, tokenizer), repeats, clock="cpu")
    rates = {route: len(cells) / found.median for route, found in turns.items()}
    genes = float(np.median(np.diff(cells.counts.indptr)))
    return {"file": name, "cells": len(cells), "genes": genes, "tokens": n_tokens, "rates": rates}


def helical(name: str, options: Options) -> dict[str, Any]:
    """Tokenize the same cells with helical, if the peers' environment has it."""
    if options.peers is None or subprocess.run([options.peers, "-c", "import helical"], capture_output=True).returncode:
        return {}
    tokenizer = family()
    with open_cells(DATA / f"{name}.h5ad") as source:
        cells = source.rows(0, HELICAL_CELLS)
    vocabulary = tokenizer.vocabulary
    rows = tokenizer.resolver.map(cells.gene_ids, vocabulary).rows
    genes = [vocabulary.gene_ids[row] if row >= 0 else f"unknown-{at}" for at, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        source_path, target = Path(folder) / "cells.npz", Path(folder) / "tokens.npz"
        np.savez(
            source_path,
            **{part: getattr(cells.counts, part) for part in ("data", "indices", "indptr")},
            genes=genes,
            vocabulary=list(vocabulary.gene_ids),
            tokens=vocabulary.tokens,
            medians=vocabulary.medians,
        )
        script = Path(__file__).with_name("helical_peer.py")
        command = [str(options.peers), str(script), str(source_path), str(target), str(min(3, options.repeats))]
        subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})
        found = np.load(target)
        ours = tokenizer.tokenize(cells)
        equal = sum(
            np.array_equal(found["tokens"][a:b], cell["input_ids"])
            for a, b, cell in zip(found["offsets"], found["offsets"][1:], ours, strict=False)
        )
    rate = len(cells) / float(np.median(found["seconds"]))
    return {"helical": rate, "helical version": str(found["version"]), "equal to helical": [equal, len(cells)]}


def from_disk(name: str, cores: int, repeats: int) -> dict[str, Any]:
    """Measure cells per second (elapsed) of reading a file, of tokenizing it, and of both."""
    hold_to(cores)
    tokenizer, path = family(), DATA / f"{name}.h5ad"
    with open_cells(path) as source:
        chunks = list(source)
        n_cells = source.n_cells
    tokenizer.tokenize(chunks[0])

    timed: dict[str, Callable[[], object]] = {
        "read": lambda: stream(path, None),
        "tokenize": lambda: [tokenizer.tokenize(chunk) for chunk in chunks],
        "both": lambda: stream(path, tokenizer),
    }
    rates = {route: n_cells / found.median for route, found in race(timed, repeats).items()}
    return {"file": name, "cores": cores, "cells": n_cells, "rates": rates}


def stream(path: Path, tokenizer: RankFamily | None) -> int:
    """Read a file chunk by chunk; tokens are counted and thrown away.

    With a second core, a chunk is read while the one before it is tokenized, as in the builder of corpora.
    """
    n_tokens = 0
    with open_cells(path) as source:
        for chunk in ahead(source) if tokenizer is not None and usable_cores() > 1 else source:
            if tokenizer is not None:
                n_tokens += len(tokenizer.tokenize(chunk).arrays["input_ids"])
    return n_tokens


def growth(sizes: tuple[int, ...], compressions: tuple[str | None, ...]) -> list[dict[str, Any]]:
    """Stream files of growing size, each in a process of its own; seconds and memory of each."""
    found = []
    for compression in compressions:
        with tempfile.TemporaryDirectory(prefix="perturbscope-bench-") as folder:
            path = Path(folder) / "cells.h5ad"
            for size in sizes:
                write_tiled(path, size, compression)
                result, peak = in_child(measured_stream, path)
                found.append({"cells": size, "compression": compression or "none", **result, "peak": peak})
    return found


def measured_stream(path: Path) -> dict[str, float]:
    """Return seconds and tokens of one pass, and the process's memory before it, MiB."""
    tokenizer = family()
    with open_cells(path) as source:
        tokenizer.tokenize(source.rows(0, 64))
    before, started = resident(), time.perf_counter()
    n_tokens = stream(path, tokenizer)
    return {
        "before": before,
        "seconds": time.perf_counter() - started,
        "tokens": n_tokens,
        "bytes": path.stat().st_size,
    }


def write_tiled(path: Path, n_cells: int, compression: str | None) -> None:
    """Write an .h5ad that repeats the real cells; a smaller file of the same kind is continued."""
    with h5py.File(DATA / f"{MILLION}.h5ad") as source, h5py.File(path, "a") as target:
        if "X" not in target:
            for name, value in source.attrs.items():
                target.attrs[name] = value
            source.copy("var", target)
            target.create_group("X").attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            target["X"].create_dataset("indptr", data=np.zeros(1, np.int64), maxshape=(None,), chunks=(65_536,))
            for name in ("data", "indices"):
                given = source["X"][name]
                kind = {"dtype": given.dtype, "maxshape": (None,), "chunks": given.chunks, "shape": (0,)}
                target["X"].create_dataset(name, **kind, compression=compression, shuffle=compression is not None)
        matrix = target["X"]
        starts = source["X"]["indptr"][:].astype(np.int64)
        values = {name: source["X"][name][:] for name in ("data", "indices")}
        while (done := len(matrix["indptr"]) - 1) < n_cells:
            first = done % (len(starts) - 1)
            rows = slice(first, min(len(starts) - 1, first + n_cells - done))
            begin, end = starts[rows.start], starts[rows.stop]
            filled = len(matrix["data"])
            for name, array in values.items():
                matrix[name].resize((filled + end - begin,))
                matrix[name][filled:] = array[begin:end]
            matrix["indptr"].resize((done + 1 + rows.stop - rows.start,))
            matrix["indptr"][done + 1 :] = starts[rows.start + 1 : rows.stop + 1] - begin + filled
        matrix.attrs["shape"] = (n_cells, len(source["var"][source["var"].attrs["_index"]]))
        if "obs" in target:
            del target["obs"]
        obs = target.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        obs.attrs["column-order"] = np.zeros(0, dtype="S1")
        names = np.char.add("cell", np.arange(n_cells).astype("U8")).astype("S12")
        obs.create_dataset("_index", data=names.astype(object), dtype=h5py.string_dtype())


def _memory_table(rows: list[dict[str, Any]]) -> str:
    columns = ["File", "Cells", "Genes a cell", "PerturbScope", "published", "loop", "loop, ties", "one sort"]
    peer = any("helical" in row for row in rows)
    if peer:
        columns.append(f"helical {rows[0]['helical version']}")
    columns.append("PerturbScope over published, loop, loop with ties")
    lines = []
    for row in rows:
        rates = row["rates"]
        ours = rates["PerturbScope"]
        times = ", ".join(f"{ours / rates[name]:.1f} x" for name in ("published", "loop", "loop, ties"))
        line = [row["file"], f"{row['cells']:,}", f"{row['genes']:,.0f}", *(f"{rate:,.0f}" for rate in rates.values())]
        lines.append([*line, *([f"{row['helical']:,.0f}"] if peer else []), times])
    n_tokens = sum(row["tokens"] for row in rows)
    text = (
        "In memory, cells per CPU second on one core, over the first chunk of each file. *Published*: Geneformer's "
        "tokenizer, restated (a normalised sparse matrix, a row at a time, `argsort`); *loop*: the same over the bare "
        "CSR arrays; *ties*: equal values in the order of tokens, as PerturbScope promises; *one sort*: one `lexsort` "
        f"over all cells. All routes gave the same {n_tokens:,} tokens.\n\n"
    )
    if peer:
        equal, cells = np.sum([row["equal to helical"] for row in rows], axis=0)
        text = text.rstrip() + f" helical, in its own process, over fewer cells: {equal:,} of {cells:,} the same.\n\n"
    return text + table(columns, lines)


def _disk_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["file"], f"{row['cells']:,}", row["cores"], *(f"{rate:,.0f}" for rate in row["rates"].values())]
        for row in rows
    ]
    return (
        "From disk (page cache), cells per second of the wall: opening and reading with every check, tokenizing what "
        "was read, and both in one stream, where a second core reads ahead.\n\n"
        + table(["File", "Cells", "Cores", "Reading", "Tokenizing", "Both"], lines)
    )


def _growth_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["compression"],
            f"{row['cells']:,}",
            f"{row['bytes'] / 2**20:,.0f}",
            f"{row['seconds']:.1f}",
            f"{row['cells'] / row['seconds']:,.0f}",
            f"{row['before']:.0f}",
            f"{row['peak']:.0f}",
        ]
        for row in rows
    ]
    columns = ["Compression", "Cells", "File, MiB", "Seconds", "Cells/s", "Memory before, MiB", "Highest, MiB"]
    return (
        f"Streamed from disk: {MILLION}, repeated, read and tokenized in chunks of {CHUNK_CELLS:,} cells on "
        f"{usable_cores()} cores, a process for each file. Memory is resident memory.\n\n" + table(columns, lines)
    )
