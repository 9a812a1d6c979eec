"""Check an image from inside, beside its service: embed a cell over HTTP and gRPC, look at user, packages and bill.

usage: python3 image_check.py [HTTP_PORT [GRPC_PORT]]
"""

import importlib.util
import json
import os
import sys
import time
import urllib.request
from importlib import metadata
from pathlib import Path

import numpy as np

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.client import GrpcClient

http_port, grpc_port = (sys.argv[1:3] + ["3000", "3001"][len(sys.argv) - 1 :])[:2]
base_url = f"http://127.0.0.1:{http_port}"


def check(what: str, holds: bool) -> None:
    print(f"  {'ok  ' if holds else 'FAIL'} {what}")
    if not holds:
        sys.exit(1)


def writable(folder: str) -> bool:
    probe = Path(folder, ".write-probe")
    try:
        probe.touch()
    except OSError:
        return False
    probe.unlink()
    return True


rng = np.random.default_rng(0)
gene_ids = list(GeneVocabulary.geneformer_gc30m().gene_ids[:500])
counts = rng.poisson(1.0, size=500).astype(np.int32)
kept = np.flatnonzero(counts)
body = {
    "cells": {
        "gene_ids": gene_ids,
        "indptr": [0, len(kept)],
        "indices": kept.tolist(),
        "data": counts[kept].tolist(),
    }
}

check(f"not root (uid {os.getuid()})", os.getuid() != 0)
for package in ("torch", "transformers", "deepspeed", "jax", "tensorflow"):
    check(f"no {package}", importlib.util.find_spec(package) is None)
check("the code, the bundle and the packages are read-only", not any(map(writable, ("/app", "/opt/venv", "/etc"))))

# The bill of materials lists what is here, each package with the hash of the wheel that pip took.
bill = json.loads(Path("/app/sbom.cdx.json").read_text())
parts = [bill["metadata"]["component"], *bill["components"]]
listed = {part["name"]: part for part in parts if part.get("purl", "").startswith("pkg:pypi/")}
installed = {
    found.metadata["Name"].lower().replace("_", "-").replace(".", "-"): found.version
    for found in metadata.distributions()
}
check(
    f"the bill of materials lists the {len(installed)} packages that are installed",
    installed == {name: part["version"] for name, part in listed.items()},
)
without = [name for name in installed if name != "perturbscope" and not listed[name].get("hashes")]
check(f"each with the hash of its wheel{': not ' if without else ''}{', '.join(without)}", not without)
kinds = [part.get("purl", part["type"]).partition("/")[0] for part in bill["components"]]
check(
    f"and {kinds.count('pkg:deb')} packages of Debian, the interpreter and the model",
    kinds.count("pkg:deb") > 50 and "pkg:generic" in kinds and "machine-learning-model" in kinds,
)
notice = Path("/app/NOTICE").read_text()
unnamed = [name for name in installed if name not in ("perturbscope", "onnxruntime-gpu") and f"\n{name} " not in notice]
check(f"NOTICE names every package{': not ' if unnamed else ''}{', '.join(unnamed)}", not unnamed)

start = time.perf_counter()
request = urllib.request.Request(
    f"{base_url}/v1/embed", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
)
with urllib.request.urlopen(request, timeout=60) as response:
    answer = json.load(response)
over_http = np.asarray(answer["embeddings"], dtype=np.float32)
check(
    f"HTTP embeds a cell: {over_http.shape[1]} values of {answer['meta']['model_id']} "
    f"in {1e3 * (time.perf_counter() - start):.0f} ms",
    over_http.shape[0] == 1 and bool(np.isfinite(over_http).all()) and bool(over_http.any()),
)
start = time.perf_counter()
with GrpcClient(f"127.0.0.1:{grpc_port}") as client:
    over_grpc = client.embed_cells(CountMatrix.from_matrix(counts[None, :], gene_ids)).values
check(
    f"gRPC gives the same cell the same vector in {1e3 * (time.perf_counter() - start):.0f} ms",
    np.allclose(over_http, over_grpc, rtol=0, atol=1e-6),
)

# The map of the cells comes from an optional library, in a process of its own.
screen = rng.poisson(0.3, size=(150, 500)).astype(np.int32)
screen[:, 0] += 1
rows, columns = np.nonzero(screen)
body = {
    "cells": {
        "gene_ids": gene_ids,
        "indptr": np.searchsorted(rows, np.arange(151)).tolist(),
        "indices": columns.tolist(),
        "data": screen[rows, columns].tolist(),
    },
    "perturbations": ["control"] * 90 + ["STAT1"] * 60,
    "control": "control",
}
start = time.perf_counter()
request = urllib.request.Request(
    f"{base_url}/v1/report", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
)
with urllib.request.urlopen(request, timeout=300) as response:
    page = response.read().decode()
check(f"the report has a map of the cells, in {time.perf_counter() - start:.0f} s", "UMAP, 15 neighbours" in page)
