"""Configurations of the training stages: frozen dataclasses, one field a line, filled from strict YAML.

Paths are relative to the current directory; the shipped files are written to be run from the top of the checkout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from perturbscope.analysis.degs import DegOptions
from perturbscope.errors import InvalidParameterError

Precision = Literal["fp32", "bf16", "fp16"]

CANCER_TERMS = (
    "cancer", "carcinoma", "tumor", "tumour", "neoplasm", "leukemia", "leukaemia", "lymphoma", "melanoma", "myeloma",
    "sarcoma", "glioma", "blastoma", "adenoma", "metasta", "malignan",
)  # fmt: skip
"""A disease label that holds one of these, in any case, marks a cell as cancer."""


@dataclass(frozen=True, kw_only=True)
class SomaConfig:
    """Where the cells are in a SOMA store; the defaults are those of a release of the CELLxGENE census, human cells."""

    experiment: str = "census_data/homo_sapiens"
    """Names from the store down to the experiment, with slashes; empty where `path` is the experiment."""
    measurement: str = "RNA"
    """Measurement of the experiment; the source's layer is one of its matrices, raw by default."""
    region: str | None = "us-west-2"
    """Region of an s3:// store; None leaves it to the environment."""
    anonymous: bool = True
    """Read an s3:// store without credentials, as public ones allow."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One file of raw counts, or one SOMA store."""

    path: str
    """The file; or the directory or s3:// address of the store."""
    soma: SomaConfig | None = None
    """Given (``soma: {}`` will do), `path` is a SOMA store."""
    name: str | None = None
    """Name of the data set; the file's name without its ending by default."""
    layer: str | None = None
    """Layer that holds the raw counts, if X does not."""
    gene_key: str | None = None
    """Column of var with the gene identifiers, if the index does not hold them."""
    total_counts_key: str | None = None
    """Column of obs with each cell's total over all measured genes, where the file holds a part of them."""
    min_genes: int | None = None
    """Replaces the corpus' min_genes for this file, e.g. for a panel."""
    select: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Column of obs to the labels that are kept; all cells by default."""
    max_cells: int | None = None
    """At most this many cells: a seeded random choice among those that are left."""
    perturbation_key: str = "perturbation"
    """Fine-tuning: column of obs with the perturbed gene."""
    control: str = "control"
    """Fine-tuning: label of unperturbed cells in that column."""
    context_key: str | None = None
    """Fine-tuning on mixed batches: column of obs within which cells are compared (a stimulation, a cell type)."""
    control_fractions: tuple[float, float, float] | None = None
    """Fine-tuning: replaces the split's control_fractions for this file."""
    unlabelled: bool = False
    """Fine-tuning on mixed batches: no perturbations here; only the expression geometry is learnt from all cells."""

    def __post_init__(self) -> None:
        _at_least("max_cells", self.max_cells, 1)
        _at_least("min_genes", self.min_genes, 0)
        if self.control_fractions is not None:
            _shares("control_fractions", self.control_fractions)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Cells to tokenize, and how."""

    path: str
    """Directory of the corpus."""
    sources: tuple[SourceConfig, ...]
    """Files, read in this order."""
    family: str = "rank"
    """Model family, which makes the tokens."""
    vocabulary: str = "geneformer_gc30m"
    """The published medians (Theodoris et al. 2023), or a TSV file that training.data.medians wrote."""
    max_length: int = 2048
    """Tokens kept of a cell."""
    min_genes: int = 500
    """Cells with fewer expressed genes are dropped (Theodoris et al. 2023)."""
    exclude_cancer: bool = True
    """Drop cells whose disease label names a cancer; nothing happens where a file has no such column."""
    disease_key: str = "disease"
    """Column of obs with the disease."""
    cancer_terms: tuple[str, ...] = CANCER_TERMS
    """What a cancer's label contains."""
    primary_key: str = "is_primary_data"
    """Column of obs (as in CELLxGENE) that is false for the second copy of a cell; used where it exists."""
    labels: tuple[str, ...] = ("perturbation", "cell_type", "batch", "dataset")
    """Columns of obs that are kept with the cells, where a file has them."""
    chunk_cells: int = 4096
    """Cells in memory at a time."""
    shard_tokens: int = 2**28
    """Tokens after which a new shard is begun: 512 MiB at two bytes a token."""
    seed: int = 0
    """Of the random choice of max_cells."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise InvalidParameterError("A corpus needs at least one file under sources.", field="sources")
        for name, low in {"max_length": 1, "min_genes": 0, "chunk_cells": 1, "shard_tokens": 1, "seed": 0}.items():
            _at_least(name, getattr(self, name), low)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How cells of similar length are grouped into batches."""

    megabatch: int = 50
    """Global batches that are sorted by length together; 1000 pads less and mixes less."""
    pad_multiple: int = 1
    """Padded length is a multiple of this; 8 suits tensor cores."""

    def __post_init__(self) -> None:
        _at_least("megabatch", self.megabatch, 1)
        _at_least("pad_multiple", self.pad_multiple, 1)


