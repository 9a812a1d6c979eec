"""Several embeddings of one screen, scored in the same way and shown side by side.

``python -m evaluation.separation heldout.h5ad --bundle fine-tuned=bundles/default --bundle pre-trained=runs/pre``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from rich.console import Console

from evaluation.baselines import pca
from perturbscope.bundle import Bundle
from perturbscope.embedder import Embedder
from perturbscope.errors import InvalidParameterError
from perturbscope.readers import open_cells
from perturbscope.scoring import ScoreOptions, calibrate, score_perturbations


@dataclass(frozen=True)
class Separation:
    """Scores of several embeddings over the same cells.

    Attributes
    ----------
    scores
        One row a model, perturbation and metric, with the columns of a score table.
    summary
        One row a model and metric: median, quartiles and skewness of z, the share with q < 0.05, and the p-value of a
        Kolmogorov-Smirnov test that control-against-control p-values are uniform.
    """

    scores: pd.DataFrame
    summary: pd.DataFrame


def separate(
    embeddings: Mapping[str, NDArray[np.float32]],
    perturbations: Sequence[str],
    *,
    control: str,
    batches: Sequence[str] | None = None,
    options: ScoreOptions | None = None,
) -> Separation:
    """Score every embedding with the same options and seed."""
    options = options or ScoreOptions()
    scores, summary = [], []
    for model, values in embeddings.items():
        table = score_perturbations(values, perturbations, control=control, batches=batches, options=options).table
        null = calibrate(values, perturbations, control=control, batches=batches, options=options)
        uniform: dict[str, float] = {found.metric: found.uniform.p for found in null.sets if found.kind == "cell"}
        scores.append(table.assign(model=model))
        for metric, rows in table.groupby("metric", sort=False):
            z = rows["z"].dropna()
            summary.append(
                {
                    "model": model,
                    "metric": metric,
                    "n": len(z),
                    "median z": z.median(),
                    "z 25 %": z.quantile(0.25),
                    "z 75 %": z.quantile(0.75),
                    "skewness": z.skew(),
                    "q < 0.05": (rows["q"] < 0.05).mean(),
                    "null KS p": uniform[str(metric)],
                }
            )
    return Separation(pd.concat(scores, ignore_index=True), pd.DataFrame(summary))


def by_perturbation(separation: Separation, *, metric: str = "e_distance") -> pd.DataFrame:
    """Scores z, a row a perturbation and a column a model, strongest first."""
    rows = separation.scores[separation.scores["metric"] == metric]
    wide = rows.pivot_table(index=["perturbation", "n_cells"], columns="model", values="z", sort=False).reset_index()
    models = [str(name) for name in rows["model"].unique()]
    return wide.sort_values(models[-1], ascending=False, ignore_index=True)[["perturbation", "n_cells", *models]]


def main(
    screen: Annotated[Path, typer.Argument(help="Held-out .h5ad with raw counts.")],
    bundle: Annotated[list[str], typer.Option(help="NAME=DIRECTORY of a bundle; repeat for more.")],
    perturbation_key: str = "perturbation",
    control: str = "control",
    batch_key: str | None = None,
    total_counts_key: str | None = None,
    components: int = 50,
    seed: int = 0,
) -> None:
    """Score PCA and the given bundles over one screen, and print Markdown tables."""
    with open_cells(screen, total_counts_key=total_counts_key) as source:
        cells, obs = source.read(), source.obs
    embeddings = {f"PCA-{components}": pca(cells, n_components=components, seed=seed)}
    for item in bundle:
        name, found, directory = item.partition("=")
        if not found:
            raise InvalidParameterError(f"--bundle is {item!r}; NAME=DIRECTORY is needed.", field="bundle")
        embeddings[name] = Embedder.from_bundle(Bundle.open(directory)).embed(cells).values
    result = separate(
        embeddings,
        obs[perturbation_key].astype(str).tolist(),
        control=control,
        batches=obs[batch_key].astype(str).tolist() if batch_key else None,
        options=ScoreOptions(seed=seed, metrics=("e_distance", "cosine_e_distance")),
    )
    console = Console(width=160)
    console.print(markdown(result.summary))
    console.print(markdown(by_perturbation(result)))


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; numbers with three significant digits."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    for row in table.itertuples(index=False):
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
