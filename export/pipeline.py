"""The export from a checkpoint to a bundle, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from export import ExportError, graph, parity
from export.card import model_card
from export.files import GraphFiles
from export.variants import VARIANTS, VariantName
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import BundleError, InvalidParameterError
from perturbscope.families import Family, load_family
from perturbscope.families.outputs import CELL_EMBEDDING
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.bundle import (
    GOLDEN,
    MODEL_CARD,
    VOCABULARY,
    Bundle,
    Manifest,
    Variant,
    capabilities_of,
)
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Values
from perturbscope.inference.golden_making import make_golden
from training import families
from training.checkpoint import CONFIG, Checkpoint, load_checkpoint
from training.families.specs import ExportSpec

MIN_COSINE = 0.99
"""Default of the lowest cosine between a cell of a variant and of the float32 graph."""
_COMPARED_CELLS = 32

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, the steps done and all steps."""


def export_checkpoint(
    checkpoint: str | Path,
    bundle: str | Path,
    *,
    name: str,
    version: str,
    layer: str | None = None,
    pooling: str | None = None,
    variants: Sequence[VariantName] = (),
    cells: CountMatrix | None = None,
    card: str | None = None,
    licence: str | None = None,
    tolerance: float = 1e-4,
    min_cosine: float = MIN_COSINE,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint; either a complete and checked bundle is written, or nothing.

    Parameters
    ----------
    checkpoint
        Directory of a checkpoint.
    bundle
        Directory to create.
    name, version
        Name and version under which a server offers the model.
    layer, pooling
        Options of the model's configuration that make the cell embedding (of the rank family: ``penultimate`` or
        ``last``, ``mean`` or ``cls``); by default those of the checkpoint.
    variants
        Smaller graphs beside the float32 graph.
    cells
        Real cells to compare the variants on; by default, random genes at lengths up to the longest.
    card
        Text of the model card; by default, made of the facts in the manifest.
    licence
        Licence of the weights; by default, that in the provenance of the checkpoint.
    tolerance
        Largest absolute difference between torch and ONNX Runtime.
    min_cosine
        Lowest cosine between a cell of a variant and of the float32 graph.
    seed
        Seed of the cells that are compared.
    overwrite
        Whether to replace an existing bundle.
    progress
        Called after each step.

    Raises
    ------
    ParityError
        The graph or a variant misses its tolerance.
    GraphError
        The graph holds unused parts, or could not be fused.
    BundleError
        The checkpoint cannot be read, or `bundle` exists.
    InvalidParameterError
        An option is outside its range.
    """
    path = Path(bundle)
    _check_options(path, name=name, version=version, variants=variants, tolerance=tolerance, overwrite=overwrite)
    _refuse_published(Path(checkpoint))
    source = load_checkpoint(checkpoint)
    family = load_family(source.family, source.family_config, source.vocabulary)
    half = families.load(source.family)
    chosen = {option: value for option, value in (("layer", layer), ("pooling", pooling)) if value is not None}
    config = half.parse_config({**source.model_config, **chosen})
    _check_length(family, config.max_length)
    spec = half.export_spec(config, family=family)
    batches = list(parity.parity_batches(family, seed=seed))
    steps = _Steps(2 + len(batches) + 2 * len(variants) + bool(variants), progress)
    example = parity.random_batch(family, (3, 2), rng=np.random.default_rng(seed))

    with TemporaryDirectory(prefix="perturbscope-export-") as folder:
        graphs = GraphFiles(Path(folder))
        fp32 = graph.build_graph(source.model(**{**chosen, **spec.overrides}), spec, example)
        facts = graph.graph_facts(fp32)
        graphs.add("fp32", fp32)
        del fp32
        steps.done("graph")
        result = parity.check_parity(
            parity.torch_runner(spec.reference(source.model(**chosen)), spec.outputs),
            _runner(graphs, "fp32", spec),
            batches,
            outputs=spec.outputs,
            tolerance=tolerance,
            advance=lambda: steps.done("parity"),
        )
        result |= {
            "torch": torch.__version__,
            "onnxruntime": ort.__version__,
            "blocks_in_graph": facts.blocks,
            "blocks_of_model": half.size(config, source.vocabulary).layers,
        }
        listed = {"fp32": graphs.described("fp32")}
        if variants:
            result |= _add_variants(
                graphs, listed, variants, family, spec, cells, min_cosine=min_cosine, seed=seed, steps=steps
            )
        manifest = Manifest(
            name=name,
            version=version,
            family=source.family,
            family_config=source.family_config,
            width=spec.outputs[0].width,
            layer=spec.embedding.layer,
            pooling=spec.embedding.pooling,
            vocabulary_hash=source.vocabulary.hash,
            variants=listed,
            parity=result,
            training=_training(source),
            licence=licence or str(source.provenance.get("licence", "not stated")),
            outputs=spec.outputs,
            task=spec.task,
            capabilities=capabilities_of(spec.outputs, edits=bool(family.edits)),
        )
        embedders = {variant: _embedder(family, graphs, variant, spec) for variant in listed}
        golden = make_golden(embedders, source.vocabulary, cells=cells, tolerance=tolerance, seed=seed)
        files: dict[str, Path | bytes] = {
            **graphs.files,
            VOCABULARY: source.vocabulary.to_tsv().encode(),
            GOLDEN: golden.to_json(source.vocabulary).encode(),
            MODEL_CARD: (model_card(manifest, source.vocabulary) if card is None else card).encode(),
        }
        written = Bundle.write(path, manifest, files, overwrite=overwrite)
    steps.done("bundle")
    return written


def _add_variants(
    graphs: GraphFiles,
    listed: dict[str, Variant],
    variants: Sequence[VariantName],
    family: Family,
    spec: ExportSpec,
    cells: CountMatrix | None,
    *,
    min_cosine: float,
    seed: int,
    steps: _Steps,
) -> dict[str, Any]:
    """Write the variants, add them to those that are listed, and return how far they are from float32."""
    tokens = _compared_cells(family, cells, seed=seed)
    expected = parity.one_by_one(_runner(graphs, "fp32", spec), tokens, family, spec.outputs)
    steps.done("float32 embeddings")
    found: dict[str, Any] = {}
    for variant in variants:
        graphs.add(variant, VARIANTS[variant](graphs.load("fp32")))
        steps.done(f"{variant} graph")
        values = parity.one_by_one(_runner(graphs, variant, spec), tokens, family, spec.outputs)
        found[variant] = parity.compare_variant(variant, expected, values, min_cosine=min_cosine)
        listed[variant] = graphs.described(variant, cosine=found[variant]["lowest_cosine"])
        steps.done(f"{variant} embeddings")
    compared = {
        "kind": "random genes" if cells is None else "real cells",
        "n": len(tokens),
        "shortest": int(tokens.lengths.min()),
        "longest": int(tokens.lengths.max()),
    }
    return {"compared_cells": compared, "variants": found}


class _Steps:
    """Counter of steps for the progress display of the caller."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def done(self, stage: str) -> None:
        self._done += 1
        if self._progress:
            self._progress(stage, self._done, self._total)


