"""scVI (Lopez et al. 2018) as a baseline, in the two sizes of Zhao et al. (2025).

``linear``: one encoder layer and a linear decoder. ``5L``: five encoder and five decoder layers. Both: zero-inflated
negative binomial, dropout 0.1, early stopping on a tenth of the cells. The package and torch are loaded only when a
model is trained.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError

Architecture = Literal["linear", "5L"]
MIN_TRAINING_CELLS = 50
INSTALL = "pip install -r requirements/evaluation.txt, after -r requirements/torch.txt where torch is missing, too"


@dataclass(frozen=True, kw_only=True)
class ScviOptions:
    """Options of scVI's training.

    Parameters
    ----------
    n_latent
        Width of the embedding; at most half of the genes.
    max_epochs
        Most passes over the training cells; early stopping may end training before (Zhao et al. 2025 use 500).
    batch_size
        Cells of a step; the package's own default.
    dropout
        Dropout rate of all hidden layers.
    train_size
        Share of the cells that are trained on; the others decide when to stop.
    seed
        Seed of weights, split and order.
    """

    n_latent: int = 300
    max_epochs: int = 500
    batch_size: int = 128
    dropout: float = 0.1
    train_size: float = 0.9
    seed: int = 0


@dataclass(frozen=True)
class ScviEmbedding:
    """Vectors of scVI, and a record of what made them.

    Attributes
    ----------
    values
        Means of the approximate posterior, float32 [n_cells, n_latent].
    facts
        Width, number of epochs, number of training cells, and the options (JSON-able).
    """

    values: NDArray[np.float32]
    facts: dict[str, Any]


def scvi_embedding(
    cells: CountMatrix,
    architecture: Architecture,
    *,
    train: NDArray[np.bool_] | None = None,
    options: ScviOptions | None = None,
) -> ScviEmbedding:
    """Train scVI on raw counts and embed all cells.

    Parameters
    ----------
    cells
        Raw counts; no gene is filtered.
    architecture
        ``linear`` or ``5L``.
    train
        Mask of the cells to train on, bool [n_cells]; default all.

    Raises
    ------
    InvalidParameterError
        scvi-tools is not installed, the architecture is unknown, or there are fewer than 50 cells to train on.
    """
    options = options or ScviOptions()
    if architecture not in get_args(Architecture):
        raise InvalidParameterError(
            f"architecture must be one of {', '.join(get_args(Architecture))}, not {architecture!r}.",
            field="architecture",
        )
    trained = np.ones(len(cells), dtype=bool) if train is None else train
    if np.count_nonzero(trained) < MIN_TRAINING_CELLS:
        raise InvalidParameterError(
            f"{np.count_nonzero(trained)} cells to train scVI on; {MIN_TRAINING_CELLS} or more are needed.",
            field="train",
        )
    n_latent = max(1, min(options.n_latent, cells.n_genes // 2))
    with _quiet() as package:
        model = _model(package, _annotated(cells[trained]), architecture, n_latent, options)
        model.train(
            max_epochs=options.max_epochs,
            early_stopping=True,
            train_size=options.train_size,
            batch_size=options.batch_size,
            accelerator="auto",
            enable_progress_bar=False,
        )
        values = np.asarray(model.get_latent_representation(_annotated(cells)), dtype=np.float32)
        epochs = len(model.history["elbo_train"])
    facts = {
        "package": f"scvi-tools {package.__version__}",
        "architecture": architecture,
        "n_cells_trained_on": int(np.count_nonzero(trained)),
        "epochs_run": epochs,
        **asdict(options),
        "n_latent": n_latent,
    }
    return ScviEmbedding(values, facts)


def available() -> bool:
    """Whether scvi-tools is installed; it is not imported."""
    from importlib.util import find_spec

    return find_spec("scvi") is not None


def _package() -> Any:
    try:
        import scvi
    except ImportError as error:
        raise InvalidParameterError(
            f"The scVI baselines need scvi-tools, which is not installed: {INSTALL}; or leave them out.", field="scvi"
        ) from error
    return scvi


def _model(package: Any, adata: Any, architecture: Architecture, n_latent: int, options: ScviOptions) -> Any:
    package.settings.seed = options.seed
    shared: dict[str, Any] = {
        "n_latent": n_latent,
        "dropout_rate": options.dropout,
        "gene_likelihood": "zinb",
    }
    if architecture == "linear":
        package.model.LinearSCVI.setup_anndata(adata)
        return package.model.LinearSCVI(adata, n_layers=1, **shared)
    package.model.SCVI.setup_anndata(adata)
    return package.model.SCVI(adata, n_layers=5, **shared)


def _annotated(cells: CountMatrix) -> Any:
    import anndata
    import pandas as pd

    var = pd.DataFrame(index=pd.Index(cells.gene_ids.astype(object)))
    obs = pd.DataFrame(index=pd.RangeIndex(len(cells)).astype(str))
    return anndata.AnnData(X=cells.counts.astype(np.float32), obs=obs, var=var)


@contextmanager
def _quiet() -> Iterator[Any]:
    """Yield the package with its logs and warnings silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = _package()  # importing it sets the levels of its loggers
        loggers = [logging.getLogger(name) for name in ("scvi", "lightning", "lightning.pytorch", "lightning.fabric")]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield package
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
