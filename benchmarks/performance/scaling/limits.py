"""The limits that are met first as cells grow to 100 million: bytes and seconds of a cell."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.performance.harness import in_child, resident, table
from benchmarks.performance.tokenization.part import MILLION
from training.config.stages import CorpusConfig
from training.measure.flops import ModelSize, cell_cost

CELLS = 100_000_000
GENES = 1_500
"""Expressed genes of a cell, and so its tokens: an assumption, between droplet (700 to 2,500) and deeper protocols."""
PERTURBATIONS = 10_000
WIDTH = 256
BF16_PEAK, SHARE = 989e12, 0.35
"""Peak of an H100 SXM without sparsity, FLOP/s, by its data sheet, and the share that embedding is assumed to reach."""
SOFT_FILES = 1_024
"""Usual limit of the open files of a process."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A quantity that grows with cells, and its bound.

    Attributes
    ----------
    what
        Name of the quantity.
    each
        Amount for one cell.
    bound
        Largest amount.
    unit
        Unit of both amounts.
    basis
        Origin of `each`: counted or measured.
    way
        Way by which 100 million cells get past it.
    """

    what: str
    each: float
    bound: float
    unit: str
    basis: str
    way: str

    @property
    def reached(self) -> float:
        """Number of cells at which the bound is met."""
        return self.bound / self.each


def limits(laws: dict[str, list[dict[str, float]]], *, quick: bool) -> tuple[str, dict[str, Any]]:
    """Return the tables of limits, ordered by the cells at which they are met, and of times."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n_labels = 20_000 if quick else 1_000_000
    labels, _ = in_child(bytes_of_labels, n_labels)
    message = 2**31
    rows = [
        Limit(
            what="All counts in memory (CSR, int32 and int32)", each=8 * GENES + 8, bound=memory, unit="B",
            basis="counted", way="streamed: chunks of 4,096 cells",
        ),
        Limit(
            what="Stored counts that int32 can number", each=GENES, bound=2**31, unit="", basis="counted",
            way="row starts are int64 everywhere; a test reads past 2^31",
        ),
        Limit(
            what="One protobuf message of counts", each=8 * GENES, bound=message, unit="B", basis="counted",
            way="EmbedStream: a chunk a message",
        ),
        Limit(
            what="Vectors in memory, float32", each=4 * WIDTH, bound=memory, unit="B", basis="counted",
            way="`perturbscope embed` maps them from a file; or shards",
        ),
        Limit(
            what="Labels as Python strings", each=labels["labels"], bound=memory, unit="B", basis="measured",
            way="one shard at a time",
        ),
        Limit(
            what="Names of cells", each=labels["ids"], bound=memory, unit="B", basis="measured", way="the same",
        ),
        Limit(
            what="Row starts of one file, int64", each=8, bound=memory, unit="B", basis="counted",
            way="the same",
        ),
        Limit(
            what="Shards of a training corpus, open files", each=2 * GENES / CorpusConfig.shard_tokens,
            bound=SOFT_FILES, unit="", basis="counted", way="`ulimit -n`, or a larger corpus.shard_tokens",
        ),
    ]  # fmt: skip
    met = sorted(rows, key=lambda row: row.reached)
    text = (
        f"### What gives way first\n\nAt {CELLS:,} cells of {GENES:,} expressed genes (assumed), a vector of {WIDTH} "
        f"float32, on this machine ({memory / 2**30:.0f} GiB; {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} open "
        f"files, {SOFT_FILES:,} where nobody raised it). In the order in which they are met in one process over one "
        "file.\n\n"
    )
    text += table(
        ("what", "a cell", "100 million", "met at", "from", "what carries it"),
        [
            (
                row.what,
                quantity(row.each, row.unit),
                quantity(row.each * CELLS, row.unit),
                f"{row.reached:,.0f} cells",
                row.basis,
                row.way,
            )
            for row in met
        ],
    )
    times, numbers = durations(laws)
    return text + "\n" + times, {
        "limits": {row.what: {"each": row.each, "reached": row.reached} for row in met},
        "times": numbers,
        "machine_bytes": memory,
    }


