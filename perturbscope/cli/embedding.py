"""``perturbscope embed``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perturbscope import __version__
from perturbscope.cli import console, options

if TYPE_CHECKING:
    from perturbscope.cells.readers import CellSource
    from perturbscope.tasks.backends import Backend
    from perturbscope.tasks.resume import PartialRun


@options.grouped
def embed(
    cells: options.In,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .h5ad file to write.")],
    counts_in: options.CountsIn,
    model_from: options.ModelFrom,
    seed: Annotated[int, typer.Option(min=0, help="Accepted by every command; embedding draws nothing at random.")] = 0,
    output: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Another output of the model that is wanted, e.g. gene_embedding; repeatable. One a cell goes into "
            "OUT, one a gene of each cell into the Arrow file OUT.NAME.arrow.",
        ),
    ] = [],  # noqa: B006  typer copies it
    chunk_cells: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cells of a chunk; an interruption loses at most one chunk. Default: 512, or fewer if their outputs "
            "for each gene would take over 64 MiB.",
        ),
    ] = None,
) -> None:
    """Embed cells: OUT is IN with obsm["X_perturbscope"].

    The same command continues an interrupted run: finished chunks wait in OUT.partial/.
    """
    from perturbscope.cells.files import check_output, commit
    from perturbscope.cells.readers import open_cells
    from perturbscope.families.outputs import CELL_EMBEDDING, selected
    from perturbscope.tasks.backends import chunk_cells as chunk_of
    from perturbscope.tasks.embedded_file import provenance_of, write_embedded
    from perturbscope.tasks.resume import CHUNK_CELLS, PartialRun, fingerprint
    from perturbscope.tasks.trained_on import seen_by

    check_output(out, [".h5ad"], source=cells)
    where = vars(counts_in)
    with (
        open_cells(cells, chunk_cells=chunk_cells or CHUNK_CELLS, **where) as source,
        model_from.open() as backend,
        console.progress_bars() as progress,
    ):
        # A server that does not answer is found before the file is read.
        model_id = backend.model_id
        outputs = [spec for spec in selected(backend.outputs, output) if spec.name != CELL_EMBEDDING] if output else []
        if outputs and chunk_cells is None:
            source.chunk_cells = chunk_of(outputs, backend.max_length, most=CHUNK_CELLS)
        files = {spec.name: out.with_name(f"{out.name}.{spec.name}.arrow") for spec in outputs if spec.per == "token"}
        seen = seen_by(backend, source)
        identity = {
            "model": model_id,
            "input": fingerprint(cells),
            "options": {
                **where,
                "chunk_cells": source.chunk_cells,
                "device": model_from.device,
                "variant": model_from.variant,
            },
            "version": __version__,
        }
        partial = PartialRun(out.with_name(f"{out.name}.partial"), identity, console.warn, outputs)
        with partial.open():
            if files:
                announce(source, backend, partial, files)
            embeddings = partial.embed(source, backend, progress=progress).from_source(source)
            names = {name: file.name for name, file in files.items()}
            provenance = provenance_of(embeddings, where, __version__, outputs, names)
            write_embedded(partial.staging, source, embeddings, provenance)
            # OUT comes last: where it is, all of the others are.
            for name, file in files.items():
                commit(partial.token_file(name), file)
            commit(partial.staging, out)
            warnings = [*([seen.warning()] if seen else []), *embeddings.warnings()]
            summary = (
                f"{len(embeddings)} cells x {embeddings.values.shape[1]} by {embeddings.model_id}; "
                f"{embeddings.coverage.n_matched} of {embeddings.coverage.n_genes} genes known -> "
                f"{', '.join(map(str, [out, *files.values()]))}"
            )
            del embeddings  # their vectors are mapped from a file that is removed now
    for warning in warnings:
        console.warn(warning)
    console.say(summary)


def announce(source: CellSource, backend: Backend, partial: PartialRun, files: Mapping[str, Path]) -> None:
    """Say how large the files of values per token will be, and refuse to begin if the disk has no room for them."""
    from perturbscope.tasks.token_files import GENE_BYTES, check_room, size_text, tokens_of_a_cell

    length = tokens_of_a_cell(source, backend)
    total = 0.0
    for spec in partial.outputs:
        if spec.name in files:
            size = source.n_cells * length * (4 * spec.width + GENE_BYTES)
            total += size
            console.say(
                f"{files[spec.name]}: about {size_text(size)} ({source.n_cells} cells x about {length:.0f} tokens x "
                f"({spec.width} x 4 + {GENE_BYTES} bytes))"
            )
    check_room(partial.path, int(total), partial.written())
