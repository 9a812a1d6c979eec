"""Configurations of the training stages, one field a line.

Paths are relative to the current directory; the shipped files are written to be run from the top of the checkout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from perturbscope.analysis.degs import DegOptions
from perturbscope.errors import InvalidParameterError
from training.config.strict import SectionError, configuration, later, within


def _add_up_to_one(shares: tuple[float, float, float]) -> tuple[float, float, float]:
    if abs(sum(shares) - 1) > 1e-9 or min(shares) < 0:
        raise ValueError("three shares that add up to 1 are needed")
    return shares


def _ascending_shares(shares: tuple[float, float]) -> tuple[float, float]:
    if not 0 < shares[0] <= shares[1] <= 1:
        raise ValueError("two shares above 0 and up to 1 are needed, the smaller first")
    return shares


Precision = Literal["fp32", "bf16", "fp16"]
Natural = Annotated[int, within(0)]
Positive = Annotated[int, within(1)]
Weight = Annotated[float, within(0, 1e6)]
Shares = Annotated[tuple[float, float, float], AfterValidator(_add_up_to_one)]
ShareRange = Annotated[tuple[float, float], AfterValidator(_ascending_shares)]

CANCER_TERMS = (
    "cancer", "carcinoma", "tumor", "tumour", "neoplasm", "leukemia", "leukaemia", "lymphoma", "melanoma", "myeloma",
    "sarcoma", "glioma", "blastoma", "adenoma", "metasta", "malignan",
)  # fmt: skip
"""A disease label that holds one of these, in any case, marks a cell as cancer."""


@configuration
class SomaConfig:
    """Place of the cells in a SOMA store; the defaults are the human cells of a CELLxGENE census release."""

    experiment: str = "census_data/homo_sapiens"
    """Path from the store to the experiment, with slashes; empty if the store is the experiment itself."""
    measurement: str = "RNA"
    """Measurement of the experiment; `layer` of the source names one of its matrices, ``raw`` by default."""
    region: str | None = "us-west-2"
    """Region of an s3:// store; null leaves it to the environment."""
    anonymous: bool = True
    """Read an s3:// store without credentials, as public stores allow."""


@configuration
class SourceConfig:
    """One file of raw counts, or one SOMA store."""

    path: str
    """Path of the file; or directory or s3:// address of the store."""
    soma: SomaConfig | None = None
    """Makes `path` a SOMA store; ``soma: {}`` takes the defaults."""
    name: str | None = None
    """Name of the data set; the file's name without its ending by default."""
    layer: str | None = None
    """Layer that holds the raw counts, if X does not."""
    gene_key: str | None = None
    """Column of var with the gene identifiers, if the index does not hold them."""
    total_counts_key: str | None = None
    """Column of obs with each cell's total over all measured genes, where the file holds a part of them."""
    min_genes: Natural | None = None
    """Replaces min_genes of the corpus for this file, for example for a gene panel."""
    select: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns of obs, each with the labels to keep; all cells by default."""
    max_cells: Positive | None = None
    """Most cells to take: a seeded random choice of those that pass the other filters."""
    perturbation_key: str = "perturbation"
    """Fine-tuning: column of obs with the perturbed gene."""
    control: str | tuple[str, ...] = "control"
    """Fine-tuning: label of the control cells in that column, or a list of several."""
    context_key: str | None = None
    """Fine-tuning on mixed batches: column of obs within which cells are compared (a stimulation, a cell type)."""
    control_fractions: Shares | None = None
    """Fine-tuning: replaces the split's control_fractions for this file."""
    unlabelled: bool = False
    """Fine-tuning on mixed batches: the cells have no perturbations and teach the expression geometry only."""

    def __post_init__(self) -> None:
        if not self.control:
            raise SectionError("control is empty; give the label of the control cells, or several.", field="control")

    @property
    def controls(self) -> tuple[str, ...]:
        """All labels of control cells."""
        return (self.control,) if isinstance(self.control, str) else self.control


