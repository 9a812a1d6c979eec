"""Embed atlases on many machines: each Ray worker holds one model and streams one piece of a file at a time.

``python examples/embed_with_ray.py OUT CELLS.h5ad [CELLS.h5ad ...] --bundle bundles/default --workers 8 --device cuda``

Ray is not a dependency of PerturbScope: ``pip install "ray[data]"``. On a cluster, run ``ray job submit -- python ...``
with files, bundle and OUT on storage that all machines see. A piece is PIECE cells of one file; its vectors
become ``OUT/NAME-FIRST.npy``, float32 [cells, width], in the order of the file. A piece gets its name only when it is
complete, so the same command continues where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from perturbscope.cells.readers import open_cells
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder


class Embed:
    """One worker, which loads its model once and holds one chunk of counts at a time."""

    def __init__(self, bundle: str, out: str, device: Any, threads: int) -> None:
        self.embedder = Embedder.from_bundle(Bundle.open(Path(bundle)), device=device, threads=threads)
        self.out = Path(out)

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        """Embed one piece and write its vectors to its file."""
        began, target = time.perf_counter(), self.out / piece["name"]
        staging = target.with_suffix(".partial")
        with open_cells(piece["path"]) as source:
            shape = (piece["stop"] - piece["start"], self.embedder.width)
            values = np.lib.format.open_memmap(staging, mode="w+", dtype=np.float32, shape=shape)
            starts = range(piece["start"], piece["stop"], source.chunk_cells)
            chunks = (source.rows(start, min(start + source.chunk_cells, piece["stop"])) for start in starts)
            done = 0
            for embeddings in self.embedder.embed_stream(chunks):
                values[done : done + len(embeddings)] = embeddings.values
                done += len(embeddings)
            values.flush()
        os.replace(staging, target)
        return {"name": piece["name"], "cells": done, "seconds": time.perf_counter() - began}


def pieces_of(paths: list[Path], out: Path, size: int) -> list[dict[str, Any]]:
    """List the pieces without a file in OUT."""
    pieces = []
    for path in paths:
        with open_cells(path) as source:
            n_cells = source.n_cells
        for start in range(0, n_cells, size):
            name = f"{path.stem}-{start:012d}.npy"
            if not (out / name).exists():
                stop = min(start + size, n_cells)
                pieces.append({"path": str(path.absolute()), "name": name, "start": start, "stop": stop})
    return pieces


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("cells", type=Path, nargs="+")
    parser.add_argument("--bundle", type=Path, default=Path("bundles/default"))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "tensorrt"])
    parser.add_argument("--workers", type=int, default=2, help="number of models; on GPUs, one for each GPU")
    parser.add_argument("--threads", type=int, default=1, help="processor threads of a worker")
    parser.add_argument("--piece", type=int, default=100_000, help="cells of a piece")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pieces = pieces_of(options.cells, options.out, options.piece)
    if not pieces:
        print("All pieces are embedded already.")
        return

    import ray

    ray.init(ignore_reinit_error=True, logging_level="WARNING")
    arguments = (str(options.bundle.absolute()), str(options.out.absolute()), options.device, options.threads)
    resources = {"num_cpus": options.threads, "num_gpus": 0 if options.device == "cpu" else 1}
    workers = ray.data.ActorPoolStrategy(size=options.workers)
    # One block for each piece: a worker takes the next one when it is free.
    todo = ray.data.from_items(pieces, override_num_blocks=len(pieces))
    began, cells = time.perf_counter(), 0
    for piece in todo.map(Embed, fn_constructor_args=arguments, compute=workers, **resources).iter_rows():
        cells += piece["cells"]
        print(f"{piece['name']}: {piece['cells']:,} cells in {piece['seconds']:.1f} s", flush=True)
    print(f"{cells:,} cells at {cells / (time.perf_counter() - began):,.0f} cells/s")


if __name__ == "__main__":
    main()
