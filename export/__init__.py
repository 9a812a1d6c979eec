"""Export: from a checkpoint to a bundle, proven against torch before it is written."""

from __future__ import annotations


class ExportError(Exception):
    """A checkpoint cannot become a bundle; nothing was written."""


class GraphError(ExportError):
    """The graph is not what it should be: not fused, or with parts that a cell embedding does not need."""


class ParityError(ExportError):
    """A graph's embeddings are further from the model's than the tolerance allows."""
