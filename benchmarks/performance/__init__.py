"""How fast each part is, beside the peers it replaces: ``python -m benchmarks.performance [PART ...]``."""
