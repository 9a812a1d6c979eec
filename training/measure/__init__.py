"""Scores of masked genes, operations, speed and hours; may import everything of training but commands."""
