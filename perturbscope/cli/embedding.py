"""``perturbscope embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perturbscope import __version__
from perturbscope.cli import console, options


@options.grouped
def embed(
    cells: options.In,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .h5ad file to write.")],
    counts_in: options.CountsIn,
    model_from: options.ModelFrom,
    seed: Annotated[int, typer.Option(min=0, help="Accepted by every command; embedding draws nothing at random.")] = 0,
    chunk_cells: Annotated[
        int, typer.Option(min=1, help="Cells of a chunk; an interruption loses at most one chunk.")
    ] = 512,
) -> None:
    """Embed cells: OUT is IN with obsm["X_perturbscope"].

    The same command continues an interrupted run: finished chunks wait in OUT.partial/.
    """
    from perturbscope.cells.files import check_output, commit
    from perturbscope.cells.readers import open_cells
    from perturbscope.tasks.embedded_file import provenance_of, write_embedded
    from perturbscope.tasks.resume import PartialRun, fingerprint
    from perturbscope.tasks.trained_on import seen_by

    check_output(out, [".h5ad"], source=cells)
    where = vars(counts_in)
    with (
        open_cells(cells, chunk_cells=chunk_cells, **where) as source,
        model_from.open() as backend,
        console.progress_bars() as progress,
    ):
        # A server that does not answer is found before the file is read.
        model_id = backend.model_id
        seen = seen_by(backend, source)
        identity = {
            "model": model_id,
            "input": fingerprint(cells),
            "options": {
                **where,
                "chunk_cells": chunk_cells,
                "device": model_from.device,
                "variant": model_from.variant,
            },
            "version": __version__,
        }
        partial = PartialRun(out.with_name(f"{out.name}.partial"), identity, console.warn)
        with partial.open():
            embeddings = partial.embed(source, backend, progress=progress)
            write_embedded(partial.staging, source, embeddings, provenance_of(embeddings, where, __version__))
            commit(partial.staging, out)
            warnings = [*([seen.warning()] if seen else []), *embeddings.warnings()]
            summary = (
                f"{len(embeddings)} cells x {embeddings.values.shape[1]} by {embeddings.model_id}; "
                f"{embeddings.coverage.n_matched} of {embeddings.coverage.n_genes} genes known -> {out}"
            )
            del embeddings  # their vectors are mapped from a file that is removed now
    for warning in warnings:
        console.warn(warning)
    console.say(summary)
