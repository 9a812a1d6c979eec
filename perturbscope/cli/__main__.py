"""``python -m perturbscope.cli``."""

from perturbscope.cli import main

main()
