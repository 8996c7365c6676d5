"""What the tables in docs/results/training.md come from: the paper's training in miniature, on phantoms, on a CPU."""
