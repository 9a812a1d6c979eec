"""The Open Inference Protocol, version 2 (KServe, Triton): callers send padded tokens of cells and get their vectors.

These cells pass the same front door and dispatcher as all others, so they share batches with cells that came as raw
counts. Only :mod:`serving.service` imports this folder; it imports the engine and both transports.

Sources: the protocol's public specification (KServe), and for binary tensors, model repository, configuration,
statistics and streams the extensions that NVIDIA documents for Triton.
"""
