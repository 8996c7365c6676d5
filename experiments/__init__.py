"""Experiments behind the tables in docs/training.md: the paper's training in miniature, on phantoms, on a CPU."""
