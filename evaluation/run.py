"""Evaluation of several models over one screen: results are computed once, cached, and summed up in tables."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.models import Embedded, Model, embed
from evaluation.replication import ReplicationOptions, measure_replication
from evaluation.screens import EvaluationScreen
from evaluation.separation import (
    SeparationOptions,
    batch_agreement,
    contexts,
    detection,
    measure_separation,
    summarize,
)
from perturbscope.analysis.degs import deg_table
from perturbscope.analysis.umap import is_available, project
from perturbscope.cells.files import atomic_directory
from perturbscope.errors import PerturbScopeError
from perturbscope.scoring.calibration import CALIBRATION_PERMUTATIONS
from perturbscope.scoring.statistics import correlation, uniformity

Progress = Callable[[str, int, int], None]
RESULT_VERSION = 1
"""Version that is raised when results of the same embedding change, so that old ones are not used again."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of all measures.

    Parameters
    ----------
    separation, replication
        Options of the two groups of measures; None leaves the second out.
    relations
        Gene sets whose genes should resemble each other.
    umap_cells
        Most cells on a map; 0 for no maps.
    seed
        Seed of maps and differential genes.
    """

    separation: SeparationOptions = field(default_factory=SeparationOptions)
    replication: ReplicationOptions | None = field(default_factory=ReplicationOptions)
    relations: Mapping[str, Collection[str]] | None = None
    umap_cells: int = 1500
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON-able values."""
        relations = None if self.relations is None else {key: sorted(genes) for key, genes in self.relations.items()}
        return {**asdict(self), "relations": relations}


@dataclass(frozen=True)
class ModelResult:
    """Results of one model over one screen.

    Attributes
    ----------
    model
        Name of the model.
    tables
        Tables by name, without empty ones: ``scores``, ``pairs``, ``null``, ``batches`` and ``umap``, and those of
        :class:`evaluation.replication.Replication`.
    facts
        Record of the embedding, numbers of the replication, and seconds (JSON-able).
    warnings
        Sentences that a reader should know before trusting a number.
    """

    model: str
    tables: dict[str, pd.DataFrame]
    facts: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True)
class ScreenResult:
    """Results of several models over one screen.

    Attributes
    ----------
    screen
        Held-out cells of the screen.
    models
        Results in the order of the models, without those that failed.
    degs
        Numbers of differentially expressed genes: ``context, perturbation, n_cells, n_degs, n_tested``.
    failed
        Name of each model that failed -> the reason.
    provenance
        Provenance of the screen, with options and seed (JSON-able).
    """

    screen: EvaluationScreen
    models: list[ModelResult]
    degs: pd.DataFrame
    failed: dict[str, str]
    provenance: dict[str, Any]


def evaluate(
    screen: EvaluationScreen,
    models: Sequence[Model],
    *,
    options: RunOptions | None = None,
    cache: Path | None = None,
    progress: Callable[[str, str, int, int], None] | None = None,
    finished: Callable[[str, float, bool], None] | None = None,
) -> ScreenResult:
    """Embed and judge, model by model.

    Parameters
    ----------
    screen
        Screen with its labels. If it has a split, models are judged on its held-out cells.
    models
        Models with different names.
    cache
        Folder of embeddings and results, from which those of the same cells, labels, model and options are read.
    progress
        Called as ``progress(model, stage, done, total)``.
    finished
        Called as ``finished(model, seconds, from_cache)``.
    """
    options = options or RunOptions()
    held_out = screen[screen.held_out]
    results, failed = [], {}
    for model in models:
        start = time.monotonic()

        def report(stage: str, done: int, total: int, name: str = model.name) -> None:
            if progress:
                progress(name, stage, done, total)

        try:
            embedded = embed(model, screen, cache=cache, progress=report)
            path = None if cache is None else cache / _result_key(embedded, held_out, options)
            cached = path is not None and path.is_dir()
            if path is not None and cached:
                result = _read(path, model.name)
            else:
                result = _judge(model.name, embedded, held_out, options, report)
                if path is not None:
                    _write(path, result)
        except PerturbScopeError as error:
            failed[model.name] = error.message
            continue
        results.append(result)
        if finished:
            finished(model.name, time.monotonic() - start, cached)
    provenance = {**screen.provenance, "n_cells_scored": len(held_out), "options": options.to_dict()}
    return ScreenResult(held_out, results, _degs(held_out, options.seed), failed, provenance)


def overview(result: ScreenResult) -> pd.DataFrame:
    """Return the main table: one row a model with the most important numbers.

    Returns
    -------
    A table with ``model, width``; ``median z`` (size-matched E-distance), ``paper z``; ``detected`` and ``pretended``
    (:func:`evaluation.separation.detection`); ``null KS p``, ``null z`` and ``null sd`` (controls against controls by
    cell), ``batch z`` (mean z of controls of some batches against others); ``DEG rho`` (Spearman's, of z with the
    number of differential genes); ``batch r`` (mean Pearson correlation of z between batches); and the numbers of
    :class:`evaluation.replication.Replication`.
    """
    rows = []
    for model in result.models:
        scores, null = model.tables["scores"], model.tables.get("null", pd.DataFrame())
        z = {mode: scores[(scores["mode"] == mode) & (scores["metric"] == "e_distance")] for mode in _MODES}
        row: dict[str, Any] = {"model": model.model, "width": model.facts["embedding"].get("width")}
        row["median z"] = z["size_matched"]["z"].median()
        row["paper z"] = z["paper"]["z"].median()
        row |= {key: model.facts["detection"][key] for key in ("detected", "pretended")}
        for kind in ("cell", "batch"):
            part = null[(null["metric"] == "e_distance") & (null["kind"] == kind)] if len(null) else null
            row[f"null KS p ({kind})"] = uniformity(part["p"]).p if len(part) > 1 else float("nan")
            row[f"null z ({kind})"] = float(part["z"].mean()) if len(part) else float("nan")
        row["DEG rho"] = deg_correlation(model, result.degs).set_index("metric").loc["e_distance", "spearman"]
        batches = model.tables.get("batches", pd.DataFrame())
        row["batch r"] = batch_agreement(batches)["pearson"].mean() if len(batches) else float("nan")
        rows.append({**row, **model.facts["replication"]})
    return pd.DataFrame(rows)


