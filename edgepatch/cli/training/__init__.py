"""The verbs that make a patch of pairs, and the pairs."""
