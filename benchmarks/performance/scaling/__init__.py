"""How costs grow with cells, genes and perturbations."""
