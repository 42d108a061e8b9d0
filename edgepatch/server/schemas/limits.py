"""Bounds of what one request may ask for; apart from the models, because pydantic takes a while to load."""

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_LOGPROBS = 20
MAX_BIASES = 1024
INT32 = 2**31 - 1
EMPTY_VALUES: tuple[object, ...] = (None, "", [], {})
"""What counts as no value in a part of a conversation."""
