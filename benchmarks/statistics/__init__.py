"""Simulations of the statistics: error rates, z, tails, sparse screens, batches and units."""
