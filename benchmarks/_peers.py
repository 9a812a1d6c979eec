"""Distances and tests of pertpy and scPerturb, computed by these programs in an environment of their own.

    PYTHON benchmarks/_peers.py INPUT.npz OUTPUT.json PART [PART ...]

:func:`ask` writes INPUT, runs this file with the peers' interpreter and reads OUTPUT. Nothing of PerturbScope is
imported here, so that nothing of it can leak into the peers' numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

CONTROL = "control"
PROGRAMS = ("pertpy", "scperturb", "statsmodels", "scikit-learn", "scipy", "numpy", "pandas")


def ask(
    python: Path,
    values: np.ndarray,
    labels: np.ndarray,
    *parts: str,
    permutations: int = 1000,
    transported: Sequence[str] = (),
    repeats: int = 1,
) -> dict[str, Any]:
    """Run parts of this file with another interpreter.

    Parameters
    ----------
    python
        Interpreter of an environment with requirements/peers.txt.
    values, labels
        Vectors [cells, width] and the label of each cell.
    parts
        Keys of :data:`PARTS`.
    permutations
        Exchanges of labels of each test.
    transported
        Labels whose Wasserstein distance from control is computed.
    repeats
        Timed calls of each map.

    Returns
    -------
    ``versions`` of the programs, CPU ``seconds`` of each part, and the results by part.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder, "in.npz"), Path(folder, "out.json")
        np.savez(
            given,
            values=values,
            labels=labels,
            permutations=permutations,
            transported=np.array(transported, dtype=str),
            repeats=repeats,
        )
        subprocess.run([str(python), __file__, str(given), str(answer), *parts], check=True)
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


@dataclass(frozen=True)
class Cells:
    """The arguments of :func:`ask`."""

    values: np.ndarray
    labels: np.ndarray
    permutations: int
    transported: list[str]
    repeats: int

    def adata(self, *, by_label: bool = False, every: int = 1) -> anndata.AnnData:
        """One cell in `every`, in the given order or sorted by label: pertpy 1.0.3 needs them sorted."""
        values, labels = self.values[::every], self.labels[::every]
        if by_label:
            order = np.argsort(labels, kind="stable")
            values, labels = values[order], labels[order]
        names = [f"cell{i}" for i in range(len(labels))]
        adata = anndata.AnnData(np.zeros((len(labels), 1), dtype=np.float32), obs=pd.DataFrame(index=names))
        adata.obs["perturbation"] = labels.astype(str)
        adata.obsm["X_pca"] = values
        return adata

    @property
    def controls(self) -> np.ndarray:
        """Vectors of the control cells."""
        return self.values[self.labels == CONTROL]


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """Result of a call, and the median of its seconds over `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def distances(cells: Cells) -> dict[str, dict[str, float]]:
    """E-distance of every label to control, by program, path and option."""
    import pertpy
    import scperturb

    adata, controls = cells.adata(), cells.controls
    names = sorted(set(cells.labels) - {CONTROL})
    distance = pertpy.tl.Distance("edistance", obsm_key="X_pca")
    one_sided = distance.onesided_distances(adata, "perturbation", selected_group=CONTROL, show_progressbar=False)
    result = {
        "pertpy, two matrices": {name: float(distance(cells.values[cells.labels == name], controls)) for name in names},
        "pertpy, precomputed": {name: float(one_sided[name]) for name in names},
    }
    for ground in ("sqeuclidean", "euclidean"):
        for correct in (True, False):
            table = scperturb.edist_to_control(
                adata, "perturbation", CONTROL, dist=ground, sample_correct=correct, n_jobs=1, verbose=False
            )
            key = f"scperturb, {ground}, sample_correct={correct}"
            result[key] = {name: float(table.loc[name, "distance"]) for name in names}
    return result


def pertpy_test(adata: anndata.AnnData, permutations: int) -> pd.DataFrame:
    """pertpy's E-test of every label against control."""
    import pertpy

    test = pertpy.tl.DistanceTest("edistance", n_perms=permutations, obsm_key="X_pca")
    return test(adata, groupby="perturbation", contrast=CONTROL, show_progressbar=False)


def scperturb_test(adata: anndata.AnnData, runs: int, **options: Any) -> pd.DataFrame:
    """scPerturb's E-test in one process: two would hold the distances twice."""
    import scperturb

    return scperturb.etest(adata, "perturbation", runs=runs, n_jobs=1, verbose=False, **options)


