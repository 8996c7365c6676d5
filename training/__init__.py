"""Stage 3: what train.py is made of."""
