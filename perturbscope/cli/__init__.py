"""The command line ``perturbscope``; it may import every package of the library.

The exit code is 0 for success; 2 for bad usage or input (options, files, labels, limits, bundle or model name); 1 for
any other failure (a server that does not answer, a missing accelerator, an interruption). An error is one line on
stderr, with its code in brackets; the codes are those of :mod:`perturbscope.errors`.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``perturbscope`` command."""
    import os

    from perturbscope.threads import blas_variables

    # Before numpy is imported, which counts cores then.
    os.environ.update({name: value for name, value in blas_variables().items() if name not in os.environ})
    from perturbscope.cli import app

    app.main()