@dataclass(frozen=True, kw_only=True)
class PanelConfig:
    """Genes hidden from some batches, so that panels and shallow cells are in distribution."""

    share: float = 0.0
    """Share of the batches from which genes are hidden."""
    genes: tuple[float, float] = (0.02, 1.0)
    """Share of the vocabulary that a panel measures, the same genes for the whole batch: log-uniform in this range."""
    depth: tuple[float, float] = (0.3, 1.0)
    """Share of the panel's expressed genes that a cell still shows: uniform in this range, drawn for each cell."""

    def __post_init__(self) -> None:
        _between("share", self.share, 0.0, 1.0)
        for name in ("genes", "depth"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise InvalidParameterError(
                    f"panel.{name} is {[low, high]}; two shares above 0 and up to 1 are needed, the smaller first.",
                    field=f"panel.{name}",
                )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    base_lr: float
    """Peak learning rate, of one process if lr_scale_by_world_size."""
    lr_scale_by_world_size: bool = False
    """Multiply base_lr by the number of processes."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up: down to zero at the last step, or level."""
    warmup_steps: int = 0
    """Optimiser steps over which the rate rises linearly from zero."""
    weight_decay: float = 0.001
    """Decoupled; not applied to biases and layer normalisation."""
    beta1: float = 0.9
    """Decay of the mean gradient."""
    beta2: float = 0.999
    """Decay of the mean squared gradient."""
    eps: float = 1e-8
    """Added to the root of the mean squared gradient."""
    clip: float = 1.0
    """Largest norm of the gradient of all weights together; 0 does not clip."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("base_lr", 0.0, 10.0),
            ("weight_decay", 0.0, 10.0),
            ("beta1", 0.0, 0.999999),
            ("beta2", 0.0, 0.999999999),
            ("eps", 0.0, 1.0),
            ("clip", 0.0, float("inf")),
        ):
            _between(name, getattr(self, name), low, high)
        _at_least("warmup_steps", self.warmup_steps, 0)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, on what, and how often something is written down."""

    epochs: int
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimiser steps, whatever the epochs; the schedule ends there too."""
    micro_batch: int
    """Cells (pre-training) or pairs (fine-tuning) of one process at a time."""
    accumulation: int = 1
    """Micro-batches whose gradients make one optimiser step."""
    precision: Precision = "fp32"
    """bf16 from Ampere on, fp16 with dynamic loss scaling before; fp32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, or auto: CUDA if there is any."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file; without one, plain torch on one process."""
    threads: int | None = None
    """CPU threads of torch; torch's own choice by default."""
    seed: int = 0
    """Of weights, order, masks and dropout."""
    checkpoint_every: int = 1000
    """Optimiser steps between two states from which an interrupted run resumes."""
    keep_states: int = 2
    """States kept while the run lasts; all but the last are removed when it ends."""
    validate_every: int | None = None
    """Optimiser steps between two validations; once an epoch by default."""

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "micro_batch", "accumulation", "threads", "checkpoint_every",
                     "keep_states", "validate_every"):  # fmt: skip
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InvalidParameterError(f"device is {self.device!r}; it must be auto, cpu or cuda.", field="device")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Masked-language pre-training of a model on a corpus of cells."""

    output: str
    """Directory of the run: checkpoint, metrics, log, states."""
    corpus: CorpusConfig
    """What to train on; built if it is not there."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Options of the family's network; max_length is the corpus' by default."""
    mask_probability: float = 0.15
    """Share of tokens to restore."""
    validation_share: float = 0.02
    """Share of the cells held out, drawn by the seed, to measure perplexity."""
    validation_cells: int = 2000
    """At most this many of them."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Order of the cells."""
    panel: PanelConfig = field(default_factory=PanelConfig)
    """Genes hidden from some training batches."""
    optimizer: OptimizerConfig
    """Learning rate and the rest."""
    loop: LoopConfig
    """Length, device, checkpoints."""

    def __post_init__(self) -> None:
        _between("mask_probability", self.mask_probability, 1e-6, 1.0)
        _between("validation_share", self.validation_share, 0.0, 0.5)
        _at_least("validation_cells", self.validation_cells, 1)


