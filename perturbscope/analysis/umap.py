"""A map of the cells: their vectors in two dimensions, by UMAP (McInnes et al. 2018).

UMAP shows neighbourhoods. Sizes of clusters and distances between far clusters mean little: a map is for looking, the
scores are for conclusions. scranpy (umappp, in C++) computes it and is imported only when a map is made; scoring does
not depend on it. It comes with ``perturbscope[report]``. umap-learn makes maps as good (it keeps 27 and 19 % of
the nearest neighbours of cells of Kang and Papalexi, where scranpy keeps 27 and 18 %), but compiles itself anew in
every process, for 6 to 26 seconds.

``python -m perturbscope.analysis.umap`` reads vectors from stdin and writes coordinates to stdout (both ``.npy``), for
servers: making a map holds the interpreter's lock, which would stop their other requests.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from perturbscope.errors import (
    InvalidParameterError,
    MalformedMatrixError,
    PerturbScopeError,
    ProviderUnavailableError,
    TooFewCellsError,
)
from perturbscope.scoring.distances import check_rows, unit_rows
from perturbscope.scoring.statistics import generator

NEIGHBORS, MIN_DIST, MAX_CELLS = 15, 0.1, 5000
_ROWS = 1024
"""Rows of the distance matrix that are in memory at a time."""
_one_map = threading.Lock()
"""Held while a process makes a map, which takes some hundred MiB: one is made at a time."""


class Projector(Protocol):
    """Computes coordinates of vectors: :func:`umap_coordinates`, or the same in another process."""

    def __call__(
        self, embeddings: ArrayLike, /, *, n_neighbors: int, min_dist: float, seed: int
    ) -> NDArray[np.float32]:
        """Return coordinates, float32 [n, 2]."""
        ...


@dataclass(frozen=True, eq=False)
class Projection:
    """Cells on a map.

    Attributes
    ----------
    coordinates
        Coordinates of the m cells shown, float32 [m, 2].
    labels
        Perturbation of each of the m cells.
    rows
        Positions of the m cells among all cells, ascending.
    provenance
        Method, parameters, seed, and number of cells shown and of all cells.
    """

    coordinates: NDArray[np.float32]
    labels: list[str]
    rows: NDArray[np.intp]
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """Return a table with one row a cell: ``row, perturbation, umap1, umap2``."""
        return pd.DataFrame(
            {
                "row": self.rows,
                "perturbation": self.labels,
                "umap1": self.coordinates[:, 0],
                "umap2": self.coordinates[:, 1],
            }
        )


def is_available() -> bool:
    """Whether scranpy is installed."""
    return find_spec("scranpy") is not None


def project(
    embeddings: ArrayLike,
    labels: Sequence[str],
    *,
    max_cells: int = MAX_CELLS,
    n_neighbors: int = NEIGHBORS,
    min_dist: float = MIN_DIST,
    normalize: bool = True,
    seed: int = 0,
    projector: Projector | None = None,
) -> Projection:
    """Make a map of cells, or of a stratified sample of them.

    Parameters
    ----------
    embeddings
        One vector a cell, [n, width].
    labels
        Perturbation of each cell.
    max_cells
        Most cells on the map; see :func:`stratified_sample`.
    n_neighbors, min_dist
        Parameters of UMAP: how local its view is, and how tightly it packs points.
    normalize
        Whether to scale vectors to unit length first, as scoring does.
    seed
        Seed of the sample and of UMAP.
    projector
        Function that computes the coordinates; default :func:`umap_coordinates`.

    Raises
    ------
    ProviderUnavailableError
        scranpy is not installed.
    TooFewCellsError
        There are not more cells than neighbours.
    InvalidEmbeddingError, MalformedMatrixError, InvalidParameterError
        A vector is not finite, the number of labels differs from that of cells, or an option is out of range.
    """
    values = check_rows(embeddings)
    if len(labels) != len(values):
        raise MalformedMatrixError(f"{len(values)} cells, but {len(labels)} labels; give one a cell.", field="labels")
    rows = stratified_sample(labels, max_cells, seed=seed)
    shown = unit_rows(values[rows]) if normalize else values[rows]
    coordinates = (projector or umap_coordinates)(
        shown.astype(np.float32), n_neighbors=n_neighbors, min_dist=min_dist, seed=seed
    )
    facts = {
        "method": "UMAP (scranpy)",
        "n_neighbors": n_neighbors,
        "min_dist": min_dist,
        "seed": seed,
        "unit_length": normalize,
        "n_cells": len(values),
        "n_shown": len(rows),
    }
    return Projection(coordinates, [str(labels[row]) for row in rows], rows, facts)


def umap_coordinates(
    embeddings: ArrayLike, /, *, n_neighbors: int = NEIGHBORS, min_dist: float = MIN_DIST, seed: int = 0
) -> NDArray[np.float32]:
    """Compute UMAP of vectors by Euclidean distance, from their exact nearest neighbours.

    Parameters
    ----------
    embeddings
        Vectors, [n, width]; n must be above `n_neighbors`.
    n_neighbors, min_dist, seed
        See :func:`project`. The same seed gives the same map on the same machine and versions.

    Returns
    -------
    Coordinates, float32 [n, 2].

    Raises
    ------
    ProviderUnavailableError, TooFewCellsError, InvalidEmbeddingError, InvalidParameterError
        See :func:`project`.
    """
    values = check_rows(embeddings).astype(np.float32)
    if n_neighbors < 2:
        raise InvalidParameterError(f"n_neighbors is {n_neighbors}; it must be 2 or more.", field="n_neighbors")
    if not 0 <= min_dist <= 1:
        raise InvalidParameterError(f"min_dist is {min_dist}; it must be from 0 to 1.", field="min_dist")
    if len(values) <= n_neighbors:
        raise TooFewCellsError(
            f"A map needs more cells than neighbours: {len(values)} cells, n_neighbors {n_neighbors}.",
            field="embeddings",
        )
    if not is_available():
        raise ProviderUnavailableError(
            "A map of the cells needs scranpy, which is not installed here: pip install 'perturbscope[report]'.",
            field="projection",
        )
    import knncolle
    import scranpy

    rows, distances = nearest(values, n_neighbors)
    random = generator(seed, "umap")
    coordinates = scranpy.run_umap(
        knncolle.FindKnnResults(
            # As in umap-learn, a cell is the first of its own neighbours.
            index=np.ascontiguousarray(rows[:, 1:], dtype=np.uint32),
            distance=np.ascontiguousarray(distances[:, 1:], dtype=np.float64),
        ),
        min_dist=min_dist,
        # Where the graph of neighbours falls apart, there is no spectral layout: clouds then begin where they lie.
        initial_coordinates=_principal(values),
        initialize_random_on_spectral_fail=False,
        initialize_seed=int(random.integers(2**31)),
        optimize_seed=int(random.integers(2**31)),
        num_threads=1,
    )
    return np.ascontiguousarray(coordinates, dtype=np.float32)


def _principal(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return two principal components, [n, 2], scaled to lie within 10 of the origin, as UMAP begins."""
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    found = centred @ axes[:, : -(min(2, axes.shape[1]) + 1) : -1]
    found = np.pad(found, ((0, 0), (0, 2 - found.shape[1])))
    largest: float = np.abs(found).max()
    return np.ascontiguousarray(found * (10 / largest if largest > 0 else 0))


