"""The power of each metric on planted effects, by number of cells.

    python -m benchmarks.planted [--screens 8] [--model-screens 8] [--bundle bundles/default] [--fast]
                                 [--out runs/planted] [--peers-python runs/peers/bin/python]

Effects of known size (benchmarks/_planted_screens.py) in real control cells: Papalexi's controls (a panel of 303 genes)
and the CD4 T cells of PBMC 3k (a full transcriptome). In every screen a random reference, one group for each effect and
as many unchanged groups; scored by every method on PCA-50 and on a bundle's embedding. With --peers-python the E-test
of pertpy itself runs on one screen, beside its restatement that all screens are scored with.

Writes tables.md, rates.csv and detection.png into the folder --out, and every p-value of each screen as soon as it is
scored: a second call goes on where the first was stopped. About a quarter of an hour on one core, most of it the
model's; with --fast one screen of small groups from each background, in less than a minute.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks._markdown import markdown
from benchmarks._peer_tests import PERTPY, SCPERTURB, peer_e_test
from benchmarks._peers import ask
from benchmarks._planted_screens import CONTROL, ControlPCA, Effect, PlantedScreen, measured, planted_screen, scatter
from benchmarks._planted_tables import figure, rates, tables
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.files import atomic
from perturbscope.cells.readers import open_cells
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.results import ScoreOptions

ROOT = Path(__file__).resolve().parent.parent
SCATTER = tuple(Effect("scatter", strength=strength) for strength in (0.1, 0.2, 0.5))
PANEL_EFFECTS = (
    Effect("shift", genes=10, strength=0.2),
    Effect("shift", genes=10, strength=0.5),
    Effect("shift", genes=10, strength=0.9),
    Effect("shift", genes=50, strength=0.2),
    Effect("shift", genes=50, strength=0.5),
    Effect("spread", genes=50, strength=0.5),
    Effect("spread", genes=50, strength=0.9),
    Effect("rare", genes=50, strength=0.9, share=0.05),
    Effect("rare", genes=50, strength=0.9, share=0.1),
    Effect("rare", genes=50, strength=0.9, share=0.2),
    *SCATTER,
)
TRANSCRIPTOME_EFFECTS = (
    Effect("shift", genes=50, strength=0.5),
    Effect("shift", genes=50, strength=0.9),
    Effect("shift", genes=200, strength=0.2),
    Effect("shift", genes=200, strength=0.5),
    Effect("spread", genes=200, strength=0.5),
    Effect("spread", genes=200, strength=0.9),
    Effect("rare", genes=200, strength=0.9, share=0.1),
    Effect("rare", genes=200, strength=0.9, share=0.2),
    *SCATTER,
)
NULLS = 12
"""Unchanged groups of a screen."""
NULL = Effect("null")
QUICK = {"repeats": 1, "null_draws": 10, "min_cells": 10}  # p alone is read here, so z need not be precise
OPTIONS = {
    "E-distance": ScoreOptions(**QUICK),
    "cosine E-distance": ScoreOptions(metrics=("cosine_e_distance",), **QUICK),
    "E-distance, not scaled": ScoreOptions(normalize=False, **QUICK),
    "Wasserstein": ScoreOptions(metrics=("wasserstein",), wasserstein_permutations=200, **QUICK),
}
PEERS = {"pertpy's E-test": PERTPY, "scPerturb's E-test": SCPERTURB}
MAX_WASSERSTEIN = 100
"""Largest groups scored by Wasserstein: 200 exchanges of 400 cells would take a minute a screen."""


@dataclass(frozen=True)
class Background:
    """Control cells to plant into, the effects, and the sizes of groups."""

    key: str
    name: str
    cells: CountMatrix
    effects: tuple[Effect, ...]
    sizes: tuple[int, ...]
    reference: int


def backgrounds() -> Iterator[Background]:
    with open_cells(
        ROOT / "data/papalexi2021_eccite_thp1_panel.h5ad", total_counts_key="total_umi_full_transcriptome"
    ) as source:
        controls = source.read()[np.flatnonzero(source.obs["perturbation"] == "control")]
    yield Background("papalexi", "Papalexi controls, panel", controls, PANEL_EFFECTS, (20, 50, 100, 200, 400), 500)
    with open_cells(ROOT / "data/pbmc3k_10x.h5ad") as source:
        controls = source.read()[np.flatnonzero(source.obs["cell_type"] == "CD4 T")]
    yield Background(
        "pbmc3k", "PBMC 3k CD4 T, full transcriptome", controls, TRANSCRIPTOME_EFFECTS, (20, 50, 100, 200), 400
    )


def score(values: np.ndarray, screen: PlantedScreen, n: int, *, peers: bool, seed: int) -> Iterator[pd.DataFrame]:
    """Score every group by every method, from the first n cells of each group: p and adjusted p."""
    cells = screen.first(n)
    labels = np.asarray(screen.perturbations)[cells].tolist()
    for method, options in OPTIONS.items():
        if method == "Wasserstein" and n > MAX_WASSERSTEIN:
            continue
        options = ScoreOptions.from_dict({**options.to_dict(), "seed": seed})
        table = score_perturbations(values[cells], labels, control=CONTROL, options=options).table
        yield table[["perturbation", "p", "q"]].assign(method=method)
    for method, peer in PEERS.items() if peers else ():
        table = peer_e_test(values[cells], labels, control=CONTROL, peer=peer, seed=seed)
        yield table[["perturbation", "p"]].assign(q=table["p_adjusted"], method=method)


def run(
    background: Background, bundle: Bundle, screens: int, model_screens: int, folder: Path
) -> tuple[pd.DataFrame, float]:
    """Return all p-values and their CPU seconds; screens that are in the folder are not scored again."""
    pca = ControlPCA(background.cells)
    model = ModelOf(background.cells, bundle)
    embeddings: dict[str, tuple[str, Callable[[PlantedScreen], np.ndarray], int]] = {
        "PCA-50": ("pca", lambda screen: scatter(pca(screen.cells), screen, pca.centre), screens),
        "model": (bundle.model_id, model, model_screens),
    }
    parts = []
    for embedding, (key, embed, wanted) in embeddings.items():
        for number in range(wanted):
            path = folder / f"{background.key}-{background.sizes[-1]}-{key}-{number:02d}.csv"
            if not path.exists():
                started = time.process_time()
                screen = make(background, number)
                values = embed(screen)
                tables = [
                    table.assign(n=n)
                    for n in background.sizes
                    for table in score(values, screen, n, peers=embedding == "PCA-50", seed=number)
                ]
                rows = pd.concat(tables, ignore_index=True)
                rows["effect"] = [screen.effects[name].name for name in rows["perturbation"]]
                rows = rows.assign(screen=number, seconds=time.process_time() - started)
                with atomic(path) as staging:
                    rows.to_csv(staging, index=False)
                print(f"{background.name}, {embedding}: screen {number + 1} of {wanted}", file=sys.stderr, flush=True)
            # "null" is the name of an effect here.
            parts.append(pd.read_csv(path, keep_default_na=False, na_values="").assign(embedding=embedding))
    rows = pd.concat(parts, ignore_index=True).assign(background=background.name)
    return rows, float(rows.groupby(["embedding", "screen"])["seconds"].first().sum())


class ModelOf:
    """A bundle's embedding of planted screens; controls are embedded once, when the first screen is."""

    def __init__(self, controls: CountMatrix, bundle: Bundle) -> None:
        self.controls, self.bundle = controls, bundle

    @cached_property
    def embedder(self) -> Embedder:
        return Embedder.from_bundle(self.bundle)

    @cached_property
    def of_controls(self) -> np.ndarray:
        return self.embedder.embed(self.controls).values

    def __call__(self, screen: PlantedScreen) -> np.ndarray:
        values = self.of_controls[screen.source]
        changed = np.isin(screen.perturbations, [name for name, effect in screen.effects.items() if effect.in_counts])
        values[changed] = self.embedder.embed(screen.cells[np.flatnonzero(changed)]).values
        return scatter(values, screen, self.of_controls.mean(axis=0))


