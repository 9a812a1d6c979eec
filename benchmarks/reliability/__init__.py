"""Faults made on purpose against the real service, and what came of them: ``python -m benchmarks.reliability``."""
