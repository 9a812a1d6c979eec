"""A small table of the cells of a screen that a model was not trained on, to be shipped with the model.

``python -m evaluation.heldout runs/default/contrastive/heldout.h5ad papalexi-heldout.tsv.gz`` takes the names and the
split of the cells from the file that fine-tuning writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from perturbscope.cells.files import atomic
from perturbscope.cells.readers import open_cells
from perturbscope.errors import InvalidParameterError, UnreadableFileError

COLUMNS = ["cell", "split"]


def read_held_out(path: str | Path) -> dict[str, str]:
    """Read the split of each held-out cell, by its name.

    Parameters
    ----------
    path
        File of counts with a column ``split`` of obs (without it all cells are ``test``), or a ``.tsv`` or ``.tsv.gz``
        with the columns ``cell`` and ``split``.

    Raises
    ------
    UnreadableFileError
        The file does not exist, or the table lacks these columns.
    """
    path = Path(path)
    if not path.name.endswith((".tsv", ".tsv.gz")):
        with open_cells(path) as source:
            has_split = "split" in source.columns
            split = source.labels("split") if has_split else np.full(source.n_cells, "test", dtype=object)
            return dict(zip(source.cell_ids.tolist(), split.tolist(), strict=True))
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}", field="held_out") from error
    if list(table.columns) != COLUMNS:
        raise UnreadableFileError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; {' and '.join(COLUMNS)} are needed.",
            field="held_out",
        )
    return dict(zip(table["cell"], table["split"], strict=True))


def main(
    cells: Annotated[Path, typer.Argument(help="Held-out cells, as fine-tuning writes them.")],
    out: Annotated[Path, typer.Argument(help="Table to write, .tsv or .tsv.gz.")],
) -> None:
    """Write names and splits of held-out cells as a table."""
    if not out.name.endswith((".tsv", ".tsv.gz")):
        raise InvalidParameterError(f"{out} must end in .tsv or .tsv.gz.", field="out")
    table = pd.DataFrame(sorted(read_held_out(cells).items()), columns=COLUMNS)
    # No time stamp in the header: the same cells give the same file.
    packing = {"method": "gzip", "mtime": 0} if out.name.endswith(".gz") else None
    with atomic(out) as staging:
        table.to_csv(staging, sep="\t", index=False, compression=packing)
    typer.echo(f"{out}: {len(table)} cells, {table['split'].value_counts().to_dict()}")


if __name__ == "__main__":
    typer.run(main)
