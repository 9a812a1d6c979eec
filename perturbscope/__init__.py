"""See what a gene perturbation does to a cell.

>>> import perturbscope
>>> model = perturbscope.load("bundles/default")            # or "http://localhost:3000", "grpc://localhost:3001"
>>> vectors = model.embed(adata)                            # float32 [n_cells, width]
>>> table = model.score(adata, perturbation_key="perturbation", control="control")

Importing the package is cheap; what a name needs is imported when the name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perturbscope.cells.counts import CountMatrix
    from perturbscope.cells.genes import GeneVocabulary
    from perturbscope.cells.readers import CellSource, cells_from_anndata, open_cells
    from perturbscope.client import AsyncClient, AsyncGrpcClient, Client, GrpcClient
    from perturbscope.errors import PerturbScopeError
    from perturbscope.inference.bundle import Bundle
    from perturbscope.inference.embedder import Embedder, Embeddings
    from perturbscope.model import Model, load
    from perturbscope.scoring.control import score_perturbations
    from perturbscope.scoring.pairs import compare_perturbations
    from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

__all__ = [
    "AsyncClient",
    "AsyncGrpcClient",
    "Bundle",
    "CellSource",
    "Client",
    "CompareResult",
    "CountMatrix",
    "Embedder",
    "Embeddings",
    "GeneVocabulary",
    "GrpcClient",
    "Model",
    "PerturbScopeError",
    "ScoreOptions",
    "ScoreResult",
    "cells_from_anndata",
    "compare_perturbations",
    "load",
    "open_cells",
    "score_perturbations",
]

__version__ = "0.1.0"

_MODULES = {
    "AsyncClient": "client",
    "AsyncGrpcClient": "client",
    "Bundle": "inference.bundle",
    "CellSource": "cells.readers",
    "Client": "client",
    "CompareResult": "scoring.results",
    "CountMatrix": "cells.counts",
    "Embedder": "inference.embedder",
    "Embeddings": "inference.embedder",
    "GeneVocabulary": "cells.genes",
    "GrpcClient": "client",
    "Model": "model",
    "PerturbScopeError": "errors",
    "ScoreOptions": "scoring.results",
    "ScoreResult": "scoring.results",
    "cells_from_anndata": "cells.readers",
    "compare_perturbations": "scoring.pairs",
    "load": "model",
    "open_cells": "cells.readers",
    "score_perturbations": "scoring.control",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'perturbscope' has no attribute {name!r}")
    value = getattr(import_module(f"perturbscope.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
