"""See what a gene perturbation does to a cell.

>>> import perturbscope
>>> model = perturbscope.load("bundles/default")            # or "http://localhost:3000", "grpc://localhost:3001"
>>> vectors = model.embed(adata)                            # float32 [n_cells, width]
>>> genes = model.embed(adata, outputs=["gene_embedding"])  # a vector for each gene of each cell, if the model has them
>>> genes.outputs["gene_embedding"].of_cell(0)              # float32 [genes of the cell, width]
>>> table = model.score(adata, perturbation_key="perturbation", control="control")

Importing the package is cheap: ``__init__.pyi`` says which module holds each name, and the module is imported when the
name is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
