"""Programs that `samf.benchmarks.builds` runs in two builds of this package; they use only what both have."""
