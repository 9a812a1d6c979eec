"""Export: a checkpoint becomes a bundle that is proven against torch before it is written.

It may import training and perturbscope. Its errors belong to the tree of :mod:`perturbscope.errors`.
"""

from __future__ import annotations

from perturbscope.errors import PerturbScopeError


class ExportError(PerturbScopeError):
    """A checkpoint cannot become a bundle; nothing was written."""

    code = "export_failed"


class GraphError(ExportError):
    """The graph is not fused, or holds parts that no output needs."""

    code = "wrong_graph"


class ParityError(ExportError):
    """The outputs of a graph differ from those of the model by more than the tolerance."""

    code = "parity_missed"