@configuration
class CorpusConfig:
    """Cells to tokenize, and how to tokenize them."""

    path: str
    """Directory of the corpus."""
    sources: tuple[SourceConfig, ...]
    """Files and stores, read in this order."""
    family: str = "rank"
    """Model family, whose tokenizer is used."""
    vocabulary: str = "geneformer_gc30m"
    """``geneformer_gc30m``: the medians of Theodoris et al. 2023; ``geneformer_gc95m``: those of Geneformer V2; or a
    TSV file written by ``training medians``."""
    max_length: Positive = 2048
    """Most tokens of a cell."""
    family_options: dict[str, Any] = later({})
    """Further options of the family's tokenizer, such as ``start: <cls>``; those of the checkpoint in fine-tuning."""
    min_genes: Natural = 500
    """Fewest expressed genes of a cell that is kept (Theodoris et al. 2023)."""
    exclude_cancer: bool = True
    """Drop cells whose disease label names a cancer; has no effect on a file without such a column."""
    disease_key: str = "disease"
    """Column of obs with the disease."""
    cancer_terms: tuple[str, ...] = CANCER_TERMS
    """Parts of a disease label that mark a cancer, in any case."""
    primary_key: str = "is_primary_data"
    """Column of obs that is false for a second copy of a cell, as in CELLxGENE; ignored if a file lacks it."""
    labels: tuple[str, ...] = ("perturbation", "cell_type", "batch", "dataset")
    """Columns of obs to keep with the cells, if a file has them."""
    chunk_cells: Positive = 4096
    """Cells in memory at a time."""
    shard_tokens: Positive = 2**28
    """Tokens after which a new shard begins: 512 MiB at two bytes a token."""
    seed: Natural = 0
    """Seed of the random choice of max_cells."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise SectionError("A corpus needs at least one file under sources.", field="sources")
        if "max_length" in self.family_options:
            raise SectionError(
                "family_options holds max_length, which is a key of its own. Move it there.", field="family_options"
            )

    @property
    def family_config(self) -> dict[str, Any]:
        """All options of the family's tokenizer."""
        return {"max_length": self.max_length, **self.family_options}


@configuration
class SamplerConfig:
    """Grouping of cells of similar length into batches."""

    megabatch: Positive = 50
    """Global batches sorted by length together; 1000 would pad less and mix less."""
    pad_multiple: Positive = 1
    """Divisor of the padded length; 8 suits tensor cores."""


@configuration
class PanelConfig:
    """Genes hidden from some batches, so that the model also learns gene panels and shallow cells."""

    share: Annotated[float, within(0, 1)] = 0.0
    """Share of the batches from which genes are hidden."""
    genes: ShareRange = (0.02, 1.0)
    """Share of the vocabulary that a panel measures, the same genes for the whole batch: log-uniform in this range."""
    depth: ShareRange = (0.3, 1.0)
    """Share of the panel's expressed genes that a cell still shows: uniform in this range, drawn for each cell."""


@configuration
class OptimizerConfig:
    """AdamW and its learning rate."""

    base_lr: Annotated[float, within(0, 10)]
    """Peak learning rate; for one process if lr_scale_by_world_size is set."""
    lr_scale_by_world_size: bool = False
    """Multiply base_lr by the number of processes."""
    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate after the warm-up: falling to zero at the last step, or constant."""
    warmup_steps: Natural = 0
    """Optimiser steps over which the rate rises linearly from zero."""
    weight_decay: Annotated[float, within(0, 10)] = 0.001
    """Decoupled weight decay; not applied to biases and layer normalisation."""
    beta1: Annotated[float, within(0, 0.999999)] = 0.9
    """Decay rate of the mean gradient."""
    beta2: Annotated[float, within(0, 0.999999999)] = 0.999
    """Decay rate of the mean squared gradient."""
    eps: Annotated[float, within(0, 1)] = 1e-8
    """Constant added to the root of the mean squared gradient."""
    clip: Annotated[float, within(0)] = 1.0
    """Largest norm of the gradient over all weights; 0 turns clipping off."""


@configuration
class LoopConfig:
    """Length of the run, its device, and how often states and measures are written."""

    epochs: Positive
    """Passes over the data."""
    max_steps: Positive | None = None
    """Most optimiser steps, whatever the epochs; the schedule ends there too."""
    micro_batch: Positive
    """Cells (pre-training, mixed batches) or pairs (fine-tuning) in a batch of one process."""
    accumulation: Positive = 1
    """Micro-batches of one optimiser step, in which each masked gene (pre-training) or cell counts once."""
    precision: Precision = "fp32"
    """Type of the arithmetic: bf16 from Ampere on, fp16 (with dynamic loss scaling) before; fp32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto, which takes CUDA if there is a device."""
    deepspeed: str | None = None
    """DeepSpeed JSON file; without one, plain torch runs on one process."""
    threads: Positive | None = None
    """CPU threads of torch; torch chooses by default."""
    seed: Natural = 0
    """Seed of weights, order, masks and dropout."""
    checkpoint_every: Positive = 1000
    """Optimiser steps between two states from which an interrupted run resumes."""
    keep_states: Positive = 2
    """States kept during the run; all but the last are removed when it ends."""
    validate_every: Positive | None = None
    """Optimiser steps between two validations; an epoch by default."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise SectionError(f"device is {self.device!r}; it must be auto, cpu or cuda.", field="device")


