"""The patches for SmolLM2-135M-Instruct that ship in ``patches/``: their pairs, their training, their record."""
