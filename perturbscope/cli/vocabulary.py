"""``perturbscope vocabulary``: the genes that a model knows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from perturbscope.cli import console, options

Out = Annotated[
    Path | None, typer.Argument(metavar="[OUT]", help="The .parquet or .csv file to write; default: CSV on stdout.")
]


@options.grouped
def vocabulary(*, out: Out = None, model_from: options.ModelFrom) -> None:
    """Write the genes that a model knows, with their tokens and medians, as a table."""
    import pandas as pd

    from perturbscope.cells.files import check_output, write_table
    from perturbscope.operations.vocabulary import VocabularyAnswer, VocabularyRequest
    from perturbscope.protocol.tables import meta_to_dict

    if out is not None:
        check_output(out, [".parquet", ".csv"])
    with model_from.open() as backend:
        answer = backend.ask(VocabularyRequest())
    assert isinstance(answer, VocabularyAnswer)  # noqa: S101  the operation's own answer
    table = pd.DataFrame({"gene_id": list(answer.gene_id), "token": answer.token, "median": answer.median})
    if out is None:
        table.to_csv(sys.stdout, index=False)
        return
    facts = {"max_length": answer.max_length, "source": answer.source}
    write_table(out, table, {**meta_to_dict(answer.meta), **facts})
    console.say(f"Vocabulary of {answer.meta.model_id}: {len(table)} genes -> {out}")
