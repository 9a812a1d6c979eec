"""How good, how fast and how costly: scores of masked genes, operations and hours."""
