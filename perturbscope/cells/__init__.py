"""Raw counts of cells, their genes, and the files that they are read from and written to.

The folder imports :mod:`perturbscope.errors` and :mod:`perturbscope.threads` only.
"""
