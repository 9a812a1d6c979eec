"""``python -m training census CONFIG``: what the filters of a configuration would keep, without reading counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from training import console
from training.config import strict
from training.config.stages import CorpusConfig
from training.data.sources import coded, keep_cells, name_of, open_source


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    parser = console.parser("List what the filters of a training configuration would keep, without reading counts.")
    options = parser.parse_args(arguments)

    def show() -> None:
        config = strict.section(CorpusConfig, options.config, "corpus", options.set)
        for number, source in enumerate(config.sources):
            dropped: Counter[str] = Counter()
            with open_source(source) as cells:
                keep = keep_cells(cells, config, number, dropped)
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items() if count)
                has_disease = config.disease_key in cells.columns
                names, codes = coded(cells.column(config.disease_key)) if has_disease else ([], np.full(len(keep), -1))
            table = Table(config.disease_key, "cells", "kept", title=f"{name_of(source)}: {source.path}")
            totals = np.bincount(codes[codes >= 0], minlength=len(names))
            kept = np.bincount(codes[keep & (codes >= 0)], minlength=len(names))
            for at in np.argsort(-totals, kind="stable").tolist():
                if totals[at]:
                    table.add_row(names[at], f"{totals[at]:,}", f"{kept[at]:,}")
            console.stderr().print(table)
            console.stderr().print(
                f"{len(keep):,} cells, {int(keep.sum()):,} kept before genes are counted; dropped: {reasons or 'none'}"
            )

    return console.run(show)
