"""Experiments behind the tables in docs/results/training.md: the paper's training in miniature, on phantoms, on a CPU."""
