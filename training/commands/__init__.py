"""One module for each command of ``python -m training``, with ``main(arguments) -> exit code``."""
