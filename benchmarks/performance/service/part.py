"""The service as a process of its own, its callers as another: throughput, latency against load, overhead, peers.

The service is ``python -m serving`` with its defaults (all cores, the default bundle). Callers send requests that were
encoded before the clock started. Both share the machine's cores, so what the callers' process takes is measured and
stated: the ceiling for a service beside them is the raw one less their share of the processors.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.harness import ROOT, Options, Section, table
from benchmarks.performance.service import policies
from benchmarks.performance.service.inputs import (
    STREAMS,
    UNARY,
    Ask,
    Job,
    Outcome,
    Plan,
    Way,
    embedder,
    mix,
    right,
    tokens_of,
)
from benchmarks.performance.service.latency import curve, idle, job
from benchmarks.performance.service.load import CALLERS, Callers
from perturbscope.threads import usable_cores
from serving.settings import DEFAULT_BUNDLE
from tests.integration.server import RunningServer, environment
from tests.ports import free_ports

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20


def run(options: Options) -> Section:
    """Run the whole part."""
    plan = (
        Plan(1, 2.0, 2.0, 10, quick=True)
        if options.quick
        else Plan(min(options.repeats, 3), 7.0, 10.0, 40, quick=False)
    )
    asks = mix(quick=plan.quick)
    texts: list[str] = []
    numbers: dict[str, Any] = {}
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as name, Callers() as callers:
        started = time.perf_counter()
        with RunningServer(Path(name), threads=0) as server:
            ready = time.perf_counter() - started
            rest = server.usage().rss / MIB
            with bento(Path(name)) as plain:
                text, numbers["saturation"] = saturation(plan, server, callers, asks, plain)
            texts.append(text)
            text, numbers["policies"] = by_policy(plan, asks)
            texts.append(text)
            text, numbers["curve"], figures["service-latency"] = curve(plan, server, callers)
            texts.append(text)
            text, numbers["idle"] = idle(plan, server, callers)
            texts.append(text)
            numbers["resources"] = {"ready_s": ready, "rss_mib": rest, "rss_after_mib": server.usage().rss / MIB}
            texts.append(
                f"From start to ready in {ready:.1f} s (checks in the starting process, then BentoML's supervisor and "
                f"its worker, which loads the model and proves it by its golden vectors). Memory at rest {rest:.0f} "
                f"MiB, and {server.usage().rss / MIB:.0f} MiB after all of the above, over both processes. The size of "
                "the image is printed by `make image-test`.\n"
            )
    return Section("\n".join(texts), numbers, figures)


def saturation(
    plan: Plan, server: RunningServer, callers: Callers, asks: list[Ask], plain: str
) -> tuple[str, dict[str, Any]]:
    """Embed one set of cells by every way, in turns."""
    n_cells = sum(len(ask.rows) for ask in asks)
    cores = usable_cores()
    ways: list[Way] = [*UNARY, *STREAMS, "BentoML batchable"]
    raw: dict[str, list[float]] = {"session": [], "embedder": []}
    found: dict[Way, list[tuple[Outcome, float]]] = {way: [] for way in ways}
    tokens = tokens_of(asks)
    for turn in range(plan.turns + 1):
        begun = time.perf_counter()
        embedder().embed_tokens(tokens)
        between = time.perf_counter()
        embedder().embed_tokens(tokens_of(asks))
        ended = time.perf_counter()
        if not turn:
            # What is made on demand, on either side, is there when turns begin to count.
            for way in ways:
                callers.do(_sent(way, server, plain, asks[:CALLERS] if not plan.quick else asks))
            continue
        raw["session"].append(between - begun)
        raw["embedder"].append(ended - between)
        for way in ways:
            before = server.usage().cpu
            outcome = callers.do(_sent(way, server, plain, asks))
            found[way].append((outcome, server.usage().cpu - before))
    ceiling = n_cells / statistics.median(raw["session"])
    numbers: dict[str, Any] = {
        "cells": n_cells,
        "requests": len(asks),
        "raw_session": ceiling,
        "raw_embedder": n_cells / statistics.median(raw["embedder"]),
    }
    rows = [
        ["**raw: session, tokens made before**", f"**{ceiling:.1f}**", "100%", "", "", "", "", "", ""],
        [
            "raw: Embedder, with tokenizing",
            f"{numbers['raw_embedder']:.1f}",
            f"{numbers['raw_embedder'] / ceiling:.0%}",
            *[""] * 6,
        ],
    ]
    for way, outcomes in found.items():
        wall = statistics.median(outcome.wall for outcome, _ in outcomes)
        client = statistics.median(outcome.cpu for outcome, _ in outcomes)
        service = statistics.median(cpu for _, cpu in outcomes)
        speed = n_cells / wall
        # Turn by turn, so that what slows the machine down in one slows both.
        share = statistics.median(
            alone / outcome.wall for alone, (outcome, _) in zip(raw["session"], outcomes, strict=True)
        )
        beside = share / (1 - client / (cores * wall))
        ones = [s for outcome, _ in outcomes for s, n in zip(outcome.latency, outcome.sizes, strict=True) if n == 1]
        difference = largest_difference(asks, outcomes[-1][0].vectors)
        numbers[way] = {
            "cells_per_second": speed,
            "share": share,
            "share_beside_callers": beside,
            "client_cpu_ms_per_cell": 1000 * client / n_cells,
            "service_cpu_ms_per_cell": 1000 * service / n_cells,
            "p50_one_cell": float(np.median(ones)) if ones else None,
            "p99_one_cell": float(np.quantile(ones, 0.99)) if ones else None,
            "difference": difference,
        }
        rows.append(
            [
                way,
                f"{speed:.1f}",
                f"{share:.0%}",
                f"{beside:.0%}",
                f"{1000 * client / n_cells:.2f}",
                f"{1000 * service / n_cells:.1f}" if way != "BentoML batchable" else "",
                f"{1000 * np.median(ones):,.0f}" if ones else "",
                f"{1000 * np.quantile(ones, 0.99):,.0f}" if ones else "",
                f"{difference:.0e}",
            ]
        )
    lengths = tokens.lengths
    text = (
        f"### At saturation\n\n{len(asks)} requests of 1 to {max(len(ask.rows) for ask in asks)} cells, {n_cells:,} in "
        f"all, from three real data sets (whole transcriptomes and a panel; {lengths.min()} to {lengths.max()} tokens, "
        f"mean {lengths.mean():.0f}), {CALLERS} in progress; streams: one a data set, requests as chunks. Timed until "
        "all are answered, median of the turns; shares are those within a turn. *Beside the callers*: of the ceiling "
        "less the share of the cores that the callers' process took. The BentoML endpoint is the bundle's graph as "
        f"its file has it, `batchable`, with tokens padded to the model's {embedder().family.max_length} by its "
        "caller, who makes them before the clock starts.\n\n"
    ) + table(
        [
            "Way",
            "Cells/s",
            "Of raw",
            "Of raw beside the callers",
            "Callers' CPU, ms a cell",
            "Service's CPU, ms a cell",
            "1-cell p50, ms",
            "1-cell p99, ms",
            "Largest difference",
        ],
        rows,
    )
    return text, numbers


def _sent(way: Way, server: RunningServer, plain: str, asks: list[Ask]) -> Job:
    found = job(way, server, asks)
    return replace(found, address=plain) if way == "BentoML batchable" else found


def largest_difference(asks: list[Ask], vectors: list[NDArray[np.float32]]) -> float:
    """Return the largest difference of a value from the library's."""
    expected = right(tuple(asks))
    assert sum(map(len, vectors)) == len(expected)
    return float(np.abs(np.concatenate(vectors) - expected).max())


