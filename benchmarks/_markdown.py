"""Tables of the benchmarks as Markdown."""

from __future__ import annotations

import numpy as np
import pandas as pd


def markdown(table: pd.DataFrame, first: str, *, digits: int = 2) -> str:
    """A table with its index as the first column; fractions with so many digits, NaN as a dash."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.{digits}f}" if np.isfinite(value) else "-"
        return str(value)

    lines = ["| " + " | ".join([first, *map(str, table.columns)]) + " |", "|---" * (len(table.columns) + 1) + "|"]
    for name, *values in table.itertuples():
        lines.append("| " + " | ".join([str(name), *map(text, values)]) + " |")
    return "\n".join(lines) + "\n"
