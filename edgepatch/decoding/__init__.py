"""From logits to replies: sampling, constraints, stop strings."""
