"""Stages 1 and 2: pretraining of the slice encoder, by DINO or on labels, and contrastive warm-up of the aggregator."""
