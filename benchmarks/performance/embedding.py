"""Embedding on the CPU: beside transformers as Geneformer's extractor runs it, and the machine's own ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding_floor import floors, where_time_goes
from benchmarks.performance.embedding_models import FILES, Weights, default_weights, paper_weights
from benchmarks.performance.embedding_routes import Job, Route, extractor, ours
from benchmarks.performance.embedding_whole import small_variant, streaming, whole
from benchmarks.performance.harness import Options, Section, race, table

OURS, SORTED, FILE_ORDER = "PerturbScope", "transformers, as Geneformer's extractor", "transformers, order of the file"


def run(options: Options) -> Section:
    """The whole part."""
    default = default_weights()
    text: list[str] = []
    numbers: dict[str, Any] = {}
    jobs = [Job(weights=default, source="mix", n_cells=60 if options.quick else 600)]
    if not options.quick:
        jobs += [Job(weights=default, source=name, n_cells=200) for name in FILES]
        jobs += [Job(weights=paper_weights(), source="mix", n_cells=180)]
    rows = []
    for job in jobs:
        turns = options.repeats if job.weights is default else max(2, options.repeats - 3)
        found = compare(job, turns)
        numbers[f"{job.weights.title}: {job.source}"] = found
        rows += [
            (f"{job.weights.title}: {job.source}, {job.n_cells}", name, *columns(values, found[OURS]["cells_per_s"]))
            for name, values in found.items()
        ]
    text.append(
        table(
            ("model: cells", "route", "cells/s", "PerturbScope is", "padding", "MiB added", "largest difference"), rows
        )
    )
    models: list[Weights] = [default] if options.quick else [default, jobs[-1].weights]
    for part in (floors, where_time_goes, small_variant):
        markdown, numbers[part.__name__] = part(models, options)
        text.append(markdown)
    for alone in (whole, streaming):
        markdown, numbers[alone.__name__] = alone(default, options)
        text.append(markdown)
    return Section("\n".join(text), numbers)


def compare(job: Job, turns: int) -> dict[str, dict[str, float]]:
    """All routes on the same cells, in turns."""
    routes = {
        OURS: Route(ours, job),
        SORTED: Route(extractor, job),
        FILE_ORDER: Route(extractor, job, by_length=False),
    }
    seconds = race({name: route.run for name, route in routes.items()}, turns)
    results = {name: route.close() for name, route in routes.items()}
    reference = results[SORTED][0]
    return {
        name: {
            "cells_per_s": job.n_cells / seconds[name].median,
            "spread": seconds[name].spread,
            "padding": routes[name].padding,
            "mib": results[name][1],
            "difference": largest(results[name][0], reference),
        }
        for name in routes
    }


def columns(values: Mapping[str, float], our_rate: float) -> tuple[str, ...]:
    """Cells of one row of the table."""
    return (
        f"{values['cells_per_s']:,.1f}",
        f"{our_rate / values['cells_per_s']:.2f} x",
        f"{values['padding']:.1%}",
        f"{values['mib']:,.0f}",
        f"{values['difference']:.1e}",
    )


def largest(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Largest absolute difference of two sets of vectors."""
    return float(np.abs(found - wanted).max())
