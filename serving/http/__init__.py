"""The HTTP interface: an adapter between bodies and the engine.

Its modules import the engine and everything below it, and uploads; never gRPC or the Open Inference Protocol.
"""