def umap_in_process(
    embeddings: ArrayLike,
    /,
    *,
    n_neighbors: int = NEIGHBORS,
    min_dist: float = MIN_DIST,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> NDArray[np.float32]:
    """Run :func:`umap_coordinates` in a process of its own, one at a time.

    Parameters
    ----------
    embeddings, n_neighbors, min_dist, seed
        See :func:`umap_coordinates`.
    check
        Called twenty times a second; an error that it raises ends the process and is raised here.
    """
    options = json.dumps({"n_neighbors": n_neighbors, "min_dist": min_dist, "seed": seed})
    command = [sys.executable, "-m", "perturbscope.analysis.umap", options]
    while not _one_map.acquire(timeout=0.05):
        check()
    try:
        return _run(command, check_rows(embeddings).astype(np.float32), check)
    finally:
        _one_map.release()


def _run(command: list[str], values: NDArray[np.float32], check: Callable[[], None]) -> NDArray[np.float32]:
    # Files and not pipes: a pipe that nobody reads while the other side waits would stop both.
    with tempfile.TemporaryFile() as sent, tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as errors:
        np.save(sent, values, allow_pickle=False)
        sent.seek(0)
        process = subprocess.Popen(command, stdin=sent, stdout=answer, stderr=errors)  # noqa: S603  ours, no shell
        try:
            while process.poll() is None:
                check()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            why = lines[-1] if lines else f"exit code {process.returncode}"
            raise ProviderUnavailableError(f"The map could not be made: {why}", field="projection")
        answer.seek(0)
        return np.asarray(np.load(answer, allow_pickle=False), dtype=np.float32)


def nearest(values: NDArray[np.float32], k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return positions and Euclidean distances of each row's `k` nearest rows, itself first, both [n, k], ascending."""
    squares = np.einsum("ij,ij->i", values, values)
    neighbours, distances = [], []
    for start in range(0, len(values), _ROWS):
        part = values[start : start + _ROWS]
        squared = squares[start : start + _ROWS, None] + squares[None] - 2 * (part @ values.T)
        np.maximum(squared, 0, out=squared)
        squared[np.arange(len(part)), np.arange(start, start + len(part))] = -1  # itself first, duplicates or not
        near = np.argpartition(squared, k - 1, axis=1)[:, :k]
        order = np.argsort(np.take_along_axis(squared, near, axis=1), axis=1, kind="stable")
        near = np.take_along_axis(near, order, axis=1)
        neighbours.append(near.astype(np.int32))
        distances.append(np.sqrt(np.maximum(np.take_along_axis(squared, near, axis=1), 0)).astype(np.float32))
    return np.concatenate(neighbours), np.concatenate(distances)


def stratified_sample(labels: Sequence[str], max_cells: int, *, seed: int = 0) -> NDArray[np.intp]:
    """Sample positions of at most `max_cells` cells, ascending, such that small groups stay visible.

    Half of the places are shared evenly among the groups, the rest in proportion to the cells that are left.
    """
    if max_cells < 1:
        raise InvalidParameterError(f"max_cells is {max_cells}; it must be 1 or more.", field="max_cells")
    if len(labels) <= max_cells:
        return np.arange(len(labels))
    names, codes, sizes = np.unique(np.asarray(labels, dtype=str), return_inverse=True, return_counts=True)
    quota = np.minimum(sizes, max_cells // (2 * len(names)))
    left = sizes - quota
    quota = quota + (left * (max_cells - quota.sum()) / left.sum()).astype(int)
    samples = [
        generator(seed, "map", name).choice(np.flatnonzero(codes == code), quota[code], replace=False)
        for code, name in enumerate(names)
    ]
    return np.sort(np.concatenate(samples))


def main() -> int:
    """Write coordinates of the vectors on stdin to stdout; the first argument holds the options as JSON."""
    values = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    try:
        coordinates = umap_coordinates(values, **json.loads(sys.argv[1]))
    except PerturbScopeError as error:
        sys.stderr.write(error.message.replace("\n", " ") + "\n")
        return 1
    np.save(sys.stdout.buffer, coordinates, allow_pickle=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
