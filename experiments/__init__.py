"""What the tables in docs/training.md come from: the paper's training in miniature, on phantoms, on a CPU."""