def durations(laws: dict[str, list[dict[str, float]]]) -> tuple[str, dict[str, float]]:
    """Estimate each step at 100 million cells, from the laws' largest points, and on GPUs from FLOP."""
    genes = float(np.diff(counts_of_million().counts.indptr).mean())
    last = laws["stream-cells"][-1]
    streaming = last["seconds"] / last["size"] * GENES / genes * CELLS
    last = laws["tokenize-genes"][-1]
    tokenizing = last["seconds"] / 2000 * GENES / last["size"] * CELLS
    lengths = np.log([point["size"] for point in laws["embed-length"]])
    seconds = np.log([point["seconds"] for point in laws["embed-length"]])
    embedding = float(np.exp(np.interp(np.log(GENES), lengths, seconds))) * CELLS
    flop = cell_cost(ModelSize(), GENES, layers=5).forward * CELLS
    gpu = flop / (BF16_PEAK * SHARE)
    last = laws["score-perturbations"][-1]
    scoring = last["seconds"] / last["size"] * PERTURBATIONS
    last = laws["map-perturbations"][-1]
    mapping = last["seconds"] * (PERTURBATIONS / last["size"]) ** 2
    found = {
        "stream": streaming,
        "tokenize": tokenizing,
        "embed": embedding,
        "gpu": gpu,
        "gpu8": gpu / 8,
        "score": scoring,
        "map": mapping,
    }
    rows = [
        ("Read and tokenize, one process", span(streaming), "scaled from the largest file above by genes"),
        ("Tokenize alone, from memory", span(tokenizing), "scaled from the deepest cells above"),
        ("Embed on this machine, model of the paper's shape", span(embedding), f"interpolated at {GENES:,} tokens"),
        (
            "Embed on one H100",
            span(gpu),
            f"projected: {flop:.2g} FLOP at {SHARE:.0%} of {BF16_PEAK / 1e12:.0f} TFLOP/s",
        ),
        ("Embed on eight", span(gpu / 8), "projected: shards share nothing"),
        (f"Score {PERTURBATIONS:,} perturbations of 100 cells", span(scoring), "scaled; other sizes: the laws above"),
        ("Map of all pairs of them, 50 cells each, exact", span(mapping), "scaled with the square"),
        (
            "Tokens on disk",
            f"{2 * GENES * CELLS / 1e9:,.0f} GB",
            f"uint16; {GENES * CELLS / CorpusConfig.shard_tokens:,.0f} shards of 2^28 tokens",
        ),
        ("Vectors on disk", f"{4 * WIDTH * CELLS / 1e9:,.0f} GB", "float32"),
        (
            "Tokenizing processes that feed eight H100",
            f"{streaming / (gpu / 8):.0f}",
            "of the first row: reading, and not the GPU, comes next",
        ),
    ]
    head = f"### {CELLS:,} cells: time and disk\n\n"
    return head + table(("step", "", "how it was found"), rows), found


def counts_of_million() -> Any:
    """Read some cells of the file that the streaming law repeats."""
    from benchmarks.performance.harness import DATA
    from perturbscope.cells.readers import open_cells

    with open_cells(DATA / f"{MILLION}.h5ad") as source:
        return source.rows(0, 4096)


def bytes_of_labels(n_cells: int) -> dict[str, float]:
    """Measure the bytes of a label and of a cell's name; for a fresh process."""
    import anndata
    import pandas as pd
    from scipy import sparse

    from perturbscope.cells.readers.memory import AnnDataSource

    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(
                np.arange(n_cells) % 1000, pd.Index([f"gene{i}" for i in range(1000)])
            )
        },
        index=[f"AAACCTGAGAAACC{number:08d}-1" for number in range(n_cells)],
    )
    made: Any = sparse.csr_matrix  # its stubs know no empty matrix
    matrix = made((n_cells, 2), dtype=np.float32)
    source = AnnDataSource(anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=["STAT1", "JAK2"])))
    found = {}
    for name, read in (("labels", lambda: list(source.labels("perturbation"))), ("ids", lambda: source.cell_ids)):
        before = resident()
        kept = read()
        found[name] = max(resident() - before, 0.0) * 2**20 / len(kept)
    return found


def quantity(value: float, unit: str) -> str:
    """Write a quantity with three digits and a prefix."""
    if unit == "B":
        for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= size:
                return f"{value / size:,.3g} {prefix}B"
        return f"{value:,.3g} B"
    return f"{value:,.3g}"


def span(seconds: float) -> str:
    """Write seconds in a suitable unit."""
    for size, name in ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.0f} s"
