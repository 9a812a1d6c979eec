"""Embedding on a GPU."""
