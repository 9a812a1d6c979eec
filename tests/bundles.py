"""Small bundles for tests. Their graphs are built node by node, without torch or export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families.outputs import GENE_EMBEDDING, OutputSpec, cell_embedding
from perturbscope.inference.bundle import Bundle, Manifest, Variant

TINY_WIDTH = 8
CLASSES = ("resting", "dividing", "dying")
TINY_OUTPUTS = (
    cell_embedding(TINY_WIDTH),
    OutputSpec(name=GENE_EMBEDDING, per="token", width=TINY_WIDTH, meaning="embedding"),
    OutputSpec(name="gene_value", per="token", width=1, meaning="value"),
    OutputSpec(name="cell_logits", per="cell", width=len(CLASSES), meaning="logits", names=CLASSES),
)
"""Outputs of the tiny bundle with several outputs."""


def tiny_table(n_tokens: int, width: int = TINY_WIDTH, *, seed: int = 0) -> NDArray[np.float32]:
    """Return the weights of the tiny graph: a vector for each token, [n_tokens, width]."""
    return np.random.default_rng(seed).standard_normal((n_tokens, width)).astype(np.float32)


def masked_mean_graph(n_tokens: int, width: int, *, seed: int = 0, n_values: int = 0) -> bytes:
    """Build ``cell_embedding = mean over tokens of table[input_ids]`` with random weights; opset 17.

    Parameters
    ----------
    n_tokens, width, seed
        Shape and seed of the table, see :func:`tiny_table`.
    n_values
        If not 0, the graph has the other outputs of :data:`TINY_OUTPUTS` too: ``gene_embedding = table[input_ids]``,
        ``gene_value = input_ids / 2``, which fails for an id of `n_values` or more, and ``cell_logits``, the first
        values of the cell embedding.
    """
    table = tiny_table(n_tokens, width, seed=seed)
    outputs = [helper.make_tensor_value_info("cell_embedding", TensorProto.FLOAT, ["batch", width])]
    initializer = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([1], dtype=np.int64), "tokens"),
        numpy_helper.from_array(np.array([2], dtype=np.int64), "last"),
    ]
    more = []
    if n_values:
        more = [
            helper.make_node("Identity", ["hidden"], ["gene_embedding"]),
            helper.make_node("Gather", ["halves", "input_ids"], ["gene_value"]),
            helper.make_node("Slice", ["cell_embedding", "start", "n_classes", "tokens"], ["cell_logits"]),
        ]
        initializer += [
            numpy_helper.from_array(np.arange(n_values, dtype=np.float32)[:, None] / 2, "halves"),
            numpy_helper.from_array(np.array([0], dtype=np.int64), "start"),
            numpy_helper.from_array(np.array([len(CLASSES)], dtype=np.int64), "n_classes"),
        ]
        outputs += [
            helper.make_tensor_value_info(
                spec.name,
                TensorProto.FLOAT,
                ["batch", *(["length"] if spec.per == "token" else []), spec.width],
            )
            for spec in TINY_OUTPUTS[1:]
        ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask_3d"]),
        helper.make_node("Mul", ["hidden", "mask_3d"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "tokens"], ["n_tokens"], keepdims=1),
        helper.make_node("Div", ["total", "n_tokens"], ["cell_embedding"]),
        *more,
    ]
    graph = helper.make_graph(
        nodes,
        "masked_mean",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"]),
        ],
        outputs,
        initializer=initializer,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def tiny_manifest(**changes: Any) -> Manifest:
    """Return the manifest of the tiny bundle, with changes."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": "0.1",
        "family": "rank",
        "family_config": {"max_length": 2048},
        "width": TINY_WIDTH,
        "layer": "embeddings",
        "pooling": "mean over tokens",
        "vocabulary_hash": GeneVocabulary.geneformer_gc30m().hash,
        "variants": {"fp32": Variant(file="model.onnx")},
        "parity": {},
        "training": {"data": "none: random weights for tests"},
        "licence": "Apache-2.0",
    }
    return Manifest(**(fields | changes))


def tiny_files(*, seed: int = 0, vocabulary: GeneVocabulary | None = None) -> dict[str, Path | bytes]:
    """Return the files of the tiny bundle for :meth:`Bundle.write`; `seed` decides the weights."""
    vocabulary = vocabulary or GeneVocabulary.geneformer_gc30m()
    return {
        "model.onnx": masked_mean_graph(len(vocabulary), TINY_WIDTH, seed=seed),
        "vocabulary.tsv": vocabulary.to_tsv().encode(),
        "MODEL_CARD.md": b"# tiny\n\nRandom weights, for tests.\n",
    }


def write_tiny_bundle(path: Path, *, seed: int = 0, name: str = "tiny", overwrite: bool = False) -> Path:
    """Write a bundle of width 8 over the whole default vocabulary; `seed` decides its weights."""
    return Bundle.write(path, tiny_manifest(name=name), tiny_files(seed=seed), overwrite=overwrite).path


def write_outputs_bundle(path: Path, *, seed: int = 0, ends: bool = False, **changes: Any) -> Path:
    """Write a bundle with the outputs of :data:`TINY_OUTPUTS`; `changes` are those of its manifest.

    With `ends` its vocabulary is the second one, and cells have special tokens at both ends.
    """
    vocabulary = GeneVocabulary.geneformer_gc95m() if ends else GeneVocabulary.geneformer_gc30m()
    config = {"max_length": 2048, **({"start": "<cls>", "end": "<eos>"} if ends else {})}
    manifest = tiny_manifest(
        **{
            "name": "tiny-outputs",
            "outputs": TINY_OUTPUTS,
            "task": "cell_classification",
            "family_config": config,
            "vocabulary_hash": vocabulary.hash,
            **changes,
        }
    )
    graph = masked_mean_graph(len(vocabulary), TINY_WIDTH, seed=seed, n_values=len(vocabulary))
    files = tiny_files(seed=seed, vocabulary=vocabulary) | {"model.onnx": graph}
    return Bundle.write(path, manifest, files).path
