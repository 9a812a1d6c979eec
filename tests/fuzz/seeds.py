"""Valid messages from which fuzzing starts.

``python -m tests.fuzz.seeds FOLDER`` writes them to FOLDER/<target>/.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import Embeddings, OutputValues
from perturbscope.protocol import (
    CompareAnswer,
    CompareRequest,
    EmbedRequest,
    Meta,
    ModelInfo,
    ModelProblem,
    ModelsAnswer,
    OutputInfo,
    ScoreAnswer,
    ScoreRequest,
)
from perturbscope.protocol.proto.open_inference_pb2 import ModelInferRequest
from perturbscope.protocol.protobuf_streams import stream_cells_to_proto, stream_start_to_proto
from perturbscope.protocol.streams import StreamStart
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult
from tests.arrow_client import stream_request_to_arrow

OPTIONS = ScoreOptions(permutations=9, min_cells=2, repeats=1)
LABELS = ("control",) * 4 + ("KO",) * 4


def cells(n_genes: int = 5) -> CountMatrix:
    """Make eight cells of a few genes."""
    counts = np.random.default_rng(0).poisson(1.5, (8, n_genes))
    counts[:, 0] += 1
    return CountMatrix.from_matrix(counts, list(GeneVocabulary.geneformer_gc30m().gene_ids[:n_genes]))


def h5ad(matrix: CountMatrix | None = None, *, compression: str | None = None, sparse: bool = True) -> bytes:
    """Write an AnnData file with labels, batches and a representation, without anndata: small and always the same."""
    matrix = cells() if matrix is None else matrix
    target = io.BytesIO()
    text = h5py.string_dtype()
    with h5py.File(target, "w", libver=("earliest", "v108"), track_order=False) as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        if sparse:
            x = file.create_group("X")
            x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": matrix.counts.shape})
            for name in ("data", "indices", "indptr"):
                x.create_dataset(name, data=getattr(matrix.counts, name), compression=compression)
        else:
            x = file.create_dataset("X", data=matrix.counts.toarray(), compression=compression)
            x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        frames: dict[str, dict[str, Any]] = {
            "obs": {
                "_index": [f"c{i}" for i in range(len(matrix))],
                "perturbation": np.resize(np.array(LABELS, dtype=object), len(matrix)),
                "batch": np.resize(np.array(["a", "b"], dtype=object), len(matrix)),
            },
            "var": {"_index": matrix.gene_ids.astype(object)},
        }
        for name, columns in frames.items():
            frame = file.create_group(name)
            order = np.array([column for column in columns if column != "_index"], dtype=object)
            frame.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            frame.attrs.create("column-order", order, dtype=text)
            for column, values in columns.items():
                item = frame.create_dataset(column, data=np.asarray(values, dtype=object), dtype=text)
                item.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        obsm = file.create_group("obsm")
        obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        item = obsm.create_dataset("X_pca", data=np.random.default_rng(1).standard_normal((len(matrix), 3)))
        item.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return target.getvalue()


def seeds() -> dict[str, dict[str, bytes]]:
    """Return valid inputs of every target by name."""
    matrix = cells()
    vectors = np.random.default_rng(2).standard_normal((8, 3)).astype(np.float32)
    requests: list[tuple[str, Any]] = [
        ("embed", EmbedRequest(cells=matrix, model="m", outputs=("value", "classes"))),
        ("score", ScoreRequest(cells=matrix, perturbations=LABELS, control="control", options=OPTIONS)),
        (
            "compare",
            CompareRequest(
                embeddings=vectors,
                perturbations=("A",) * 4 + ("B",) * 4,
                pairs=(("A", "B"),),
                batches=("x", "y") * 4,
                options=OPTIONS,
                control=None,
            ),
        ),
    ]
    answers = _answers(vectors)
    found: dict[str, dict[str, bytes]] = {name: {} for name in ("json", "arrow", "proto", "h5ad")}
    messages = [(f"{kind}_request", item) for kind, item in requests] + [
        (f"{kind}_answer", item) for kind, item in answers
    ]
    for at, (name, message) in enumerate(messages):
        first = bytes([at])
        found["json"][name] = first + _written(message, "json")
        found["proto"][name] = first + _written(message, "proto").SerializeToString(deterministic=True)
        if name != "models_answer":
            found["arrow"][name] = first + _written(message, "arrow")
    for route, name in enumerate(("embed", "columns", "score", "compare", "report")):
        found["h5ad"][name] = bytes([route]) + h5ad()
    found["h5ad"]["dense"] = b"\0" + h5ad(sparse=False)
    found["h5ad"]["gzip"] = b"\0" + h5ad(cells(40), compression="gzip")
    found["stream"] = _streams(matrix)
    found["kserve"] = _infer_requests()
    return found


def _written(message: Any, form: str) -> Any:
    what = "request" if type(message).__name__.endswith("Request") else "answer"
    return getattr(protocol, f"{what}_to_{form}")(message)


def _streams(matrix: CountMatrix) -> dict[str, bytes]:
    start = StreamStart(gene_ids=matrix.gene_ids, model="m", first_row=3, outputs=("value",))
    return {
        "request-arrow": b"\0" + b"".join(stream_request_to_arrow(start, [matrix[:4], matrix[4:]])),
        "start-proto": b"\2" + stream_start_to_proto(start).SerializeToString(deterministic=True),
        "cells-proto": b"\2" + stream_cells_to_proto(matrix).SerializeToString(deterministic=True),
    }


def _infer_requests() -> dict[str, bytes]:
    ids, mask = [[5, 6, 7], [8, 9, 0]], [[1, 1, 1], [1, 1, 0]]
    inputs: list[dict[str, Any]] = [
        {"name": name, "shape": [2, 3], "datatype": "INT64", "data": values}
        for name, values in (("input_ids", ids), ("attention_mask", mask))
    ]
    text = json.dumps({"id": "1", "inputs": inputs, "outputs": [{"name": "cell_embedding"}]}).encode()
    binary = [
        {**{key: item[key] for key in ("name", "shape", "datatype")}, "parameters": {"binary_data_size": 48}}
        for item in inputs
    ]
    head = json.dumps({"inputs": binary, "parameters": {"binary_data_output": True}}).encode()
    tensors = [np.array(item["data"], dtype="<i8").tobytes() for item in inputs]
    message = ModelInferRequest(model_name="tiny", id="1")
    for item, raw in zip(inputs, tensors, strict=True):
        message.inputs.add(name=item["name"], datatype="INT64", shape=[2, 3])
        message.raw_input_contents.append(raw)
    plain = ModelInferRequest(model_name="tiny")
    for item in inputs:
        tensor = plain.inputs.add(name=item["name"], datatype="INT64", shape=[2, 3])
        tensor.contents.int64_contents.extend(np.ravel(item["data"]).tolist())
    return {
        "json": b"\0" + text,
        "binary": b"\1" + len(head).to_bytes(2, "little") + head + b"".join(tensors),
        "proto-raw": b"\2" + message.SerializeToString(deterministic=True),
        "proto": b"\2" + plain.SerializeToString(deterministic=True),
    }


def _answers(vectors: Any) -> list[tuple[str, Any]]:
    coverage = GeneCoverage(n_genes=5, n_matched=4, n_by_symbol=1, n_merged=0, n_ambiguous=0, unmatched=("x",))
    meta = Meta(model_id="m-1-0", vocabulary_hash="0" * 8, coverage=coverage, timings={"score": 0.5})
    ones = np.ones(8, dtype=np.int32)
    score: ScoreResult = score_perturbations(vectors, list(LABELS), control="control", options=OPTIONS)
    compare: CompareResult = compare_perturbations(vectors, ["A"] * 4 + ["B"] * 4, options=OPTIONS)
    names = ("name", "version", "model_id", "family", "vocabulary_hash", "layer", "pooling", "licence", "variant")
    output = OutputInfo(name="class", per="cell", width=2, meaning="logits", names=("a", "b"))
    model = ModelInfo(width=3, device="cpu", outputs=(output,), classes=("a", "b"), **dict.fromkeys(names, "text"))
    problem = ModelProblem(name="folder", problem="text")
    outputs = _outputs(len(vectors))
    embeddings = Embeddings(
        vectors, ones, ones, ones.astype(np.float32), coverage, "m-1-0", "0" * 8, {"queue": 0.1}, "fp32", outputs
    )
    return [
        ("embed", embeddings),
        ("score", ScoreAnswer(result=score, meta=meta)),
        ("compare", CompareAnswer(result=compare, meta=meta)),
        ("models", ModelsAnswer(models=(model,), problems=(problem,))),
    ]


def _outputs(n_cells: int) -> dict[str, OutputValues]:
    """An output per token, of one gene in the first cell and two in the others, and one per cell."""
    value = OutputSpec(name="value", per="token", width=1, meaning="value")
    classes = OutputSpec(name="classes", per="cell", width=2, meaning="logits", names=("a", "b"))
    offsets = np.maximum(2 * np.arange(n_cells + 1) - 1, 0)
    genes = (np.arange(offsets[-1]) % 3).astype(np.int32)
    values = np.arange(2 * offsets[-1], dtype=np.float32)[:, None]
    names = ("ENSG00000115415", "ENSG00000168610", "ENSG00000125347")
    return {
        "value": OutputValues(value, values[: offsets[-1]], offsets, genes, names),
        "classes": OutputValues(classes, values[: 2 * n_cells].reshape(-1, 2)),
    }


def main(folder: Path) -> None:
    """Write the seeds, and a dictionary of the words of the formats for the fuzzer."""
    words: set[str] = set()
    for target, found in seeds().items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, data in found.items():
            (folder / target / name).write_bytes(data)
        for data in found.values():
            if target == "json":
                words |= set(_names(json.loads(data[1:])))
    lines = [f'"{word}"' for word in sorted(words) if word.isidentifier()]
    (folder / "words.dict").write_text("\n".join(lines) + "\n")


def _names(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(name for item in value.values() for name in _names(item))]
    return [name for item in value for name in _names(item)] if isinstance(value, list) else []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
