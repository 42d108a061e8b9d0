"""Preference pairs: prompts, samplers, files, provenance."""
