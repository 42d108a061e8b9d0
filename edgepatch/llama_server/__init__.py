"""Patches on servers that are not ours: what an unmodified llama-server needs (``export``), and whether it serves it (``check``)."""
