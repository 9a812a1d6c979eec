"""Raw counts of cells, their genes, and the files that they come from and go to; imports errors and threads only."""
