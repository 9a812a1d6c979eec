"""See what a gene perturbation does to a cell."""

__version__ = "0.1.0"
