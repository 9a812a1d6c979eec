"""Models and cells of the embedding benchmark: one set of weights as a bundle and as a transformers model.

torch, transformers and onnx are imported only where they are used: the process that measures PerturbScope has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.harness import DATA, ROOT
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.cells.readers import open_cells
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families.tokens import TokenizedCells, concatenate
from perturbscope.inference.bundle import Bundle

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

    from training.families.rank.model import RankModelConfig

FILES = {
    "Kang": "kang2018_ifnb_pbmc",
    "PBMC 3k": "pbmc3k_10x",
    "Papalexi panel": "papalexi2021_eccite_thp1_panel",
}
DEFAULT = ROOT / "bundles" / "default"
BUILT = ROOT / "runs" / "performance"
"""Folder that keeps the models of the benchmarks between runs."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of one model.

    Attributes
    ----------
    title
        Name in tables.
    bundle
        Directory of its bundle.
    checkpoint
        Directory of its checkpoint; None: the bundle's own weights are put into a transformers model.
    """

    title: str
    bundle: Path
    checkpoint: Path | None = None

    def torch(self) -> BertForMaskedLM:
        """Load the transformers model, in evaluation mode, with torch's fused attention."""
        if self.checkpoint is None:
            return from_bundle(self.bundle)
        from training.checkpoint import load_checkpoint

        model: Any = load_checkpoint(self.checkpoint).model()
        return model.eval()  # type: ignore[no-any-return]


def default_weights() -> Weights:
    """Weights of the bundle that the repository ships."""
    return Weights(title="default, 4 x 128, 512 tokens", bundle=DEFAULT)


def paper_weights() -> Weights:
    """A model of the paper's shape with random weights, made by the project's own export the first time."""
    from training.families.rank.model import RankModelConfig

    checkpoint, bundle = BUILT / "paper-shape-checkpoint", BUILT / "paper-shape"
    random_bundle(RankModelConfig(), checkpoint, bundle, variants=("int8",))
    return Weights(title="paper, 6 x 256, 2,048 tokens", bundle=bundle, checkpoint=checkpoint)


def random_bundle(config: RankModelConfig, checkpoint: Path, bundle: Path, **export: Any) -> None:
    """Write a checkpoint with random weights and its bundle, unless they are there."""
    import torch

    from export.pipeline import export_checkpoint
    from training.checkpoint import save_checkpoint
    from training.families.rank.model import build_model

    vocabulary = Bundle.open(DEFAULT).vocabulary
    if not checkpoint.exists():
        torch.manual_seed(0)
        save_checkpoint(
            checkpoint,
            model=build_model(config, vocabulary),
            family="rank",
            family_config={"max_length": config.max_length},
            model_config=config,
            vocabulary=vocabulary,
            provenance={"weights": "random, for benchmarks"},
        )
    if not bundle.exists():
        export_checkpoint(checkpoint, bundle, name=bundle.name, version="0", **export)


def from_bundle(path: Path) -> BertForMaskedLM:
    """Make the transformers model of a bundle's float32 graph; the last block, which it lacks, has random weights."""
    import onnx
    import torch
    from onnx import numpy_helper

    from training.families.rank.model import build_model, parse_config

    bundle = Bundle.open(path)
    graph = onnx.load(bundle.graph()).graph
    stored = {item.name: torch.tensor(numpy_helper.to_array(item)) for item in graph.initializer}
    found = {name: value for name, value in stored.items() if name.startswith(("embeddings.", "blocks."))}
    attentions = 0
    for node in graph.node:
        if node.op_type == "Attention":
            weight, bias = stored[node.input[1]], stored[node.input[2]]
            parts = zip(("query", "key", "value"), weight.chunk(3, dim=1), bias.chunk(3), strict=True)
            for name, matrix, vector in parts:
                found[f"blocks.{attentions}.attention.self.{name}.weight"] = matrix.T
                found[f"blocks.{attentions}.attention.self.{name}.bias"] = vector
            attentions += 1
        elif node.op_type == "MatMul":
            found[node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".") + ".weight"] = stored[
                node.input[1]
            ].T
        elif node.op_type == "Add" and node.name.endswith("dense/Add"):
            found[node.name.removeprefix("/").removesuffix("/Add").replace("/", ".") + ".bias"] = stored[node.input[0]]
    torch.manual_seed(0)
    model = build_model(parse_config(bundle.manifest.training["model_config"]), bundle.vocabulary)
    named = {
        f"bert.{name}" if name.startswith("embeddings.") else name.replace("blocks.", "bert.encoder.layer.", 1): value
        for name, value in found.items()
    }
    missing, unexpected = model.load_state_dict(
        {name: value.contiguous() for name, value in named.items()}, strict=False
    )
    last = f"bert.encoder.layer.{attentions}."
    lost = [name for name in missing if not name.startswith((last, "cls."))]
    if lost or unexpected:
        raise ValueError(f"{path}: weights {lost} are not in the graph, {unexpected} not in the model")
    return model.eval()


def counts(source: str, n_cells: int, *, seed: int = 0) -> CountMatrix:
    """Draw cells of a data set without replacement, in random order."""
    with open_cells(DATA / f"{FILES[source]}.h5ad") as file:
        chosen = np.random.default_rng(seed).choice(file.n_cells, size=n_cells, replace=False)
        return file.rows(0, file.n_cells)[chosen]


def tokens(bundle: Path, source: str, n_cells: int) -> TokenizedCells:
    """Tokens of `n_cells` of one data set, or of ``mix``: the same number of each, in random order."""
    family = Bundle.open(bundle).family()
    if source in FILES:
        return family.tokenize(counts(source, n_cells))
    each = n_cells // len(FILES)
    joined = concatenate([family.tokenize(counts(name, each)) for name in FILES])
    return pick(joined, np.random.default_rng(0).permutation(len(joined)))


def equal_cells(vocabulary: GeneVocabulary, length: int, n_cells: int, *, repeat: bool = False) -> TokenizedCells:
    """Make cells of one length with genes at random; `repeat` lets a gene be in a cell twice, which is faster."""
    rng = np.random.default_rng(0)
    genes = vocabulary.tokens
    if repeat:
        ids = rng.choice(genes, n_cells * length)
    else:
        ids = np.concatenate([rng.choice(genes, length, replace=False) for _ in range(n_cells)])
    return TokenizedCells(
        arrays={"input_ids": ids},
        offsets=np.arange(n_cells + 1, dtype=np.int64) * length,
        known_share=np.ones(n_cells, dtype=np.float32),
        n_detected=np.full(n_cells, length, dtype=np.int32),
        coverage=GeneCoverage(n_genes=1, n_matched=1),
    )


def pick(cells: TokenizedCells, rows: NDArray[np.integer[Any]]) -> TokenizedCells:
    """Return some cells, in the order of `rows`."""
    lengths = cells.lengths[rows]
    return TokenizedCells(
        arrays={
            name: np.concatenate([array[cells.offsets[row] : cells.offsets[row + 1]] for row in rows])
            for name, array in cells.arrays.items()
        },
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        known_share=cells.known_share[rows],
        n_detected=cells.n_detected[rows],
        coverage=cells.coverage,
    )
