"""Embedding on the CPU, beside transformers as Geneformer's extractor runs it and beside the machine's ceiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding.floor import floors, where_time_goes
from benchmarks.performance.embedding.models import FILES, Weights, default_weights, paper_weights
from benchmarks.performance.embedding.routes import Job, Ready, Route, extractor, ours
from benchmarks.performance.embedding.whole import small_variant, streaming, whole
from benchmarks.performance.harness import Options, Section, race, table

Loader = tuple[Callable[..., Ready], dict[str, Any]]
"""Function that makes a route, and its options."""
OURS = "PerturbScope"
SORTED, FILE_ORDER = "BertModel, longest cells first", "BertModel, order of the file"
EXTRACTOR, HELICAL = "BertForMaskedLM, longest first", "BertForMaskedLM, batches of 24, order of the file"
HEADLESS: dict[str, Loader] = {
    OURS: (ours, {}),
    SORTED: (extractor, {}),
    FILE_ORDER: (extractor, {"by_length": False}),
}
"""PerturbScope and transformers without a head; transformers runs all blocks."""
PUBLISHED: dict[str, Loader] = {
    OURS: (ours, {}),
    EXTRACTOR: (extractor, {"head": True}),
    HELICAL: (extractor, {"head": True, "by_length": False, "batch": 24}),
}
"""PerturbScope beside what Geneformer's extractor and helical run: a pre-trained model with its vocabulary head."""


def run(options: Options) -> Section:
    """Run the whole part."""
    default = default_weights()
    text: list[str] = []
    numbers: dict[str, Any] = {}
    jobs = [(Job(weights=default, source="mix", n_cells=60 if options.quick else 300), HEADLESS)]
    models: list[Weights] = [default]
    if not options.quick:
        models.append(paper_weights())
        jobs += [(Job(weights=default, source=name, n_cells=200), HEADLESS) for name in FILES]
        jobs += [(Job(weights=models[1], source="mix", n_cells=120), HEADLESS)]
        jobs += [(Job(weights=default, source="mix", n_cells=150), PUBLISHED)]
    rows = []
    for job, routes in jobs:
        slow = job.weights is not default or routes is PUBLISHED
        found = compare(job, routes, max(2, options.repeats - (3 if slow else 1)))
        numbers[f"{job.weights.title}: {job.source}, {job.n_cells}"] = found
        rows += [
            (f"{job.weights.title}: {job.source}, {job.n_cells}", name, *columns(values, found[OURS]["cells_per_s"]))
            for name, values in found.items()
        ]
    head = ("model: cells", "route", "cells/s", "PerturbScope is", "padding", "MiB added", "largest difference")
    text.append(table(head, rows))
    for part in (floors, where_time_goes, small_variant):
        markdown, numbers[part.__name__] = part(models, options)
        text.append(markdown)
    for alone in (whole, streaming):
        markdown, numbers[alone.__name__] = alone(default, options)
        text.append(markdown)
    return Section("\n".join(text), numbers)


def compare(job: Job, routes: Mapping[str, Loader], turns: int) -> dict[str, dict[str, float]]:
    """Run all routes on the same cells, in turns; differences are those to the second route."""
    running = {name: Route(make, job, **how) for name, (make, how) in routes.items()}
    seconds = race({name: route.run for name, route in running.items()}, turns)
    results = {name: route.close() for name, route in running.items()}
    reference = results[list(routes)[1]][0]
    return {
        name: {
            "cells_per_s": job.n_cells / seconds[name].median,
            "spread": seconds[name].spread,
            "padding": running[name].padding,
            "mib": results[name][1],
            "difference": largest(results[name][0], reference),
        }
        for name in routes
    }


def columns(values: Mapping[str, float], our_rate: float) -> tuple[str, ...]:
    """Return the last columns of one row of the table."""
    return (
        f"{values['cells_per_s']:,.1f}",
        f"{our_rate / values['cells_per_s']:.2f} x",
        f"{values['padding']:.1%}",
        f"{values['mib']:,.0f}",
        f"{values['difference']:.1e}",
    )


def largest(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return the largest absolute difference of two sets of vectors."""
    return float(np.abs(found - wanted).max())
