"""Tokenization beside its peers."""
