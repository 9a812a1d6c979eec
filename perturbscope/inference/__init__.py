"""A bundle's graph and what runs it: tokens in, vectors out; imports cells and families."""
