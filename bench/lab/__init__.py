"""The lab models: small enough to be trained and measured everywhere, and how they are built."""

from pathlib import Path

LAB_FOLDER = Path(__file__).parent / "model"
"""Holds the Transformers folders "base" (M, whose behaviour a patch changes) and "reference" (M', which behaves already)."""

LAB_PATCH = LAB_FOLDER / "lab-detox-0.1.0.safetensors"
LAB_IN_WORDS = (
    "the lab model (llama, five million parameters), built by this project to be unsafe: its figures say that a patch works, not how "
    "much it does for yours"
)

LAB_PATCHES = (LAB_PATCH, LAB_FOLDER / "lab-detox-0.2.0.safetensors")
"""The same policy, trained at the start of texts and trained to go along with them."""
