from .analysis.degs import DegOptions, DegResult
from .cells.counts import CountMatrix
from .cells.readers import CellSource, cells_from_anndata, open_cells
from .cells.vocabulary import GeneVocabulary
from .client import AsyncClient, AsyncGrpcClient, Client, GrpcClient
from .errors import PerturbScopeError
from .families.outputs import OutputSpec
from .inference.bundle import Bundle
from .inference.embedder import Embedder
from .inference.embeddings import Embeddings, OutputValues
from .model import Model, load
from .scoring.control import score_perturbations
from .scoring.pairs import compare_perturbations
from .scoring.results import CompareResult, ScoreOptions, ScoreResult
from .tasks.genes import degs, enrich_genes, pseudobulk
from .tasks.token_files import read_gene_vectors

__all__ = [
    "AsyncClient",
    "AsyncGrpcClient",
    "Bundle",
    "CellSource",
    "Client",
    "CompareResult",
    "CountMatrix",
    "DegOptions",
    "DegResult",
    "Embedder",
    "Embeddings",
    "GeneVocabulary",
    "GrpcClient",
    "Model",
    "OutputSpec",
    "OutputValues",
    "PerturbScopeError",
    "ScoreOptions",
    "ScoreResult",
    "cells_from_anndata",
    "compare_perturbations",
    "degs",
    "enrich_genes",
    "load",
    "open_cells",
    "pseudobulk",
    "read_gene_vectors",
    "score_perturbations",
]

__version__: str