def tests(cells: Cells) -> dict[str, Any]:
    """E-tests: pertpy's with the cells as given and in the order of their labels, and scPerturb's."""
    result: dict[str, Any] = {}
    for name, by_label in (("given", False), ("sorted", True)):
        adata = cells.adata(by_label=by_label)
        table = pertpy_test(adata, cells.permutations)
        result[f"pertpy, cells {name}"] = table[["distance", "pvalue", "pvalue_adj"]].to_dict("index")
        result[f"order, cells {name}"] = [str(label) for label in adata.obs["perturbation"].unique()]
    np.random.seed(0)  # noqa: NPY002 - scPerturb draws from the global generator
    table = scperturb_test(cells.adata(), cells.permutations).rename(columns={"edist": "distance"})
    result["scperturb"] = table[["distance", "pvalue", "pvalue_adj"]].to_dict("index")
    return result


def wasserstein(cells: Cells) -> dict[str, float]:
    """pertpy's Wasserstein distance of each transported label from control."""
    import pertpy

    distance = pertpy.tl.Distance("wasserstein", obsm_key="X_pca")
    return {name: float(distance(cells.values[cells.labels == name], cells.controls)) for name in cells.transported}


def race(cells: Cells) -> dict[str, Any]:
    """Seconds, distances and p of both E-tests with the unsquared distance, and seconds of scipy's distances.

    Imports and a first call over a tenth of the cells, which compiles what is compiled, are not timed.
    """
    from scipy.spatial.distance import cdist

    np.random.seed(0)  # noqa: NPY002 - scPerturb draws from the global generator
    result: dict[str, Any] = {}
    for name, test, column in (
        ("pertpy", pertpy_test, "distance"),
        ("scperturb", lambda adata, runs: scperturb_test(adata, runs, dist="euclidean"), "edist"),
    ):
        test(cells.adata(by_label=True, every=10), 2)
        adata = cells.adata(by_label=True)
        table, seconds = timed(lambda test=test, adata=adata: test(adata, cells.permutations))
        result[name] = {"seconds": seconds, "distance": table[column].to_dict(), "p": table["pvalue"].to_dict()}
    groups = [cells.values[cells.labels == name] for name in np.unique(cells.labels)]
    _, seconds = timed(lambda: [cdist(group, cells.controls) for group in groups])
    return {**result, "cdist": {"seconds": seconds}}


def maps(cells: Cells) -> dict[str, Any]:
    """Seconds and results of the E-distances between all labels, and of the transported labels from control.

    Imports and a first call are not timed.
    """
    import pertpy
    import scperturb

    adata = cells.adata(by_label=True)
    energy = pertpy.tl.Distance("edistance", obsm_key="X_pca")
    transport = pertpy.tl.Distance("wasserstein", obsm_key="X_pca")
    routes: dict[str, Callable[[], pd.DataFrame]] = {
        "pertpy": lambda: energy.pairwise(adata, groupby="perturbation", show_progressbar=False),
        "scperturb": lambda: scperturb.edist(adata, "perturbation", dist="euclidean", n_jobs=1, verbose=False),
    }
    result: dict[str, Any] = {}
    for name, route in routes.items():
        route()
        table, seconds = timed(route, cells.repeats)
        ordered = table.loc[sorted(table.index), sorted(table.columns)].astype(float)
        result[name] = {"map": ordered.to_numpy().tolist(), "names": list(ordered.index), "seconds": seconds}
    result["wasserstein"] = {}
    for name in cells.transported:
        group = cells.values[cells.labels == name]
        transport(group, cells.controls)
        value, seconds = timed(lambda group=group: float(transport(group, cells.controls)))
        result["wasserstein"][name] = {"value": value, "seconds": seconds}
    return result


PARTS: dict[str, Callable[[Cells], Any]] = {
    "distances": distances,
    "tests": tests,
    "wasserstein": wasserstein,
    "race": race,
    "maps": maps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with np.load(options.input) as arrays:
        cells = Cells(
            arrays["values"].astype(np.float64),
            arrays["labels"],
            int(arrays["permutations"]),
            arrays["transported"].tolist(),
            int(arrays["repeats"]),
        )
    result: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in PROGRAMS}}
    result["seconds"] = {}
    for part in options.parts:
        started = time.process_time()
        result[part] = PARTS[part](cells)
        result["seconds"][part] = round(time.process_time() - started, 1)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
