"""Labels and vectors in, scores of perturbations out; imports errors and threads, and knows no model."""
