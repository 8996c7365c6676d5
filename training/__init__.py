"""Stage 3, training on reports and questions, and what all stages of training share."""
