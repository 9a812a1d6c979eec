"""Tasks of a model over cells and screens, in this process or on a server; imports cells, inference and scoring."""