@dataclass(frozen=True, kw_only=True)
class DegConfig(DegOptions):
    """When a gene counts as differentially expressed, and a target as strong enough to learn from."""

    min_degs: int = 20
    """Targets with at least this many are trained on (Zhao et al. 2025)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("min_degs", self.min_degs, 0)


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which targets and controls are trained on, and which are held out."""

    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Of the eligible targets: training, validation, test."""
    control_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Of the control cells of each data set."""
    validation: tuple[str, ...] | None = None
    """Targets to validate on, instead of a random choice; in every data set that has them."""
    test: tuple[str, ...] | None = None
    """Targets to hold out, instead of a random choice."""
    score_ineligible: bool = True
    """Put targets with too few differentially expressed genes into heldout.h5ad too: no cell of them is trained on."""
    seed: int = 0
    """Of the random choices."""

    def __post_init__(self) -> None:
        for name in ("fractions", "control_fractions"):
            values = getattr(self, name)
            _shares(name, values)
            if values[0] <= 0:
                raise InvalidParameterError(f"{name} is {list(values)}; the first must be above 0.", field=name)
        if (self.validation is None) != (self.test is None):
            raise InvalidParameterError(
                "Give both validation and test targets, or neither; an empty list is allowed.", field="validation"
            )
        both = set(self.validation or ()) & set(self.test or ())
        if both:
            raise InvalidParameterError(f"The target {min(both)!r} is in validation and in test.", field="test")
        _at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The margin contrastive loss (Hadsell et al. 2006; Zhao et al. 2025)."""

    margin: float = 20.0
    """Dissimilar cells are pushed apart up to this distance, in units of the embedding."""
    half: bool = False
    """A factor 1/2 on both terms, as Hadsell et al. have it."""
    squared_hinge: bool = True
    """Square the hinge of dissimilar pairs."""
    normalize: bool = False
    """Scale embeddings to unit length first; distances are then at most 2, and so should be the margin."""

    def __post_init__(self) -> None:
        _between("margin", self.margin, 1e-9, 1e9)
        if self.normalize and self.margin > 2:
            raise InvalidParameterError(
                f"margin is {self.margin}, but unit vectors are at most 2 apart. Choose a margin up to 2.",
                field="margin",
            )


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How cells are paired."""

    redraw: bool = False
    """Draw the size-matched controls of each target anew every epoch."""


@dataclass(frozen=True, kw_only=True)
class GeometryConfig:
    """The expression geometry that mixed batches can keep; see training/objectives/geometry.py."""

    components: int = 50
    """Principal components."""
    power: float = 0.5
    """Exponent of a component's variance: 1 keeps principal components, 0 whitens them."""
    stretch: float = 3.0
    """How much axes between training perturbations are stretched; 0 does not use the labels."""

    def __post_init__(self) -> None:
        _at_least("components", self.components, 1)
        _between("power", self.power, 0.0, 2.0)
        _between("stretch", self.stretch, 0.0, 1e6)


