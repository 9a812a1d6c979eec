"""Evaluation of models and baselines over the same held-out cells of perturbation screens; imports perturbscope."""
