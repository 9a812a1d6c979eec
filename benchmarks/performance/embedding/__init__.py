"""Embedding on a CPU beside its peers."""
