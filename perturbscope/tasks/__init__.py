"""What a model can be asked about cells and screens, here or on a server; imports cells, inference and scoring."""
