"""Tiny torch models and their graphs: a vocabulary of 60 genes, three blocks of width 32.

Import only in tests that need torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from transformers import BertForMaskedLM

from export.graph import build_graph
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families import load_family
from training.checkpoint import save_checkpoint
from training.families.rank.family import export_spec
from training.families.rank.model import RankModelConfig, build_model
from training.families.specs import ExportSpec

TINY_MODEL = RankModelConfig(layers=3, hidden=32, heads=4, feed_forward=48, max_length=40, init_sd=0.3)
"""Weights ten times as large as usual, so that blocks and positions matter in an untrained model."""


def small_vocabulary(genes: int = 60, *, median: float = 1.0, ends: bool = False) -> GeneVocabulary:
    """Make a vocabulary of made-up genes with one median; with a start and an end token if `ends`."""
    special = {"<pad>": 0, "<mask>": 1, **({"<cls>": 2, "<eos>": 3} if ends else {})}
    return GeneVocabulary(
        gene_ids=tuple(f"ENSG{number:011d}" for number in range(genes)),
        tokens=np.arange(len(special), genes + len(special), dtype=np.int32),
        medians=np.full(genes, median),
        special_tokens=special,
        source="made up for tests",
    )


def small_model(config: RankModelConfig = TINY_MODEL, *, seed: int = 0) -> BertForMaskedLM:
    """Build an untrained model in evaluation mode; torch's global generator keeps its state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast("BertForMaskedLM", build_model(config, small_vocabulary()).eval())


def small_spec(config: RankModelConfig = TINY_MODEL, outputs: Sequence[str] | None = None) -> ExportSpec:
    """Return how :func:`small_model` becomes a graph."""
    family = load_family("rank", {"max_length": config.max_length}, small_vocabulary())
    return export_spec(config, family=family, outputs=outputs)


def small_graph(model: BertForMaskedLM | None = None, *, fuse: bool = True) -> ModelProto:
    """Build the graph of a model with eager attention; by default of :func:`small_model`."""
    eager = dataclasses.replace(TINY_MODEL, attention="eager")
    return build_graph(model or small_model(eager), small_spec(eager), small_example(), fuse=fuse)


def small_checkpoint(path: Path, *, seed: int = 0) -> Path:
    """Save a checkpoint of :func:`small_model`."""
    return save_checkpoint(
        path,
        model=small_model(seed=seed),
        family="rank",
        family_config={"max_length": TINY_MODEL.max_length},
        model_config=TINY_MODEL,
        vocabulary=small_vocabulary(),
        provenance={"data": "none", "licence": "Apache-2.0"},
    )


def small_example(*, lengths: tuple[int, ...] = (3, 2)) -> dict[str, NDArray[np.int64]]:
    """Make :func:`small_batch` as the inputs of a graph."""
    ids, mask = small_batch(lengths=lengths)
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}


def small_batch(*, lengths: tuple[int, ...] = (12, 7, 1), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Make random cells, padded on the right: ids and attention mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, 62, mask.shape, generator=generator) * mask
    return ids, mask
