"""The gRPC interface: an adapter between messages and the engine."""
