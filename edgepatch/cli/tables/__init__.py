"""How verbs print what they show: answers first, in about ten lines."""
