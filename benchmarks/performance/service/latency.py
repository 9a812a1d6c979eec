"""Latency of the service: against load, and for one caller alone."""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.performance.harness import table
from benchmarks.performance.service.inputs import FILES, UNARY, Ask, Job, Plan, Way, embedder, pool, uniform
from benchmarks.performance.service.load import CALLERS, Callers
from tests.integration.server import RunningServer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOADS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)


def job(way: Way, server: RunningServer, asks: list[Ask], **more: Any) -> Job:
    """Make a job for the service, by default in a closed loop of :data:`CALLERS`."""
    address = server.target if way.startswith("gRPC") else f"127.0.0.1:{server.http_port}"
    return Job(way=way, address=address, asks=asks, **{"callers": CALLERS, **more})


def curve(plan: Plan, server: RunningServer, callers: Callers) -> tuple[str, list[dict[str, Any]], Figure]:
    """Measure latency against load, with requests at random times."""
    classes = {
        "1 cell": (uniform(1, 90), plan.small_seconds, "all three data sets"),
        "64 cells": (uniform(64, 40, ("papalexi",)), plan.large_seconds, "the panel, 24 to 142 tokens"),
    }
    rows, numbers = [], []
    for name, (asks, seconds, what) in classes.items():
        closed = callers.do(job("gRPC", server, asks * 3 if name == "1 cell" and not plan.quick else asks))
        most = len(closed.latency) / closed.wall
        for load in LOADS if not plan.quick else (0.5,):
            for way in ("HTTP Arrow", "gRPC") if name == "1 cell" else ("gRPC",):
                asked = job(way, server, asks, callers=0, rate=load * most, seconds=seconds)
                outcome = callers.do(asked)
                p50, p99 = np.quantile(outcome.latency, (0.5, 0.99))
                done = len(outcome.latency) / outcome.wall
                numbers.append(
                    {
                        "class": name,
                        "way": way,
                        "load": load,
                        "asked": load * most,
                        "done": done,
                        "n": len(outcome.latency),
                        "p50": float(p50),
                        "p99": float(p99),
                    }
                )
                rows.append(
                    [
                        f"{name} ({what})",
                        way,
                        f"{load:.0%}",
                        f"{load * most:.1f}",
                        f"{done:.1f}",
                        len(outcome.latency),
                        f"{1000 * p50:,.0f}",
                        f"{1000 * p99:,.0f}",
                    ]
                )
    text = (
        "### Latency against load\n\nRequests at random times (Poisson), whatever was answered before; latency from "
        f"when a request was due. 100 % is what {CALLERS} callers in a closed loop got over gRPC just before. The 99th "
        "percentile of fewer than 100 requests is their slowest, nearly.\n\n"
    ) + table(["Requests", "Way", "Load", "Asked/s", "Answered/s", "Requests", "p50, ms", "p99, ms"], rows)
    return text, numbers, _figure(numbers)


def _figure(numbers: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure as Made

    figure = Made(figsize=(8, 3.6))
    axes = figure.subplots(1, 2)
    for at, name in enumerate(("1 cell", "64 cells")):
        for way, colour in (("HTTP Arrow", "C0"), ("gRPC", "C1")):
            points = [point for point in numbers if point["class"] == name and point["way"] == way]
            for quantile, style in (("p50", "-o"), ("p99", "--^")):
                if points:
                    x = [point["asked"] for point in points]
                    y = [1000 * point[quantile] for point in points]
                    axes[at].plot(x, y, style, color=colour, markersize=4, label=f"{way}, {quantile}")
        axes[at].set(title=f"{name} a request", xlabel="requests/s asked", ylabel="ms", yscale="log")
        axes[at].grid(alpha=0.3)
        axes[at].legend(fontsize=7)
    figure.tight_layout()
    return figure


def idle(plan: Plan, server: RunningServer, callers: Callers) -> tuple[str, dict[str, Any]]:
    """Measure the overhead of a request for one cell, with one caller."""
    rows, numbers = [], {}
    for source in FILES:
        asks = uniform(1, plan.idle, (source,))
        for way in UNARY:
            alone, latency, stages = [], [], []
            # In turns of ten, so that what slows the machine down slows both.
            for start in range(0, len(asks), 10):
                some = asks[start : start + 10]
                alone += [_alone(ask) for ask in some]
                before = len(server.log)
                latency += callers.do(job(way, server, some, callers=1, pause=0.01)).latency
                stages += _stages(server.log[before:], len(some))
            middle = {name: statistics.median(found.get(name, 0.0) for found in stages) for name in stages[0]}
            raw, seen = statistics.median(alone), statistics.median(latency)
            own = statistics.median(with_it - without for with_it, without in zip(latency, alone, strict=True))
            model = [found["tokenize"] + found["inference"] for found in stages]
            around = statistics.median(seen - inside for seen, inside in zip(latency, model, strict=True))
            numbers[f"{source}, {way}"] = {"raw": raw, "latency": seen, "overhead": own, "around": around, **middle}
            rows.append(
                [
                    f"{source}, {pool(source).n_genes:,} genes",
                    way,
                    f"{1000 * raw:.1f}",
                    f"{1000 * seen:.1f}",
                    f"**{1000 * own:.1f}**",
                    f"{1000 * around:.2f}",
                    *(
                        f"{1000 * middle.get(name, 0.0):.2f}"
                        for name in ("receive", "decode", "tokenize", "queue", "inference", "encode", "rest")
                    ),
                    f"{1000 * (seen - middle['total']):.2f}",
                ]
            )
    text = (
        "### One cell, nobody else\n\nMedian of "
        f"{plan.idle} requests one after the other. *Raw*: tokenizing and forward pass of the same cell in a process "
        "of its own; *overhead*: the median of what each request took more; *around the model*: latency less the "
        "service's own time for tokenizing and forward pass. Then the stages as the service logs them; *rest* is what "
        "no stage has, and *outside* what the callers see beyond the service's log: sockets, HTTP or "
        "gRPC, the event loop of the callers. Every request names all genes of its file, whatever its cell "
        "expresses.\n\n"
    ) + table(
        [
            "Cells",
            "Way",
            "Raw, ms",
            "Latency, ms",
            "Overhead, ms",
            "Around the model, ms",
            "receive",
            "decode",
            "tokenize",
            "queue",
            "inference",
            "encode",
            "rest",
            "outside",
        ],
        rows,
    )
    return text, numbers


def _alone(ask: Ask) -> float:
    cells = ask.cells()
    started = time.perf_counter()
    embedder().embed_tokens(embedder().tokenize(cells))
    return time.perf_counter() - started


def _stages(log: str, n: int) -> list[dict[str, float]]:
    """Return seconds by stage of the last `n` requests of the log."""
    lines = [json.loads(line) for line in log.splitlines() if '"event": "request"' in line]
    found = []
    for line in [line for line in lines if line["cells"]][-n:]:
        stages = {name: float(seconds) for name, seconds in line["stages"].items()}
        found.append({**stages, "rest": line["seconds"] - sum(stages.values()), "total": line["seconds"]})
    return found
