"""Memory of the server and of the client while cells stream between them, against one large request.

    python -m benchmarks.streaming [--cells 20000 80000] [--repeats 3]

Real cells (data/kang2018_ifnb_pbmc.h5ad, repeated) go to a server with a bundle so small that what is measured is the
transport: a mean of token vectors of width 8, spread to the 512 of the default bundle. Each run has a fresh server and
a fresh client process. Memory is the rise of the peak resident size (VmHWM) over that before the run, at the server
summed over its processes. Medians over the repeats go to stdout as a table.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import open_cells
from perturbscope.client import ChunkLimits, Client, GrpcClient
from perturbscope.inference.bundle import Bundle
from perturbscope.protocol import ARROW
from perturbscope.protocol.arrow_streams import stream_answers_from_arrow, stream_request_to_arrow
from perturbscope.protocol.streams import StreamChunk, StreamStart
from tests import bundles
from tests.integration.server import RunningServer

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "data" / "kang2018_ifnb_pbmc.h5ad"
CHUNK = 256
WIDTH = 512
WAYS = {
    "grpc-stream": "gRPC, EmbedStream (`GrpcClient.embed_stream`)",
    "http-stream": "HTTP, `POST /v1/embed/stream`",
    "http-chunks": "HTTP, a request a chunk (`Client.embed_stream`)",
    "grpc-one": "gRPC, one request",
    "http-one": "HTTP, one request",
}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 80_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--largest-request", type=int, default=20_000, help="most cells that go in one request")
    parser.add_argument("--client", nargs=3, metavar=("WAY", "ADDRESS", "CELLS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        way, address, n_cells = given.client
        print(json.dumps(run_client(way, address, int(n_cells))))
        return
    runs = [
        (way, n_cells)
        for n_cells in given.cells
        for way in WAYS
        if not (way.endswith("one") and n_cells > given.largest_request)
    ]
    found: dict[tuple[str, int], list[dict[str, float]]] = {run: [] for run in runs}
    for _ in range(given.repeats):
        for way, n_cells in runs:
            found[way, n_cells].append(measure(way, n_cells))
            print(f"{way} {n_cells}: {found[way, n_cells][-1]}", file=sys.stderr)
    print("| Way | Cells | Seconds | Sent, MiB | Server, MiB | Client, MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    for (way, n_cells), results in found.items():
        middle = {name: statistics.median(result[name] for result in results) for name in results[0]}
        print(
            f"| {WAYS[way]} | {n_cells:,} | {middle['seconds']:.1f} | {middle['sent']:.0f} | "
            f"+{middle['server']:.0f} | +{middle['client']:.0f} |"
        )


def measure(way: str, n_cells: int) -> dict[str, float]:
    """One client process against a fresh server that has seen one small request."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = write_bundle(folder / "bundle")
        limits = {
            "max_body_bytes": 2**31 - 2**20,
            "max_held_bytes": 2**32,
            "max_cells": 10**6,
            "max_queued_tokens": 10**9,
        }
        with RunningServer(folder, bundle=bundle, **limits) as server:
            address = server.url if way.startswith("http") else server.target
            command = [sys.executable, "-m", "benchmarks.streaming", "--client", way, address]
            subprocess.run([*command, str(CHUNK)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            pids = family_of(server.process.pid)
            before = peak(pids, reset=True)
            done = subprocess.run([*command, str(n_cells)], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            result: dict[str, float] = json.loads(done.stdout)
            result["server"] = (peak(pids) - before) / MIB
            return result


def write_bundle(path: Path) -> Path:
    """A bundle that costs next to nothing, and whose answers are as large as those of the default one."""
    files = bundles.tiny_files()
    model = onnx.load_from_string(bytes(files["model.onnx"]))  # type: ignore[arg-type]
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["mean" if name == "cell_embedding" else name for name in node.output]
    graph.node.append(onnx.helper.make_node("MatMul", ["mean", "spread"], ["cell_embedding"]))
    spread = np.random.default_rng(1).standard_normal((bundles.TINY_WIDTH, WIDTH)).astype(np.float32)
    graph.initializer.append(onnx.numpy_helper.from_array(spread, "spread"))
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = WIDTH
    manifest = bundles.tiny_manifest(width=WIDTH)
    return Bundle.write(path, manifest, {**files, "model.onnx": model.SerializeToString()}).path


def family_of(pid: int) -> list[int]:
    """A process and all that it started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def peak(pids: list[int], *, reset: bool = False) -> int:
    """Sum of the peak resident bytes of processes; or, with `reset`, of those of now, where peaks begin anew."""
    total = 0
    for pid in pids:
        entry = Path("/proc") / str(pid)
        if reset:
            (entry / "clear_refs").write_text("5")
        total += 1024 * int((entry / "status").read_text().partition("VmHWM:")[2].split()[0])
    return total


def chunks_of(cells: CountMatrix, n_cells: int) -> Iterator[CountMatrix]:
    """So many cells, from the beginning again and again."""
    for start in range(0, n_cells, CHUNK):
        yield cells[np.arange(start, min(start + CHUNK, n_cells)) % len(cells)]


def run_client(way: str, address: str, n_cells: int) -> dict[str, float]:
    """Embed the cells; results are thrown away as they come."""
    with open_cells(FILE) as source:
        cells = source.read()
    sent = 0

    def chunks() -> Iterator[CountMatrix]:
        nonlocal sent
        for part in chunks_of(cells, n_cells):
            sent += 8 * int(part.counts.nnz) + 16 * len(part)
            yield part

    before, started = peak([os.getpid()], reset=True), time.perf_counter()
    limits = ChunkLimits(cells=CHUNK)
    if way == "http-stream":
        done = duplex(address, cells, chunks())
    elif way.endswith("one"):
        rows = np.arange(n_cells) % len(cells)
        whole = cells[rows]
        sent = 8 * int(whole.counts.nnz) + 16 * n_cells
        limits = ChunkLimits(cells=n_cells, values=10**10, at_a_time=1)
        with connect(way, address, limits) as client:
            done = len(client.embed_cells(whole))
    else:
        with connect(way, address, limits) as client:
            done = sum(len(found) for found in client.embed_stream(chunks()))
    assert done == n_cells, f"{done} of {n_cells} cells"
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "sent": sent / MIB, "client": (peak([os.getpid()]) - before) / MIB}


def connect(way: str, address: str, limits: ChunkLimits) -> Client | GrpcClient:
    if way.startswith("http"):
        return Client(address, chunks=limits)
    return GrpcClient(address, chunks=limits)


def duplex(address: str, cells: CountMatrix, chunks: Iterator[CountMatrix]) -> int:
    """Send on one thread, read on this one."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=600)
    connection.putrequest("POST", "/v1/embed/stream")
    connection.putheader("content-type", ARROW)
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()

    def send() -> None:
        for piece in stream_request_to_arrow(StreamStart(gene_ids=cells.gene_ids), chunks):
            connection.send(b"%x\r\n" % len(piece) + piece + b"\r\n")
        connection.send(b"0\r\n\r\n")

    sender = threading.Thread(target=send)
    sender.start()
    with contextlib.closing(connection), connection.getresponse() as response:
        answers = stream_answers_from_arrow(response)
        done = sum(len(answer.embeddings) for answer in answers if isinstance(answer, StreamChunk))
    sender.join()
    return done


if __name__ == "__main__":
    main()
