"""Small bundles for tests. Their graphs are built node by node, without torch or export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.inference.bundle import Bundle, Manifest, Variant

TINY_WIDTH = 8


def masked_mean_graph(n_tokens: int, width: int, *, seed: int = 0) -> bytes:
    """Build ``cell_embedding = mean over tokens of table[input_ids]`` with random weights; opset 17."""
    table = np.random.default_rng(seed).standard_normal((n_tokens, width)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask_3d"]),
        helper.make_node("Mul", ["hidden", "mask_3d"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "tokens"], ["n_tokens"], keepdims=1),
        helper.make_node("Div", ["total", "n_tokens"], ["cell_embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "masked_mean",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"]),
        ],
        [helper.make_tensor_value_info("cell_embedding", TensorProto.FLOAT, ["batch", width])],
        initializer=[
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([1], dtype=np.int64), "tokens"),
            numpy_helper.from_array(np.array([2], dtype=np.int64), "last"),
        ],
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


def tiny_files(*, seed: int = 0) -> dict[str, Path | bytes]:
    """Return the files of the tiny bundle for :meth:`Bundle.write`; `seed` decides the weights."""
    vocabulary = GeneVocabulary.geneformer_gc30m()
    return {
        "model.onnx": masked_mean_graph(len(vocabulary), TINY_WIDTH, seed=seed),
        "vocabulary.tsv": vocabulary.to_tsv().encode(),
        "MODEL_CARD.md": b"# tiny\n\nRandom weights, for tests.\n",
    }


def write_tiny_bundle(path: Path, *, seed: int = 0, name: str = "tiny", overwrite: bool = False) -> Path:
    """Write a bundle of width 8 over the whole default vocabulary; `seed` decides its weights."""
    return Bundle.write(path, tiny_manifest(name=name), tiny_files(seed=seed), overwrite=overwrite).path