@dataclass(frozen=True, kw_only=True)
class MixedConfig:
    """Batches that mix the perturbations of a data set, and the weights of the terms of their loss."""

    geometry: float = 0.0
    """Keep the expression geometry."""
    margin_contrastive: float = 0.0
    """Margin contrastive loss over all pairs of a batch, of unit vectors around the mean cell."""
    supervised_contrastive: float = 0.0
    """Cells of one perturbation together, others apart (Khosla et al. 2020)."""
    info_nce: float = 0.0
    """Two views of one cell together, other cells apart (Oord et al. 2018); needs panel.share above 0."""
    cross_entropy: float = 0.0
    """Name the perturbation with a linear head."""
    margin: float = 1.0
    """Of the margin contrastive term, up to 2."""
    temperature: float = 0.1
    """Of the supervised contrastive and the InfoNCE term."""
    expression: GeometryConfig = field(default_factory=GeometryConfig)
    """The geometry to keep."""
    expressions: dict[str, GeometryConfig] = field(default_factory=dict)
    """By data set, replaces `expression`."""
    panel: PanelConfig = field(default_factory=PanelConfig)
    """Genes hidden from some batches; the geometry stays that of the whole cell."""
    panels: dict[str, PanelConfig] = field(default_factory=dict)
    """By data set, replaces `panel`."""
    weights: dict[str, float] = field(default_factory=dict)
    """By data set, how often its cells are used in an epoch, on average; 1 by default."""

    def __post_init__(self) -> None:
        terms = ("geometry", "margin_contrastive", "supervised_contrastive", "info_nce", "cross_entropy")
        for name in terms:
            _between(name, getattr(self, name), 0.0, 1e6)
        if not any(getattr(self, name) for name in terms):
            raise InvalidParameterError(f"No term has a weight; give one of {', '.join(terms)}.", field="mixed")
        _between("margin", self.margin, 1e-9, 2.0)
        _between("temperature", self.temperature, 1e-4, 1e3)
        for name, weight in self.weights.items():
            _between(f"weights.{name}", weight, 1e-6, 1e6)
        if self.info_nce and not self.panel.share:
            raise InvalidParameterError(
                "info_nce compares two views of a cell, but panel.share is 0, so both would be equal. Raise it.",
                field="mixed.panel.share",
            )


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Contrastive fine-tuning of a pre-trained checkpoint on perturbed and control cells."""

    output: str
    """Directory of the run: checkpoint, held-out cells, metrics, log, states."""
    checkpoint: str
    """Pre-trained checkpoint to start from."""
    corpus: CorpusConfig
    """The perturbation data sets; pairs never cross them. Tokens are made with the checkpoint's medians."""
    degs: DegConfig = field(default_factory=DegConfig)
    """Differential expression."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """What is held out."""
    pairs: PairConfig = field(default_factory=PairConfig)
    """Pairing."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss of pairs."""
    mixed: MixedConfig | None = None
    """Train on mixed batches with this loss instead of alternating pairs."""
    select: Literal["last", "best"] = "last"
    """Which weights become the checkpoint: those of the last step, or of the lowest validation loss."""
    validation_z: bool = True
    """Measure the median z of the validation targets' E-distance from control, too."""
    optimizer: OptimizerConfig
    """Learning rate and the rest."""
    loop: LoopConfig
    """Length, device, checkpoints."""

    def __post_init__(self) -> None:
        if self.loop.micro_batch < 3:
            raise InvalidParameterError(
                f"micro_batch is {self.loop.micro_batch} pairs; at least 3 are needed, so that what is left of a "
                "target can always form a batch of 2.",
                field="loop.micro_batch",
            )


def _shares(name: str, values: tuple[float, float, float]) -> None:
    if abs(sum(values) - 1) > 1e-9 or min(values) < 0:
        raise InvalidParameterError(f"{name} is {list(values)}; three shares that add up to 1 are needed.", field=name)


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise InvalidParameterError(f"{name} is {value}; it must be at least {low}.", field=name)


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidParameterError(f"{name} is {value}; it must be from {low:g} to {high:g}.", field=name)