@configuration
class PretrainConfig:
    """Masked-language pre-training of a model on a corpus of cells."""

    output: str
    """Directory of the run: checkpoint, metrics, log, states."""
    corpus: CorpusConfig
    """Corpus to train on; built if it does not exist."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Options of the family's network; max_length is that of the corpus by default."""
    mask_probability: Annotated[float, within(1e-6, 1)] = 0.15
    """Share of the tokens that are masked."""
    validation_share: Annotated[float, within(0, 0.5)] = 0.02
    """Share of the cells, a seeded choice, that is held out to measure perplexity."""
    validation_cells: Positive = 2000
    """Most cells that are held out."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Order of the cells."""
    panel: PanelConfig = field(default_factory=PanelConfig)
    """Genes hidden from some training batches."""
    optimizer: OptimizerConfig
    """AdamW and its learning rate."""
    loop: LoopConfig
    """Length of the run, device, states."""


@configuration
class DegConfig(DegOptions):
    """Thresholds for a differentially expressed gene, and for a target that is strong enough to train on."""

    min_degs: Natural = 20
    """Fewest differentially expressed genes of a target that is trained on (Zhao et al. 2025)."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except InvalidParameterError as error:
            raise SectionError(error.message, field=error.field or "") from error


@configuration
class SplitConfig:
    """Division of targets and controls into training, validation and test."""

    fractions: Shares = (0.8, 0.1, 0.1)
    """Shares of the eligible targets: training, validation, test."""
    control_fractions: Shares = (0.8, 0.1, 0.1)
    """Shares of the control cells of each data set: training, validation, test."""
    validation: tuple[str, ...] | None = None
    """Targets to validate on, in every data set that has them, instead of a random choice."""
    test: tuple[str, ...] | None = None
    """Targets to hold out, instead of a random choice."""
    by_gene: bool = False
    """Divide labels that are guides of one gene (STAT1g2, sgSTAT1-1) together, by that gene."""
    score_ineligible: bool = True
    """Put the targets that are too weak to train on into heldout.h5ad too; no cell of them is trained on."""
    seed: Natural = 0
    """Seed of the random choices."""

    def __post_init__(self) -> None:
        for name in ("fractions", "control_fractions"):
            values = getattr(self, name)
            if values[0] <= 0:
                raise SectionError(f"{name} is {list(values)}; the first must be above 0.", field=name)
        if (self.validation is None) != (self.test is None):
            raise SectionError(
                "Give both validation and test targets, or neither; an empty list is allowed.", field="validation"
            )
        both = set(self.validation or ()) & set(self.test or ())
        if both:
            raise SectionError(f"The target {min(both)!r} is in validation and in test.", field="test")


@configuration
class LossConfig:
    """The margin contrastive loss (Hadsell et al. 2006; Zhao et al. 2025)."""

    margin: Annotated[float, within(1e-9, 1e9)] = 20.0
    """Distance up to which dissimilar cells are pushed apart, in units of the embedding."""
    half: bool = False
    """Halve both terms, as Hadsell et al. do."""
    squared_hinge: bool = True
    """Square the hinge of dissimilar pairs."""
    normalize: bool = False
    """Scale embeddings to unit length first; distances, and so the margin, are then at most 2."""

    def __post_init__(self) -> None:
        if self.normalize and self.margin > 2:
            raise SectionError(
                f"margin is {self.margin}, but unit vectors are at most 2 apart. Choose a margin up to 2.",
                field="margin",
            )


@configuration
class PairConfig:
    """Pairing of cells."""

    redraw: bool = False
    """Draw the size-matched controls of each target anew every epoch."""


@configuration
class GeometryConfig:
    """The expression geometry that mixed batches can keep; see training/objectives/geometry.py."""

    components: Positive = 50
    """Number of principal components."""
    power: Annotated[float, within(0, 2)] = 0.5
    """Exponent of a component's variance: 1 keeps principal components, 0 whitens them."""
    stretch: Annotated[float, within(0, 1e6)] = 3.0
    """Stretch of the axes between training perturbations; 0 does not use the labels."""


