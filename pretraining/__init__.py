"""Stages 1 and 2: the slice encoder by DINO or by labels, the aggregator by contrast."""
