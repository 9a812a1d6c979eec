"""Configurations of the stages, and how they are read from YAML; imports nothing else of training."""
