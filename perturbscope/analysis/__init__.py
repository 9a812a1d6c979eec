"""Answers that need no model: differential genes, gene sets, maps of cells; imports cells and scoring."""
