"""Training beside its peers."""
