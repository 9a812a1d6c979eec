"""Bundles and the way from cells to vectors: encoders, batches, embedders and golden vectors.

The folder imports cells, families and threads, and no torch.
"""
