"""Lines of `samf.benchmarks.builds`: what runs in two builds of this package in turns, and the targets of it."""