def _check_options(
    path: Path, *, name: str, version: str, variants: Sequence[str], tolerance: float, overwrite: bool
) -> None:
    for field, value in {"name": name, "version": version}.items():
        if not value or set(value) & set("/\\ \t\n"):
            raise InvalidParameterError(
                f"The {field} {value!r} is empty, or has a slash or white space; it becomes part of the model's id.",
                field=field,
            )
    for variant in variants:
        if variant not in VARIANTS or list(variants).count(variant) > 1:
            raise InvalidParameterError(
                f"The variant {variant!r} is unknown or given twice; there are {', '.join(VARIANTS)}.", field="variant"
            )
    if not 0 < tolerance < 1:
        raise InvalidParameterError(f"The tolerance is {tolerance}; it must lie between 0 and 1.", field="tolerance")
    if path.exists() and not overwrite:
        raise BundleError(f"{path} exists already. Give another directory, or allow overwriting (--overwrite).")


def _refuse_published(path: Path) -> None:
    """Raise InvalidParameterError for a directory as transformers saves it: it has a file of a checkpoint's name."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(config, dict) and "format_version" not in config and {"architectures", "model_type"} & set(config):
        raise InvalidParameterError(
            f"{path} is a Hugging Face directory, not a checkpoint; adopt it first: python -m training adopt "
            f"geneformer {path} CHECKPOINT. Then export CHECKPOINT.",
            field="checkpoint",
        )


def _check_length(family: Family, positions: int) -> None:
    if family.max_length > positions:
        raise ExportError(
            f"The tokenizer emits up to {family.max_length} tokens, the model has {positions} positions. "
            "Set max_length of the family to at most that of the model, and train again."
        )


def _compared_cells(family: Family, cells: CountMatrix | None, *, seed: int) -> TokenizedCells:
    """Tokenize cells to compare variants on: of the given ones, or random ones with lengths as in cells."""
    rng = np.random.default_rng(seed)
    if cells is None:
        lengths = rng.integers(max(family.max_length // 10, 1), family.max_length, size=_COMPARED_CELLS, endpoint=True)
        return family.tokenize(parity.random_cells(family.vocabulary, lengths.tolist(), rng=rng))
    tokens = family.tokenize(cells)
    return tokens.take(np.sort(rng.permutation(len(tokens))[:_COMPARED_CELLS]))


class _GraphEncoder:
    """An encoder around a graph that is not in a bundle yet."""

    provider = ""

    def __init__(self, graphs: GraphFiles, variant: str, spec: ExportSpec) -> None:
        self._graphs, self._variant, self.outputs = graphs, variant, spec.outputs

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        return self._graphs.run(self._variant, inputs, outputs)

    def close(self) -> None:
        """Do nothing: the graphs are closed with their folder."""


def _embedder(family: Family, graphs: GraphFiles, variant: str, spec: ExportSpec) -> Embedder:
    return Embedder(family, _GraphEncoder(graphs, variant, spec), model_id="", vocabulary_hash="", variant=variant)


def _runner(graphs: GraphFiles, variant: str, spec: ExportSpec) -> parity.Runner:
    names = [item.name for item in spec.outputs]
    return lambda batch: graphs.run(variant, batch, names)


def _training(source: Checkpoint) -> dict[str, Any]:
    return {
        **source.provenance,
        "model_config": source.model_config,
        "checkpoint_perturbscope_version": source.perturbscope_version,
    }
