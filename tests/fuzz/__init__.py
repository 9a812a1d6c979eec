"""Fuzzing of everything that decodes what a caller sends: targets, seeds, a small corpus, and its replay as a test."""
