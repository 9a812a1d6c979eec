"""Differentially expressed genes of a screen, from its source to a table of genes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbscope.analysis.degs import DEG_COLUMNS, DegOptions, DegResult, DegScreen, differential_genes
from perturbscope.analysis.expression_sets import SetResult, enrich_expression
from perturbscope.analysis.gene_sets import read_gmt
from perturbscope.analysis.pseudobulk import pseudobulk_degs
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.files import table_parts
from perturbscope.cells.readers import CellSource
from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.cleaning import clean_labels
from perturbscope.tasks.backends import StageProgress
from perturbscope.tasks.screen import opened


def degs(
    cells: Any,
    perturbations: Sequence[str] | None = None,
    *,
    control: str | Sequence[str],
    perturbation_key: str | None = None,
    batch_key: str | None = None,
    batches: Sequence[str] | None = None,
    options: DegOptions | None = None,
    targets: Mapping[str, int] | None = None,
    top: int | None = None,
    missing_labels: Collection[str] = (),
    normalize_combinations: bool = False,
    seed: int = 0,
    layer: str | None = None,
    gene_key: str | None = None,
    total_counts_key: str | None = None,
    round_counts: bool = False,
    progress: StageProgress | None = None,
) -> DegResult:
    """Test every gene of every perturbation against control; no model is needed.

    The test is Wilcoxon's rank sum as scanpy computes it, or van Elteren's within batches, with p from the exchanges of
    labels where few cells express a gene (:mod:`perturbscope.analysis.rank_test`).

    Parameters
    ----------
    cells
        AnnData, path or :class:`CellSource` with labels; cells without a label are left out. Or a :class:`CountMatrix`
        with `perturbations`, and `batches` if there are any.
    perturbations, batches
        Labels of each cell of a :class:`CountMatrix`.
    control
        Label of the control cells, or several.
    perturbation_key, batch_key
        Columns of obs with each cell's perturbation, and its batch, within which cells and controls are compared.
    options
        Thresholds; default :class:`perturbscope.analysis.degs.DegOptions`.
    targets
        Column of the gene that each perturbation targets; by default found by its label.
    top
        Number of genes to return of each perturbation, those with the smallest p; default all that were tested.
    missing_labels, normalize_combinations
        Of a source with columns: see :class:`perturbscope.ScoreOptions`.
    seed
        Seed of the sample of controls, if there are more than `max_controls`.
    layer, gene_key, total_counts_key, round_counts
        Location of the counts, and whether to round them; see :func:`perturbscope.open_cells`.
    progress
        Called as ``progress("degs", done, total)``.

    Returns
    -------
    ``table`` with a row a perturbation and gene, ``counts`` with a row a perturbation, ``provenance``, ``warnings``.

    Raises
    ------
    InvalidParameterError
        Labels are missing, or given twice; or an option is out of range.
    MissingColumnError, ControlLabelMissingError, TooFewCellsError
        The labels do not allow a test.
    InvalidInputError
        The counts cannot be used; the message names cell and gene.
    """
    if isinstance(cells, CountMatrix):
        if perturbations is None or perturbation_key is not None or batch_key is not None:
            raise InvalidParameterError(
                "A CountMatrix has no columns: give the label of each cell as perturbations (and batches), not a key.",
                field="perturbations",
            )
        return differential_genes(
            cells, perturbations, control=control, batches=batches, targets=targets, options=options, top=top,
            seed=seed, progress=progress,
        )  # fmt: skip
    if perturbation_key is None or perturbations is not None or batches is not None:
        raise InvalidParameterError(
            "Name the column of obs that holds each cell's label (perturbation_key, batch_key); lists of labels go "
            "with a CountMatrix.",
            field="perturbation_key",
        )
    with opened(
        cells, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key, round_counts=round_counts
    ) as source:
        screen, facts, warnings = deg_screen(
            source, perturbation_key=perturbation_key, control=control, batch_key=batch_key, targets=targets,
            missing_labels=missing_labels, normalize_combinations=normalize_combinations, options=options, seed=seed,
        )  # fmt: skip
    found = screen.result(top=top, progress=progress)
    return replace(
        found, provenance={**found.provenance, **facts}, warnings=list(dict.fromkeys([*warnings, *found.warnings]))
    )


def enrich_genes(
    cells: Any,
    gene_sets: str | Path | Mapping[str, Sequence[str]],
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    batch_key: str | None = None,
    options: DegOptions | None = None,
    correlation: float = 0.01,
    min_members: int = 5,
    max_members: int = 500,
    missing_labels: Collection[str] = (),
    normalize_combinations: bool = False,
    seed: int = 0,
    layer: str | None = None,
    gene_key: str | None = None,
    total_counts_key: str | None = None,
    round_counts: bool = False,
    progress: StageProgress | None = None,
) -> SetResult:
    """Test gene sets in the expression of each perturbation against control; no model is needed.

    Parameters
    ----------
    cells
        AnnData, path or :class:`CellSource` with labels; cells without a label are left out.
    gene_sets
        A ``.gmt`` file, or the genes of each set.
    correlation, min_members, max_members
        See :func:`perturbscope.analysis.expression_sets.enrich_expression`.
    perturbation_key, control, batch_key, options, missing_labels, normalize_combinations, seed
        See :func:`degs`.
    layer, gene_key, total_counts_key, round_counts, progress
        See :func:`degs`.

    Returns
    -------
    ``table`` with a row a perturbation and set, ``provenance``, ``warnings``.

    Raises
    ------
    UnreadableFileError
        The file of gene sets cannot be read; the message names the line.
    InvalidParameterError, MissingColumnError, ControlLabelMissingError, TooFewCellsError, InvalidInputError
        See :func:`degs`.
    """
    sets = gene_sets if isinstance(gene_sets, Mapping) else read_gmt(gene_sets)
    with opened(
        cells, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key, round_counts=round_counts
    ) as source:
        screen, facts, warnings = deg_screen(
            source, perturbation_key=perturbation_key, control=control, batch_key=batch_key, options=options,
            missing_labels=missing_labels, normalize_combinations=normalize_combinations, seed=seed,
        )  # fmt: skip
    found = enrich_expression(
        screen, sets, correlation=correlation, min_members=min_members, max_members=max_members, progress=progress
    )
    return replace(
        found, provenance={**found.provenance, **facts}, warnings=list(dict.fromkeys([*warnings, *found.warnings]))
    )


def pseudobulk(
    cells: Any,
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    replicate_key: str,
    min_cells: int = 10,
    layer: str | None = None,
    gene_key: str | None = None,
    total_counts_key: str | None = None,
    round_counts: bool = False,
    progress: StageProgress | None = None,
) -> pd.DataFrame:
    """Test genes between replicates by DESeq2; see :func:`perturbscope.analysis.pseudobulk.pseudobulk_degs`.

    Parameters
    ----------
    cells
        AnnData, path or :class:`CellSource` with labels; cells without a label or replicate are left out.
    replicate_key
        Column of obs with each cell's replicate: well, donor, guide.
    min_cells
        Fewest cells of a sample; smaller ones are left out.
    perturbation_key, control, layer, gene_key, total_counts_key, round_counts, progress
        See :func:`degs`.

    Returns
    -------
    A row a perturbation and gene; ``attrs["warnings"]`` names perturbations that could not be tested.

    Raises
    ------
    ProviderUnavailableError
        pydeseq2 is not installed.
    InvalidParameterError, MissingColumnError, ControlLabelMissingError, TooFewCellsError, InvalidInputError
        The labels do not allow a test, or the counts cannot be used.
    """
    with opened(
        cells, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key, round_counts=round_counts
    ) as source:
        labels = source.labels(perturbation_key, field="perturbation_key")
        units = source.labels(replicate_key, field="replicate_key")
        both = zip(labels, units, strict=True)
        rows = np.array([bool(a and a.strip() and b and b.strip()) for a, b in both]).nonzero()
        if not len(rows[0]):
            raise InvalidParameterError(
                f"No cell has a value in obs[{perturbation_key!r}] and obs[{replicate_key!r}].", field="replicate_key"
            )
        counts = source.read()[rows[0]]
        warnings = list(source.warnings)
    table, said = pseudobulk_degs(
        counts, labels[rows].tolist(), units[rows].tolist(), control=control, min_cells=min_cells, progress=progress
    )
    table.attrs["warnings"] = [*warnings, *said]
    return table


def deg_screen(
    source: CellSource,
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    batch_key: str | None = None,
    targets: Mapping[str, int] | None = None,
    missing_labels: Collection[str] = (),
    normalize_combinations: bool = False,
    options: DegOptions | None = None,
    seed: int = 0,
) -> tuple[DegScreen, dict[str, Any], list[str]]:
    """Read the labels and then the counts of a source; parameters and errors as :func:`degs`.

    Returns
    -------
    The screen, facts about where it comes from, and warnings.
    """
    labels = source.labels(perturbation_key, field="perturbation_key")
    batches = None if batch_key is None else source.labels(batch_key, field="batch_key")
    keep = np.array([bool(label and label.strip()) for label in labels])
    if batches is not None:
        keep &= np.array([bool(batch and batch.strip()) for batch in batches])
    rows = np.flatnonzero(keep)
    keys = " and ".join(f"obs[{key!r}]" for key in (perturbation_key, batch_key) if key)
    if not len(rows):
        raise InvalidParameterError(f"No cell has a value in {keys}.", field="perturbation_key")
    row_batches = None if batches is None else batches[rows].tolist()
    cleaned = clean_labels(
        labels[rows].tolist(),
        control,
        batches=row_batches,
        missing=missing_labels,
        combinations=normalize_combinations,
    )
    left_out = len(labels) - len(rows)
    rows = cleaned.kept(rows)
    counts = source.read()
    screen = DegScreen(
        counts if len(rows) == len(counts) else counts[rows],
        list(cleaned.labels),
        control=str(cleaned.control),
        batches=cleaned.kept(row_batches),
        targets=targets,
        options=options,
        seed=seed,
    )
    warnings = list(source.warnings)
    if left_out:
        warnings.append(f"{left_out} of {len(labels)} cells have no value in {keys} and were left out.")
    warnings += cleaned.warnings
    unknown = [name for name in screen.names if name not in screen.targets]
    if screen.options.exclude_target and unknown:
        warnings.append(
            f"{len(unknown)} of {len(screen.names)} perturbations are not named by a gene that was measured, so their "
            f"own gene could not be left out: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}."
        )
    return screen, {"perturbation_key": perturbation_key, "batch_key": batch_key, **cleaned.facts}, warnings


def write_genes(
    screen: DegScreen,
    out: Path,
    facts: Mapping[str, Any],
    warnings: Sequence[str],
    *,
    top: int | None = None,
    progress: StageProgress | None = None,
) -> pd.DataFrame:
    """Write the genes of a screen to ``.parquet`` or ``.csv``, a perturbation at a time; complete or not at all.

    Parameters
    ----------
    screen
        The screen.
    out
        File to write.
    facts, warnings
        More facts for the provenance, and warnings.
    top, progress
        See :func:`degs`.

    Returns
    -------
    Counts, one row a perturbation, columns :data:`perturbscope.analysis.degs.DEG_COLUMNS`.
    """
    rows = []
    with table_parts(out) as parts, closing(screen.run(progress)) as results:
        for found in results:
            parts.write(found.table(screen.gene_ids, top=top))
            rows.append(screen.row(found))
        counts = pd.DataFrame(rows, columns=list(DEG_COLUMNS))
        parts.provenance = {
            **screen.facts(), **facts, "top": top, "counts": counts.to_dict("records"),
            "warnings": list(dict.fromkeys([*warnings, *screen.warnings(counts)])),
        }  # fmt: skip
    return counts
