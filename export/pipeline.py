"""The export from a checkpoint to a bundle, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from transformers import BertForMaskedLM

from export import ExportError, graph, parity
from export.card import model_card
from export.forms import standard_attention
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import BundleError, InvalidParameterError
from perturbscope.families import Family, load_family
from perturbscope.families.outputs import CELL_EMBEDDING, cell_embedding
from perturbscope.inference.bundle import GOLDEN, MODEL_CARD, VOCABULARY, Bundle, Manifest, Variant
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Values
from perturbscope.inference.golden_making import make_golden
from training.checkpoint import Checkpoint, load_checkpoint
from training.families.rank.pooling import LAYER, POOLING

VariantName = Literal["fp16", "fp16-flash", "int8"]
VARIANTS: dict[str, Callable[[ModelProto], ModelProto]] = {
    "fp16": graph.half_precision,
    "fp16-flash": lambda fp32: graph.half_precision(standard_attention(fp32)),
    "int8": graph.eight_bit,
}
"""Variants, with the functions that make them from the float32 graph."""
MIN_COSINE = 0.99
"""Default of the lowest cosine between a cell of a variant and of the float32 graph."""
_FP32_FILE = "model.onnx"
_COMPARED_CELLS = 32

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, the steps done and all steps."""


def export_checkpoint(
    checkpoint: str | Path,
    bundle: str | Path,
    *,
    name: str,
    version: str,
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
    source = load_checkpoint(checkpoint)
    family = load_family(source.family, source.family_config, source.vocabulary)
    reference = cast("BertForMaskedLM", source.model())
    _check_length(family, reference)
    batches = list(parity.parity_batches(source.vocabulary, family.max_length, seed=seed))
    steps = _Steps(2 + len(batches) + 2 * len(variants) + bool(variants), progress)

    fp32 = graph.build_graph(cast("BertForMaskedLM", source.model(attention="eager")))
    steps.done("graph")
    run_fp32 = parity.graph_runner(fp32)
    result = parity.check_parity(
        parity.torch_runner(reference),
        run_fp32,
        iter(batches),
        tolerance=tolerance,
        advance=lambda: steps.done("parity"),
    )
    facts = graph.graph_facts(fp32)
    result |= {
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "blocks_in_graph": facts.blocks,
        "blocks_of_model": reference.config.num_hidden_layers,
    }
    files: dict[str, Path | bytes] = {_FP32_FILE: fp32.SerializeToString()}
    listed = {"fp32": Variant(file=_FP32_FILE)}
    embedders = {"fp32": _embedder(family, run_fp32, reference.config.hidden_size, "fp32")}
    if variants:
        sequences = _compared_cells(family, source, cells, seed=seed)
        expected = _embed(run_fp32, sequences)
        steps.done("float32 embeddings")
        result["compared_cells"] = {
            "kind": "random genes" if cells is None else "real cells",
            "n": len(sequences),
            "shortest": min(map(len, sequences)),
            "longest": max(map(len, sequences)),
        }
        result["variants"] = {}
        for variant in variants:
            smaller = VARIANTS[variant](fp32)
            steps.done(f"{variant} graph")
            run_smaller = parity.graph_runner(smaller)
            embedders[variant] = _embedder(family, run_smaller, reference.config.hidden_size, variant)
            embeddings = _embed(run_smaller, sequences)
            measured = parity.compare_variant(variant, expected, embeddings, min_cosine=min_cosine)
            steps.done(f"{variant} embeddings")
            file = f"model.{variant}.onnx"
            files[file] = smaller.SerializeToString()
            listed[variant] = Variant(file=file, cosine=measured["lowest_cosine"])
            result["variants"][variant] = measured
    manifest = Manifest(
        name=name,
        version=version,
        family=source.family,
        family_config=source.family_config,
        width=reference.config.hidden_size,
        layer=LAYER,
        pooling=POOLING,
        vocabulary_hash=source.vocabulary.hash,
        variants=listed,
        parity=result,
        training=_training(source),
        licence=licence or str(source.provenance.get("licence", "not stated")),
    )
    files[VOCABULARY] = source.vocabulary.to_tsv().encode()
    golden = make_golden(embedders, source.vocabulary, cells=cells, tolerance=tolerance, seed=seed)
    files[GOLDEN] = golden.to_json(source.vocabulary).encode()
    files[MODEL_CARD] = (model_card(manifest, source.vocabulary) if card is None else card).encode()
    written = Bundle.write(path, manifest, files, overwrite=overwrite)
    steps.done("bundle")
    return written


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


def _check_length(family: Family, model: BertForMaskedLM) -> None:
    positions = model.config.max_position_embeddings
    if family.max_length > positions:
        raise ExportError(
            f"The tokenizer emits up to {family.max_length} tokens, the model has {positions} positions. "
            "Set max_length of the family to at most that of the model, and train again."
        )


def _compared_cells(
    family: Family, source: Checkpoint, cells: CountMatrix | None, *, seed: int
) -> list[NDArray[np.int64]]:
    """Return token sequences to compare variants on: of the given cells, or random ones with lengths as in cells."""
    rng = np.random.default_rng(seed)
    if cells is None:
        lengths = rng.integers(max(family.max_length // 10, 1), family.max_length, size=_COMPARED_CELLS, endpoint=True)
        return parity.random_cells(source.vocabulary, lengths.tolist(), rng=rng)
    tokens = family.tokenize(cells)
    sample = np.sort(rng.permutation(len(tokens))[:_COMPARED_CELLS])
    return [tokens[int(cell)]["input_ids"].astype(np.int64) for cell in sample]


class _GraphEncoder:
    """An encoder around a graph that is not in a bundle yet."""

    provider = ""

    def __init__(self, run: parity.Runner, width: int) -> None:
        self._run, self.outputs = run, (cell_embedding(width),)

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        return {CELL_EMBEDDING: self._run(*(inputs[name] for name in graph.INPUTS))}

    def close(self) -> None:
        """Do nothing: the graph is freed with the process."""


def _embedder(family: Family, run: parity.Runner, width: int, variant: str) -> Embedder:
    return Embedder(family, _GraphEncoder(run, width), model_id="", vocabulary_hash="", variant=variant)


def _embed(run: parity.Runner, sequences: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    """Embed cells one by one, and so without padding; float32 [n, H]."""
    return np.concatenate([run(ids[None, :], np.ones((1, len(ids)), dtype=np.int64)) for ids in sequences])


def _training(source: Checkpoint) -> dict[str, Any]:
    return {
        **source.provenance,
        "model_config": source.model_config,
        "checkpoint_perturbscope_version": source.perturbscope_version,
    }
