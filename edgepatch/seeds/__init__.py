"""Seeds that move with the text, and seeds that stand side by side."""
