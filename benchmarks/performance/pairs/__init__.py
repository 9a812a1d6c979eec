"""All pairs of perturbations, and Wasserstein distances."""
