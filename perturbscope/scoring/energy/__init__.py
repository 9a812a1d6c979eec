"""Fast sums of distances between groups of cells, and their nulls; imports scoring.labels, results and statistics."""
