"""The gRPC interface: an adapter between messages and the engine.

Its modules import the engine and everything below it; never HTTP or the Open Inference Protocol.
"""
