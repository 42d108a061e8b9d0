"""A peer's own vocabularies and chat templates on edgepatch, read from its unpacked sources; nothing of them is copied."""
