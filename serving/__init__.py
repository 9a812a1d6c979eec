"""The server: HTTP and gRPC over one engine, in one process."""
