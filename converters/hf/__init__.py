"""Transformers folders."""
