"""The HTTP interface: an adapter between bodies and the engine."""
