"""Judges of text: toxicity scorers, local classifiers, string judges of refusals."""
