"""One module for each command of ``python -m training``; each has ``main(arguments) -> exit code``."""
