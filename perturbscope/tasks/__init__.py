"""Tasks of a model over cells and screens, here or on a server; imports cells, inference, scoring and client."""