def by_policy(plan: Plan, asks: list[Ask]) -> tuple[str, dict[str, Any]]:
    """Compare two rules for making batches over the same encoder, without a service."""
    tokens = [embedder().tokenize(ask.cells()) for ask in asks]
    budget = embedder().limits.max_tokens
    makers: dict[str, Callable[[], policies.ByArrival | policies.ByLength]] = {
        "PerturbScope: by length, fair to callers": policies.ByLength,
        f"by arrival, {policies.MAX_BATCH_TOKENS:,} tokens": policies.ByArrival,
        f"by arrival, {budget:,} tokens": lambda: policies.ByArrival(budget),
    }
    tried: dict[str, list[policies.Tried]] = {name: [] for name in makers}
    for _ in range(plan.turns):
        for name, make in makers.items():
            tried[name].append(policies.drain(make(), asks, tokens, CALLERS))
    rows, numbers = [], {}
    for name, turns in tried.items():
        speed = sum(map(len, tokens)) / statistics.median(turn.wall for turn in turns)
        ones = [s for turn in turns for s, n in zip(turn.latency, turn.sizes, strict=True) if n == 1]
        slots = turns[-1].slots
        numbers[name] = {
            "cells_per_second": speed,
            "padding": slots.padding,
            "p50_one_cell": float(np.median(ones)),
            "p99_one_cell": float(np.quantile(ones, 0.99)),
            "longest_batch": slots.longest,
        }
        rows.append(
            [
                name,
                f"{speed:.1f}",
                f"{slots.padding:.1%}",
                f"{slots.batches}",
                f"{1000 * slots.longest:.0f}",
                f"{1000 * np.median(ones):,.0f}",
                f"{1000 * np.quantile(ones, 0.99):,.0f}",
                f"{largest_difference(asks, turns[-1].vectors):.0e}",
            ]
        )
    text = (
        "### Which cells make a batch\n\nThe same requests and callers over the same session in one process, without a "
        "transport: text-embeddings-inference's published rule (entries in the order of their arrival until longest x "
        "entries would pass the budget) and PerturbScope's dispatcher.\n\n"
    ) + table(
        [
            "Batches",
            "Cells/s",
            "Padding",
            "Batches",
            "Longest batch, ms",
            "1-cell p50, ms",
            "1-cell p99, ms",
            "Largest difference",
        ],
        rows,
    )
    return text, numbers


@contextlib.contextmanager
def bento(folder: Path) -> Iterator[str]:
    """Start the plain BentoML endpoint, wait until it is ready, and yield its address."""
    (port,) = free_ports(1)
    (spec,) = embedder().family.inputs
    variables = {
        "PLAIN_GRAPH": str(DEFAULT_BUNDLE / "model.onnx"),
        "PLAIN_THREADS": str(usable_cores()),
        "PLAIN_PAD": str(int(spec.pad_value)),
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(folder / "bentoml"),
    }
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.performance.service.bento:Plain"]
    with (folder / "bento.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--working-dir", str(ROOT)],
            env={**environment(), **variables},
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, port, folder / "bento.log")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import httpx

    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"BentoML did not start:\n{log.read_text()}")