_MODES = ("size_matched", "paper")


def separation_table(result: ScreenResult) -> pd.DataFrame:
    """Return the paper's table: one row a model, comparison (control or pairs), mode and metric."""
    rows = []
    for model in result.models:
        for name, table in (("control", "scores"), ("pairs", "pairs")):
            if len(model.tables.get(table, ())):
                summary = summarize(model.tables[table])
                summary.insert(0, "against", name)
                summary.insert(0, "model", model.model)
                rows.append(summary)
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def by_target(result: ScreenResult, *, metric: str = "e_distance", mode: str = "size_matched") -> pd.DataFrame:
    """Return z by perturbation (and context) and model, with numbers of cells and DEGs; sorted by the last model."""
    table = result.degs[["context", "perturbation", "n_cells", "n_degs"]]
    for model in result.models:
        scores = model.tables["scores"]
        rows = scores[(scores["mode"] == mode) & (scores["metric"] == metric)]
        column = rows[["context", "perturbation", "z"]].rename(columns={"z": model.model})
        table = table.merge(column, on=["context", "perturbation"], how="left")
    if result.models:
        table = table.sort_values(result.models[-1].model, ascending=False, ignore_index=True)
    return table.drop(columns="context") if (table["context"] == "").all() else table


def deg_correlation(model: ModelResult, degs: pd.DataFrame) -> pd.DataFrame:
    """Correlate z with the number of differential genes, by metric: ``metric, n, pearson, spearman``."""
    scores = model.tables["scores"]
    joined = scores[scores["mode"] == "size_matched"].merge(degs, on=["context", "perturbation"], suffixes=("", "_deg"))
    rows = []
    for metric, part in joined.groupby("metric", sort=False):
        result = correlation(part["z"].to_numpy(), part["n_degs"].to_numpy())
        rows.append({"metric": metric, "n": result.n, "pearson": result.pearson, "spearman": result.spearman})
    return pd.DataFrame(rows, columns=["metric", "n", "pearson", "spearman"])


def _judge(
    name: str, embedded: Embedded, screen: EvaluationScreen, options: RunOptions, progress: Progress
) -> ModelResult:
    start = time.process_time()
    separation = measure_separation(embedded.values, screen, options=options.separation, progress=progress)
    tables = {
        "scores": separation.scores,
        "pairs": separation.pairs,
        "null": separation.null,
        "batches": separation.batches,
    }
    warnings = [*embedded.warnings, *separation.warnings]
    numbers: dict[str, float] = {}
    if options.replication is not None:
        replication = measure_replication(
            embedded.values, screen, relations=options.relations, options=options.replication, progress=progress
        )
        tables |= replication.tables
        numbers = replication.numbers
        warnings += replication.warnings
    if options.umap_cells and is_available():
        labels = screen.perturbations
        if screen.contexts is not None:
            labels = [f"{label} in {context}" for label, context in zip(labels, screen.contexts, strict=True)]
        progress("umap", 0, 1)
        projection = project(embedded.values, labels, max_cells=options.umap_cells, seed=options.seed)
        tables["umap"] = projection.to_frame()
        progress("umap", 1, 1)
    facts = {
        "embedding": embedded.facts,
        "detection": detection(separation),
        "replication": numbers,
        "cpu_seconds": round(time.process_time() - start, 1),
        "calibration_permutations": CALIBRATION_PERMUTATIONS,
    }
    tables = {key: table for key, table in tables.items() if len(table)}
    return ModelResult(name, tables, facts, list(dict.fromkeys(warnings)))


def _degs(screen: EvaluationScreen, seed: int) -> pd.DataFrame:
    tables = []
    for name, part in contexts(screen):
        subset = screen[part]
        table = deg_table(subset.cells, subset.perturbations, control=subset.control, targets=screen.targets, seed=seed)
        tables.append(table.assign(context=name))
    return pd.concat(tables, ignore_index=True)


def _result_key(embedded: Embedded, screen: EvaluationScreen, options: RunOptions) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(embedded.values).tobytes())
    labels = [screen.perturbations, screen.control, screen.batches, screen.guides, screen.contexts]
    digest.update(json.dumps([RESULT_VERSION, labels, options.to_dict()], sort_keys=True).encode())
    return f"result-{digest.hexdigest()[:20]}"


def _write(path: Path, result: ModelResult) -> None:
    """Write the tables into a folder that is complete or absent."""
    with atomic_directory(path) as staging:
        for name, table in result.tables.items():
            table.to_parquet(staging / f"{name}.parquet", index=False)
        text = json.dumps({"facts": result.facts, "warnings": result.warnings})
        (staging / "facts.json").write_text(text, encoding="utf-8")


def _read(path: Path, name: str) -> ModelResult:
    record = json.loads((path / "facts.json").read_text(encoding="utf-8"))
    tables = {file.stem: pd.read_parquet(file) for file in sorted(path.glob("*.parquet"))}
    return ModelResult(name, tables, record["facts"], record["warnings"])
