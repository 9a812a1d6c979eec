"""The command line: ``perturbscope embed | score | compare | bundle info, verify, golden``.

Exit code 0 for success; 2 for bad usage or input (wrong options, files, labels, limits, bundle or model name); 1 for
the rest (a server that does not answer, an accelerator that is not there, an interruption). An error is one line on
stderr, with its code in brackets; the codes are those of :mod:`perturbscope.errors`.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``perturbscope`` command."""
    from perturbscope.cli import app

    app.main()
