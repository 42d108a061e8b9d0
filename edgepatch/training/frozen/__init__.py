"""The frozen models of a training run: rows of tokens go in, the logits that are needed come out."""
