"""The objectives of fine-tuning, compared on targets that they never saw.

``python -m benchmarks.objectives`` trains one model an experiment from the same pre-trained checkpoint, data and split
(training/configs/default-contrastive.yaml), and writes ``runs/objectives/objectives.md``. An experiment that is
complete is not trained again. Name experiments to run only these.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from evaluation.baselines import pca
from evaluation.retrieval import retrieve
from evaluation.tables import markdown
from perturbscope.cells.readers import open_cells
from perturbscope.families import load_family
from perturbscope.families.outputs import CELL_EMBEDDING, OutputSpec, cell_embedding
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Values
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.results import ScoreOptions
from training import families
from training.checkpoint import load_checkpoint
from training.commands.finetune import finetune
from training.config import strict
from training.config.stages import ContrastiveConfig

CONFIG = Path("training/configs/default-contrastive.yaml")
TOTALS = "total_umi_full_transcriptome"
PATHWAY = ("STAT1", "IFNGR2")
"""Held-out targets whose pathway was trained on."""

_SHORT = (
    # The two screens only: cells of whole transcriptomes are five times as long, and say nothing about the objectives.
    "mixed.weights={kang: 0.0001, baron: 0.0001, pbmc3k: 0.0001}",
    "loop.epochs=2",
)
_UNSTRETCHED = (
    *_SHORT,
    "mixed.expression.stretch=0.0",
    "mixed.expressions={jurkat: {components: 50, power: 1.0, stretch: 0.0}}",
)
_LABELS_ONLY = (*_SHORT, "mixed.geometry=0.0", "mixed.panels={papalexi: {share: 0.0}}", "optimizer.base_lr=1e-4")
_PAIRS = (
    # Pairs need training controls, and the Jurkat screen can spare none.
    "mixed=null",
    "corpus.path=runs/objectives/pairs-corpus",
    "corpus.sources=[{path: data/papalexi2021_eccite_thp1_panel.h5ad, name: papalexi, total_counts_key: "
    + TOTALS
    + "}]",
    "split.validation=[STAT2, ETV7, MYC, NFKBIA, POU2F2, UBE2L6]",
    "split.test=[STAT1, IFNGR2, BRD4, ATF2, CAV1, CD86, CMTM6, IRF7, MARCH8, PDCD1LG2, SPI1, STAT3, STAT5A, TNFRSF14]",
    "loop.micro_batch=16",
    "loop.epochs=2",
)

EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "expression geometry (the default, shorter)": _SHORT,
    "geometry without labels": _UNSTRETCHED,
    "geometry, stretch 8": (
        *_SHORT,
        "mixed.expression.stretch=8.0",
        "mixed.expressions={jurkat: {components: 50, power: 1.0, stretch: 8.0}}",
    ),
    "geometry, genes hidden from half of the batches": (
        *_SHORT,
        "mixed.panels={papalexi: {share: 0.5, genes: [0.1, 1.0]}, jurkat: {share: 0.5, genes: [0.1, 1.0]}}",
    ),
    "geometry without labels + margin 0.05": (*_UNSTRETCHED, "mixed.margin_contrastive=0.05"),
    "geometry without labels + supervised contrastive 0.05": (*_UNSTRETCHED, "mixed.supervised_contrastive=0.05"),
    "geometry without labels + cross-entropy 0.2": (*_UNSTRETCHED, "mixed.cross_entropy=0.2"),
    "geometry + margin 0.05": (*_SHORT, "mixed.margin_contrastive=0.05"),
    "margin 1, all pairs of a batch": (*_LABELS_ONLY, "mixed.margin_contrastive=1.0"),
    "supervised contrastive": (*_LABELS_ONLY, "mixed.supervised_contrastive=1.0"),
    "cross-entropy": (*_LABELS_ONLY, "mixed.cross_entropy=1.0"),
    "InfoNCE, two views of a cell": (
        *_SHORT,
        "mixed.geometry=0.0",
        "mixed.info_nce=1.0",
        "mixed.panel={share: 1.0, genes: [0.3, 1.0], depth: [0.5, 1.0]}",
        "mixed.panels={}",
    ),
    "pairs, margin 20, lr 1e-5 (Zhao et al. 2025)": (*_PAIRS, "loss.margin=20.0", "optimizer.base_lr=1e-5"),
    "pairs, margin 5, lr 1e-4": (*_PAIRS, "loss.margin=5.0", "optimizer.base_lr=1e-4"),
    "pairs of unit vectors, margin 1, lr 1e-4": (
        *_PAIRS,
        "loss.normalize=true",
        "loss.margin=1.0",
        "optimizer.base_lr=1e-4",
    ),
    "expression geometry, random weights at the start": (*_SHORT, "checkpoint=runs/default/random/checkpoint"),
}


@dataclass(frozen=True)
class _TorchEncoder:
    """A checkpoint's encoder behind the library's protocol, without the detour of an export."""

    module: nn.Module
    width: int

    provider = ""

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """The vectors of cells."""
        return (cell_embedding(self.width),)

    def run(self, inputs: Mapping[str, NDArray[np.generic]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
            return {CELL_EMBEDDING: self.module(**tensors).numpy()}

    def close(self) -> None:
        """Do nothing: the module is freed with the encoder."""


@dataclass(frozen=True)
class Screen:
    """Held-out cells of a data set."""

    name: str
    path: Path
    context: tuple[str, str] | None = None


def embedder_of(checkpoint: Path) -> Embedder:
    """Return an embedder that runs a checkpoint in torch."""
    found = load_checkpoint(checkpoint)
    family = load_family(found.family, found.family_config, found.vocabulary)
    half = families.load(found.family)
    config = half.parse_config(found.model_config)
    module = half.encoder(found.model(), config, family=family).eval()
    return Embedder(
        family,
        _TorchEncoder(module, half.outputs(config)[0].width),
        model_id=checkpoint.name,
        vocabulary_hash=found.vocabulary.hash,
    )


def measure(screen: Screen, embedder: Embedder | None) -> dict[str, float]:
    """Measure z of the held-out targets and the retrieval of guides, of a model or, without one, of PCA-50."""
    with open_cells(screen.path, total_counts_key=TOTALS) as source:
        cells, obs = source.read(), source.obs
    if screen.context is not None:
        column, value = screen.context
        rows = np.flatnonzero(obs[column].astype(str).to_numpy() == value)
        cells, obs = cells[rows], obs.iloc[rows]
    values = pca(cells, n_components=50) if embedder is None else embedder.embed(cells).values
    labels = obs["perturbation"].astype(str).tolist()
    table = score_perturbations(values, labels, control="control", options=ScoreOptions(permutations=1)).table
    z = table.set_index("perturbation")["z"]
    found = retrieve(values, labels, obs["guide"].astype(str).tolist(), control="control", permutations=1)
    measured = {f"{screen.name}: median z": float(z.median()), f"{screen.name}: mAP": found.map}
    if screen.name == "papalexi":
        measured |= {name: float(z[name]) for name in (*PATHWAY, "BRD4")}
        measured["weak targets: mean z"] = float(z.drop([*PATHWAY, "BRD4"]).mean())
    return measured


def screens(run: Path) -> list[Screen]:
    """Held-out cells of both screens, as fine-tuning on both wrote them."""
    return [
        Screen("papalexi", run / "heldout-papalexi.h5ad"),
        Screen("jurkat", run / "heldout-jurkat.h5ad", ("stimulation", "stimulated")),
    ]


def validation_z(run: Path) -> tuple[float, float, int]:
    """Return the last median z of the validation targets, the seconds of training and the steps."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    z = [line["validation_median_z"] for line in lines if "validation_median_z" in line]
    steps = [line for line in lines if "seconds" in line and "loss" in line]
    return (z[-1] if z else float("nan")), float(sum(line["seconds"] for line in steps)), len(steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--only", nargs="*", default=list(EXPERIMENTS), help="names of experiments")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for all, such as loop.epochs=3")
    options = parser.parse_args(arguments)
    rows = []
    for number, name in enumerate(EXPERIMENTS):
        run = options.out / f"{number:02d}"
        if name in options.only and not (run / "checkpoint").exists():
            overrides = [f"output={run}", *options.set, *EXPERIMENTS[name]]
            finetune(strict.read(ContrastiveConfig, CONFIG, overrides))
        if (run / "checkpoint").exists():
            embedder = embedder_of(run / "checkpoint")
            z, seconds, steps = validation_z(run)
            row = {"objective": name, "steps": steps, "s": round(seconds), "validation z": z}
            for screen in screens(options.out / "00"):
                row |= measure(screen, embedder)
            rows.append(row)
            print(row, flush=True)
    base = {"objective": "PCA-50", "steps": 0, "s": 0, "validation z": float("nan")}
    for screen in screens(options.out / "00"):
        base |= measure(screen, None)
    table = pd.DataFrame([base, *rows])
    text = markdown(table)
    (options.out / "objectives.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
