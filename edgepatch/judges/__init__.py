"""Judges of text: toxicity scorers, heads on sentence embeddings, local classifiers, string judges of refusals."""