def make(background: Background, number: int) -> PlantedScreen:
    effects = [*background.effects, *[NULL] * NULLS]
    return planted_screen(
        background.cells, effects, blocks=background.sizes, reference=background.reference, seed=number
    )


def pertpy_itself(background: Background, python: Path, n: int) -> str:
    """Run pertpy's own E-test on one screen, in the order of the cells and sorted by label, beside its restatement."""
    screen = make(background, 0)
    cells = np.random.default_rng(0).permutation(screen.first(n))
    pca = ControlPCA(background.cells)
    values = scatter(pca(screen.cells), screen, pca.centre)[cells]
    labels = np.asarray(screen.perturbations)[cells]
    result = ask(python, values.astype(np.float64), labels, "tests")
    version = result["versions"]["pertpy"]
    ours = peer_e_test(values, labels.tolist(), control=CONTROL, peer=PERTPY).set_index("perturbation")
    columns = {}
    for order in ("given", "sorted"):
        table = pd.DataFrame.from_dict(result["tests"][f"pertpy, cells {order}"], orient="index")
        columns[f"pertpy {version}, cells {order}: p"] = table["pvalue"]
    columns["restated: p"] = ours["p"]
    wide = pd.DataFrame(columns).loc[ours.index]
    wide.insert(0, "planted", [screen.effects[name].name for name in wide.index])
    wide = wide.sort_values("planted", kind="stable")
    return f"### pertpy {version} itself, {background.name}, first screen, {n} cells a group\n\n" + markdown(
        wide, "group", digits=3
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", type=int, default=8)
    parser.add_argument("--model-screens", type=int, help="screens that the model embeds too; all by default")
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundles/default")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/planted")
    parser.add_argument("--peers-python", type=Path, help="interpreter with requirements/peers.txt")
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.open(options.bundle)
    screens = 1 if options.fast else options.screens
    model_screens = screens if options.model_screens is None else min(options.model_screens, screens)
    every, order = [], {}
    notes = [f"Model {bundle.model_id}; {screens} screens of each background, {model_screens} by the model.\n"]
    for background in backgrounds():
        if options.fast:
            background = replace(background, sizes=(20, 50), reference=200)
        order[background.name] = [effect.name for effect in (NULL, *background.effects)]
        rows, seconds = run(background, bundle, screens, model_screens, options.out)
        every.append(rows)
        notes.append(f"{background.name}: {seconds:.0f} s of CPU.\n")
        sizes = [measured(make(background, number), background.cells) for number in range(screens)]
        means = pd.concat(sizes).drop(columns="perturbation").groupby("effect", sort=False).mean()
        notes.append(markdown(means.reindex(order[background.name]).dropna(), "planted"))
        if options.peers_python and len(every) == 1:
            notes.append(pertpy_itself(background, options.peers_python, min(100, background.sizes[-1])))
    rows = pd.concat(every, ignore_index=True)
    table = rates(rows)
    table.to_csv(options.out / "rates.csv", index=False)
    text = "\n".join([*notes, tables(table, rows, order)])
    (options.out / "tables.md").write_text(text)
    figure(table, order, options.out / "detection.png")
    print(text)


if __name__ == "__main__":
    main()
