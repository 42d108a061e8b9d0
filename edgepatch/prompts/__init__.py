"""Prompts and texts of our own writing, shipped with the package."""
