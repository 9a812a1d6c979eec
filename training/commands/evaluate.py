"""``python -m training evaluate CHECKPOINT CELLS.h5ad...``: score a checkpoint on cells it was not trained on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from perturbscope.cells.files import check_output, write_json
from perturbscope.errors import VocabularyMismatchError
from training import console
from training.checkpoint import load_checkpoint
from training.data.shards import Corpus
from training.measure.masked_accuracy import Tallies, corpus_frequencies, evaluate
from training.measure.unseen import EvaluateOptions, Heldout, read_heldout, trained_on


def _results(found: dict[str, Tallies], heldout: Heldout) -> Iterator[dict[str, Any]]:
    for name, tallies in found.items():
        yield {"file": heldout.name, "cells": len(heldout.tokens), "predictor": name, **tallies.summary()}


def _show(results: list[dict[str, Any]]) -> Table:
    """Return a table of the columns that are read most."""
    columns = {f"macro_hits@{k}": f"macro @{k}" for k in (1, 10, 100)}
    columns |= {f"micro_hits@{k}": f"micro @{k}" for k in (1, 10, 100)}
    columns |= {"perplexity": "perplexity"}
    columns |= {f"spearman@{top}": f"rho @{top}" for top in (100, 500, 2000)} | {"coverage@100": "coverage @100"}
    table = Table("file", "cells", "predictor", *columns.values())
    for row in results:
        values = [row.get(name) for name in columns]
        cells = ["" if value is None or np.isnan(value) else f"{value:.4g}" for value in values]
        table.add_row(row["file"], f"{row['cells']:,}", row["predictor"], *cells)
    return table


def run(
    checkpoint_path: str, files: Sequence[str], *, options: EvaluateOptions, corpus_path: str | None, out: Path | None
) -> list[dict[str, Any]]:
    """Evaluate, print a table, and write JSON.

    Raises
    ------
    PerturbScopeError
        :func:`evaluate`, :func:`read_heldout` or :func:`training.checkpoint.load_checkpoint` fails; `out` cannot be
        written (InvalidParameterError); or the corpus has other tokens (VocabularyMismatchError).
    """
    if out is not None:
        check_output(out, (".json",))
    checkpoint = load_checkpoint(checkpoint_path)
    corpus = None if corpus_path is None else Corpus(corpus_path)
    if corpus is not None and corpus.vocabulary.hash != checkpoint.vocabulary.hash:
        raise VocabularyMismatchError(
            f"The corpus {corpus_path} has the vocabulary {corpus.vocabulary.hash[:12]}, the checkpoint "
            f"{checkpoint.vocabulary.hash[:12]}. Give the corpus that the model was trained on.",
            field="corpus",
        )
    frequencies = None if corpus is None else corpus_frequencies(corpus, options.max_length)
    results, left_out = [], {}
    trained: dict[str, int] = {}
    with console.cell_progress() as progress:
        for path in files:
            heldout = read_heldout(path, checkpoint, options=options, corpus=corpus)
            seen = None if corpus is not None else trained_on(path, checkpoint.provenance)
            if seen:
                trained[heldout.name] = seen
                console.stderr().print(
                    f"{path}: {seen:,} cells of this very file were trained on, by the checkpoint's record. Give "
                    "--corpus to leave them out; these numbers do not show what the model makes of unseen cells."
                )
            found = evaluate(checkpoint, heldout, options=options, frequencies=frequencies, progress=progress)
            results += list(_results(found, heldout))
            left_out[heldout.name] = heldout.left_out
    Console(width=200).print(_show(results))
    if out is not None:
        facts = {
            "checkpoint": str(checkpoint_path),
            "vocabulary_hash": checkpoint.vocabulary.hash,
            "corpus": corpus_path,
            "options": vars(options),
            "left_out": left_out,
            "trained_on": trained,
            "results": [{name: _json(value) for name, value in row.items()} for row in results],
        }
        write_json(out, facts)
    return results


def _json(value: Any) -> Any:
    """Return a value for JSON, which has no NaN."""
    return None if isinstance(value, float) and np.isnan(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    defaults = EvaluateOptions()
    parser = argparse.ArgumentParser(description="Score a pre-trained checkpoint on cells it was not trained on.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("files", metavar="CELLS.h5ad", nargs="+")
    parser.add_argument("--corpus", help="the training corpus: leave its cells out, and score gene frequencies")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    for name in ("cells", "min_genes", "max_length", "batch", "seed"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name), help="default %(default)s")
    parser.add_argument("--mask-probability", type=float, default=defaults.mask_probability, help="default %(default)s")
    for name in ("layer", "gene_key", "total_counts_key"):
        parser.add_argument(f"--{name.replace('_', '-')}", default=None)
    parser.add_argument("--device", default=defaults.device, help="cpu or cuda")
    values = vars(parser.parse_args(arguments))
    paths = {name: values.pop(name) for name in ("checkpoint", "files", "corpus", "out")}

    def body() -> None:
        options = EvaluateOptions(**values)
        run(paths["checkpoint"], paths["files"], options=options, corpus_path=paths["corpus"], out=paths["out"])

    return console.run(body)
