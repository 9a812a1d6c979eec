"""Scores of perturbations from labels and vectors of cells; imports errors and threads, and knows no model."""
