"""Does a model see perturbations? Models and baselines over the same held-out cells."""