@configuration
class MixedConfig:
    """Batches that mix the perturbations of a data set, and the weights of their loss terms."""

    geometry: Weight = 0.0
    """Weight of the term that keeps the expression geometry."""
    margin_contrastive: Weight = 0.0
    """Weight of the margin contrastive loss over all pairs of a batch, of unit vectors around the mean cell."""
    supervised_contrastive: Weight = 0.0
    """Weight of the supervised contrastive loss: cells of one perturbation together (Khosla et al. 2020)."""
    info_nce: Weight = 0.0
    """Weight of InfoNCE: two views of a cell together (Oord et al. 2018); needs panel.share above 0."""
    cross_entropy: Weight = 0.0
    """Weight of the cross-entropy of a linear head that names the perturbation."""
    margin: Annotated[float, within(1e-9, 2)] = 1.0
    """Margin of the margin contrastive term, up to 2."""
    temperature: Annotated[float, within(1e-4, 1e3)] = 0.1
    """Temperature of the supervised contrastive and the InfoNCE term."""
    expression: GeometryConfig = field(default_factory=GeometryConfig)
    """Expression geometry to keep."""
    expressions: dict[str, GeometryConfig] = field(default_factory=dict)
    """Expression geometries that replace `expression`, by data set."""
    panel: PanelConfig = field(default_factory=PanelConfig)
    """Genes hidden from some batches; the geometry stays that of the whole cell."""
    panels: dict[str, PanelConfig] = field(default_factory=dict)
    """Panels that replace `panel`, by data set."""
    weights: dict[str, Annotated[float, within(1e-6, 1e6)]] = field(default_factory=dict)
    """Mean number of times that a cell is used in an epoch, by data set; 1 by default."""

    def __post_init__(self) -> None:
        terms = ("geometry", "margin_contrastive", "supervised_contrastive", "info_nce", "cross_entropy")
        if not any(getattr(self, name) for name in terms):
            raise SectionError(f"No term has a weight; give one of {', '.join(terms)}.", field="")
        if self.info_nce and not self.panel.share:
            raise SectionError(
                "info_nce compares two views of a cell, but panel.share is 0, so both would be equal. Raise it.",
                field="panel.share",
            )


@configuration
class ContrastiveConfig:
    """Contrastive fine-tuning of a pre-trained checkpoint on perturbed and control cells."""

    output: str
    """Directory of the run: checkpoint, held-out cells, metrics, log, states."""
    checkpoint: str
    """Pre-trained checkpoint to start from."""
    corpus: CorpusConfig
    """Perturbation data sets, between which no pairs are made; tokens are made with the checkpoint's medians."""
    degs: DegConfig = field(default_factory=DegConfig)
    """Thresholds of differential expression."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Targets and controls to hold out."""
    pairs: PairConfig = field(default_factory=PairConfig)
    """Pairing of cells."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss of pairs."""
    mixed: MixedConfig | None = None
    """Train on mixed batches with this loss instead of alternating pairs."""
    select: Literal["last", "best"] = "last"
    """Weights that become the checkpoint: those of the last step, or of the lowest validation loss."""
    validation_z: bool = True
    """Measure also the median z of the validation targets' E-distance from control."""
    optimizer: OptimizerConfig
    """AdamW and its learning rate."""
    loop: LoopConfig
    """Length of the run, device, states."""

    def __post_init__(self) -> None:
        if self.loop.micro_batch < 3:
            raise SectionError(
                f"loop.micro_batch is {self.loop.micro_batch} pairs; at least 3 are needed, so that what is left of a "
                "target can always form a batch of 2.",
                field="loop.micro_batch",
            )
