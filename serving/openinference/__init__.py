"""The Open Inference Protocol, version 2 (KServe, Triton), for the token-level model.

Here a caller brings the tokens of its cells, padded, and gets their vectors. The cells pass the same front door and the
same dispatcher as all others, so they share batches with cells that came as raw counts.

Sources: the protocol's public specification (KServe), and for binary tensors, model repository, configuration,
statistics and streams the extensions that NVIDIA documents for Triton.
"""
