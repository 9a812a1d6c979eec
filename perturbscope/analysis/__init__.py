"""Analyses that need no model: differential genes, gene sets and maps of cells; imports cells and scoring."""
